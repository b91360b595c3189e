//! What answers for the file systems of a layer.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use estargz::digest::Digest;
use hullspeed_erofs::read_ahead::{self, ReadAhead};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::gone::Gone;
use crate::layer::Cause;
use crate::layer::fault;
use crate::layer::fetch::LayerFetch;
use crate::layer::mounts::kept::Descriptors;
use crate::layer::native::group::Group;
use crate::layer::native::service::{Member, Service};

/// Of all layers of which a file system may be in use.
pub(super) struct Servings {
    service: Service,
    descriptors: Descriptors,
    /// Of layers that are not complete.
    read_ahead_kib: u32,
    runtime: Handle,
    layers: Mutex<HashMap<Digest, Arc<Serving>>>,
    /// Layers of which nothing can be had but their group.
    denied: Mutex<HashMap<Digest, Denied>>,
}

impl Servings {
    pub(super) fn new(service: Service, descriptors: Descriptors, read_ahead_kib: u32, runtime: Handle) -> Self {
        Self {
            service,
            descriptors,
            read_ahead_kib,
            runtime,
            layers: Mutex::default(),
            denied: Mutex::default(),
        }
    }

    fn layers(&self) -> MutexGuard<'_, HashMap<Digest, Arc<Serving>>> {
        // Every change is one insert or remove.
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that a layer is answered for, unless it is complete: by what there is of it, or anew.
    pub(super) fn serve(self: &Arc<Self>, fetch: &Arc<LayerFetch>) -> Result<Arc<Serving>, Cause> {
        let toc = fetch.layer().toc_digest();
        let serving = {
            let mut layers = self.layers();
            let serving = layers.entry(toc).or_insert_with(|| Serving::new(self, toc, fetch));
            // With the table held, so that it does not end meanwhile.
            serving.state().mounted += 1;
            serving.clone()
        };
        match serving.begin(fetch) {
            Ok(()) => Ok(serving),
            Err(error) => {
                serving.release(Gone::unknown());
                Err(error)
            }
        }
    }

    /// Goes on answering for a layer that a predecessor served.
    pub(super) fn resume(self: &Arc<Self>, fetch: &Arc<LayerFetch>, group: Group) -> Result<Arc<Serving>, Cause> {
        let toc = fetch.layer().toc_digest();
        let member = self.service.resume(group, toc, Some(fetch.clone()))?;
        let serving = Serving::new(self, toc, fetch);
        {
            let mut state = serving.state();
            let others = member.noted_systems().saturating_sub(1);
            state
                .lingering
                .extend(std::iter::repeat_with(Gone::unknown).take(others));
            state.member = Some(member);
            state.mounted = 1;
        }
        serving.watch(fetch);
        self.layers().insert(toc, serving.clone());
        Ok(serving)
    }

    pub(super) fn deny(&self, toc: Digest, group: Group, data: Option<(u64, u64)>) {
        match self.service.resume(group, toc, None) {
            Ok(member) => {
                tracing::error!(%toc, "a layer that an earlier process left mounted cannot be served; what is read of it is an error");
                let mut denied = self.denied.lock().unwrap_or_else(PoisonError::into_inner);
                denied.insert(toc, Denied { member, data });
            }
            Err(error) => {
                tracing::error!(%toc, %error, "who reads of a layer that an earlier process left mounted waits");
            }
        }
    }

    pub(super) fn is_denied(&self, toc: &Digest) -> bool {
        let denied = self.denied.lock().unwrap_or_else(PoisonError::into_inner);
        denied.contains_key(toc)
    }

    /// The file system that a predecessor left of a layer has ended: nobody can ask any more, unless there were several.
    pub(super) fn forget_denied(&self, toc: &Digest) {
        let mut denied = self.denied.lock().unwrap_or_else(PoisonError::into_inner);
        let is_last = |denied: &Denied| denied.member.noted_systems() <= 1;
        if denied.get(toc).is_some_and(is_last)
            && let Some(Denied { member, .. }) = denied.remove(toc)
        {
            member.quit();
            self.descriptors.forget_native(toc);
        }
    }

