//! What answers for the file systems of a layer.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use estargz::digest::Digest;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::gone::Gone;
use crate::layer::Cause;
use crate::layer::fetch::LayerFetch;
use crate::layer::mounts::kept::{Descriptors, KeptLayer};
use crate::layer::native::group::Group;
use crate::layer::native::service::{Member, Service};

/// Of all layers of which a file system may be in use.
pub(super) struct Servings {
    service: Service,
    descriptors: Descriptors,
    runtime: Handle,
    layers: Mutex<HashMap<Digest, Arc<Serving>>>,
    /// Layers of which nothing can be had but their group.
    denied: Mutex<HashMap<Digest, (Arc<Member>, KeptLayer)>>,
}

impl Servings {
    pub(super) fn new(service: Service, descriptors: Descriptors, runtime: Handle) -> Self {
        Self {
            service,
            descriptors,
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
        // From here on no hole is punched, and it is looked at afterwards whether there is one.
        fetch.layer().leave_to_kernel()?;
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
            state.member = Some(member);
            state.mounted = 1;
        }
        serving.watch(fetch);
        self.layers().insert(toc, serving.clone());
        Ok(serving)
    }

    pub(super) fn deny(&self, toc: Digest, mut kept: KeptLayer) {
        let Some(group) = kept.group.take() else { return };
        match self.service.resume(group, toc, None) {
            Ok(member) => {
                tracing::error!(%toc, "a layer that an earlier process left mounted cannot be served; what is read of it is an error");
                let mut denied = self.denied.lock().unwrap_or_else(PoisonError::into_inner);
                denied.insert(toc, (member, kept));
            }
            Err(error) => {
                tracing::error!(%toc, %error, "who reads of a layer that an earlier process left mounted waits");
            }
        }
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
        }
    }

    pub(super) fn leave(&self) {
        self.service.leave();
    }
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
    /// A successor goes on.
    left: bool,
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
        let mut state = self.state();
        state.fetch = fetch.clone();
        if state.member.is_none() {
            let denied = self
                .servings
                .denied
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&self.toc);
            state.member = denied.map(|(member, _)| member);
        }
        if let Some(member) = &state.member {
            member.fetch_by(fetch.clone());
        } else if !fetch.layer().is_whole() {
            state.member = Some(self.join(fetch)?);
        }
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
            let marked = group.mark(layer.content());
            marked.inspect_err(|_| servings.descriptors.forget_native(&self.toc))?;
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
                state.member = None;
                self.servings.descriptors.forget_native(&self.toc);
                tracing::debug!(toc = %self.toc, "nobody is asked about the layer any more");
            }
            Err(error) => tracing::warn!(toc = %self.toc, %error, "the layer's mark stays"),
        }
    }

    /// One of its file systems was unmounted and has ended.
    pub(super) fn release(&self, gone: Gone) {
        drop(gone);
        let mut state = self.state();
        state.mounted = state.mounted.saturating_sub(1);
        drop(state);
        self.end_if_unused();
    }

    /// One of its file systems was unmounted and is in use.
    pub(super) fn linger(&self, gone: Gone) {
        let mut state = self.state();
        state.mounted = state.mounted.saturating_sub(1);
        state.lingering.push(gone);
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