    /// What denies all that is asked of a layer, if it is this one's: then it can be answered from now on.
    fn take_denied(&self, toc: &Digest, fetch: &LayerFetch) -> Result<Option<Arc<Member>>, Cause> {
        let mut denied = self.denied.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(found) = denied.get(toc) else { return Ok(None) };
        if found.data != Some(identity(fetch.layer().content())?) {
            return Err("another file of the layer is in use, of which nothing can be read".into());
        }
        Ok(denied.remove(toc).map(|denied| denied.member))
    }

    pub(super) fn noted(&self) -> Vec<Digest> {
        self.service.journal().layers()
    }

    pub(super) fn settle(&self) {
        self.service.journal().sweep();
    }

    pub(super) fn tidy(&self) {
        let layers: Vec<_> = self.layers().values().cloned().collect();
        for serving in layers {
            let ended = serving.state().lingering.extract_if(.., |gone| gone.is_so()).count();
            if ended > 0 {
                serving.end_if_unused();
            }
            // Somebody else's checkpoint may have been the last.
            serving.retire_when_whole();
        }
    }

    pub(super) fn leave(&self) {
        self.service.leave();
    }
}

/// A group whose layer cannot be had.
struct Denied {
    member: Arc<Member>,
    /// Device and inode of the file that has its mark.
    data: Option<(u64, u64)>,
}

/// What answers for one layer.
pub(super) struct Serving {
    toc: Digest,
    servings: Arc<Servings>,
    state: Mutex<State>,
}

struct State {
    fetch: Arc<LayerFetch>,
    /// None of a layer that is complete: the kernel serves it alone.
    member: Option<Arc<Member>>,
    /// Mounted file systems.
    mounted: usize,
    /// Those that were unmounted and are in use.
    lingering: Vec<Gone>,
    watching: Option<AbortHandle>,
    /// Of the file systems that are mounted.
    paces: Vec<Weak<ReadAhead>>,
    /// A successor goes on.
    left: bool,
}

impl State {
    /// Told before a file system is made, and after it has ended: a successor must not think that there are fewer.
    fn note_systems(&self) {
        if let Some(member) = &self.member {
            member.note_systems(self.mounted + self.lingering.len());
        }
    }
}

/// Device and inode of a file.
pub(super) fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Serving {
    fn new(servings: &Arc<Servings>, toc: Digest, fetch: &Arc<LayerFetch>) -> Arc<Self> {
        Arc::new(Self {
            toc,
            servings: servings.clone(),
            state: Mutex::new(State {
                fetch: fetch.clone(),
                member: None,
                mounted: 0,
                lingering: Vec::new(),
                watching: None,
                paces: Vec::new(),
                left: false,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fetch(&self) -> Arc<LayerFetch> {
        self.state().fetch.clone()
    }

    /// Whether the kernel serves the layer alone.
    pub(super) fn is_alone(&self) -> bool {
        self.state().member.is_none()
    }

    /// Answers by `fetch` from now on, for one file system more.
    fn begin(self: &Arc<Self>, fetch: &Arc<LayerFetch>) -> Result<(), Cause> {
        // From here on no hole is punched, and it is looked at afterwards whether there is one.
        fetch.layer().leave_to_kernel()?;
        fault::point("native-noted");
        let mut state = self.state();
        if state.member.is_none()
            && let Some(member) = self.servings.take_denied(&self.toc, fetch)?
        {
            state.member = Some(member);
            // What it answered for is in use, wherever.
            state.lingering.push(Gone::unknown());
        }
        state.fetch = fetch.clone();
        if let Some(member) = &state.member {
            // Whoever died when the group was new, or about to go, may have left it without a mark.
            member.mark(fetch.layer().content())?;
            member.fetch_by(fetch.clone());
        } else if !fetch.layer().is_whole() {
            state.member = Some(self.join(fetch)?);
        }
        state.note_systems();
        drop(state);
        self.watch(fetch);
        Ok(())
    }

    fn join(&self, fetch: &Arc<LayerFetch>) -> Result<Arc<Member>, Cause> {
        let (servings, layer) = (&self.servings, fetch.layer());
        let slot = servings.service.journal().claim(&self.toc);
        let slot = slot.ok_or("no slot in the journal of events is free")?;
        let made = Group::new().and_then(|group| {
            // Kept before anybody can ask: no process dies and leaves a mark that nobody answers for.
            servings
                .descriptors
                .keep_native(&self.toc, group.as_fd(), layer.content().as_fd())?;
            fault::point("native-kept");
            let marked = group.mark(layer.content());
            marked.inspect_err(|_| servings.descriptors.forget_native(&self.toc))?;
            fault::point("native-marked");
            Ok(group)
        });
        let group = match made {
            Ok(group) => group,
            Err(error) => {
                slot.release();
                return Err(error.into());
            }
        };
        let joined = servings.service.join(group, slot, self.toc, fetch.clone());
        Ok(joined.inspect_err(|_| servings.descriptors.forget_native(&self.toc))?)
    }

    /// Leaves the kernel alone with the layer once it is complete.
    fn watch(self: &Arc<Self>, fetch: &Arc<LayerFetch>) {
        let mut state = self.state();
        if let Some(task) = state.watching.take() {
            task.abort();
        }
        if state.member.is_none() {
            return;
        }
        let (serving, completed) = (self.clone(), fetch.completed());
        let watch = async move {
            if completed.await {
                // A panic there has been reported, and leaves the layer served.
                let _ = tokio::task::spawn_blocking(move || serving.retire_when_whole()).await;
            }
        };
        state.watching = Some(self.servings.runtime.spawn(watch).abort_handle());
    }

    fn retire_when_whole(&self) {
        let mut state = self.state();
        if !state.left && state.fetch.layer().is_whole() {
            self.retire(&mut state);
        }
    }

    /// Takes the mark away and gives back what was kept for it.
    fn retire(&self, state: &mut State) {
        let Some(member) = &state.member else { return };
        match member.retire(state.fetch.layer()) {
            Ok(()) => {
                fault::point("native-voided");
                state.member = None;
                self.servings.descriptors.forget_native(&self.toc);
                let mounted = state.paces.iter().filter_map(Weak::upgrade);
                mounted.for_each(|read_ahead| self.set_pace(&read_ahead, state));
                tracing::debug!(toc = %self.toc, "nobody is asked about the layer any more");
            }
            Err(error) => tracing::warn!(toc = %self.toc, %error, "the layer's mark stays"),
        }
    }

    /// Sets how much is read ahead of a new file system: what is configured while the layer is fetched, and as much as of any file of
    /// the disk once all of it is there. That is also the size of the pieces in which its files lie in the page cache.
    pub(super) fn pace(&self, read_ahead: &Arc<ReadAhead>) {
        let mut state = self.state();
        self.set_pace(read_ahead, &state);
        state.paces.retain(|pace| pace.strong_count() > 0);
        state.paces.push(Arc::downgrade(read_ahead));
    }

    fn set_pace(&self, read_ahead: &ReadAhead, state: &State) {
        let fetched = self.servings.read_ahead_kib;
        let kib = match &state.member {
            Some(_) => fetched,
            None => read_ahead::of_disk(state.fetch.layer().content().as_fd()).map_or(fetched, |kib| kib.max(fetched)),
        };
        if let Err(error) = read_ahead.set(kib) {
            tracing::warn!(toc = %self.toc, %error, kib, "the read-ahead of a layer's mount stays as it is");
        }
    }

    /// One of its file systems was unmounted and has ended. Whether others are in use.
    pub(super) fn release(&self, gone: Gone) -> bool {
        drop(gone);
        let in_use = {
            let mut state = self.state();
            state.mounted = state.mounted.saturating_sub(1);
            state.note_systems();
            !state.lingering.is_empty()
        };
        self.end_if_unused();
        in_use
    }

    /// One of its file systems was unmounted and is in use.
    pub(super) fn linger(&self, gone: Gone) {
        let mut state = self.state();
        state.mounted = state.mounted.saturating_sub(1);
        state.lingering.push(gone);
        state.note_systems();
    }

    /// Ends when no file system is left.
    pub(super) fn end_if_unused(&self) {
        let mut layers = self.servings.layers();
        let mut state = self.state();
        if state.left || state.mounted > 0 || !state.lingering.is_empty() {
            return;
        }
        if let Some(task) = state.watching.take() {
            task.abort();
        }
        self.retire(&mut state);
        if state.member.is_none() {
            state.fetch.layer().take_back();
            layers.remove(&self.toc);
        }
    }

    /// Everything stays as it is, for the next process.
    pub(super) fn leave(&self) {
        let mut state = self.state();
        state.left = true;
        if let Some(task) = state.watching.take() {
            task.abort();
        }
    }
}
