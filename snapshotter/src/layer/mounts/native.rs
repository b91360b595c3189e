//! Layers that the kernel serves itself: EROFS over `data`, filled on demand. See [`crate::layer::native`].
//!
//! A layer's file system outlives its mount as long as containers have it in use, and what answers for it must be there as long. So there
//! is one [`Serving`] of a layer, whatever is mounted of it, and it ends with the last of its file systems.

mod gone;
mod serving;

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use estargz::digest::Digest;
use hullspeed_erofs::mount::{Detached, Mounter};
use hullspeed_erofs::read_ahead::ReadAhead;
use rustix::fs::{AtFlags, CWD, OFlags, StatxFlags};
use rustix::mount::UnmountFlags;
use tokio::runtime::Handle;

use self::gone::{Gone, Watches};
use self::serving::{Serving, Servings};
use super::kept::{Descriptors, KeptLayer};
use super::{Ended, Forget, Kind, LayerMounted, Way, pages};
use crate::layer::Cause;
use crate::layer::cache::{LayerStore, detach_stale, kind_at, stack_at};
use crate::layer::fault;
use crate::layer::fetch::LayerFetch;
use crate::layer::native::group::Group;
use crate::layer::native::service::Service;

/// What the kernel calls such a mount.
const EROFS: &str = "erofs";
/// How long it is waited for the end of a file system that was unmounted.
const GRACE: Duration = Duration::from_secs(2);

/// Mounts natively.
pub struct NativeWay {
    servings: Arc<Servings>,
    mounter: Mounter,
    watches: Watches,
}

impl NativeWay {
    /// What is not complete is answered for by `service`; its descriptors are kept in the store of `descriptors`, and `read_ahead_kib`
    /// are read ahead of it.
    pub fn new(
        service: Service,
        descriptors: Descriptors,
        read_ahead_kib: u32,
        runtime: Handle,
    ) -> Result<Self, Cause> {
        Ok(Self {
            servings: Arc::new(Servings::new(service, descriptors, read_ahead_kib, runtime)),
            mounter: Mounter::default(),
            watches: Watches::new()?,
        })
    }

    /// Mounts a complete layer in the place of what is mounted there, which stays for those who use it. At no moment is there neither.
    pub fn take_over(&self, fetch: &Arc<LayerFetch>) -> Result<Box<dyn LayerMounted>, Cause> {
        let target = fetch.layer().mount_point();
        let (serving, detached, gone) = self.prepared(fetch)?;
        if !serving.is_alone() {
            serving.release(gone);
            return Err("it is not complete".into());
        }
        let mounted = NativeMounted::new(&target, &detached, gone, serving);
        replace(detached, &target)?;
        Ok(Box::new(mounted.shown()))
    }

    /// Sets up what answers for a layer and its file system, which nobody sees yet.
    fn prepared(&self, fetch: &Arc<LayerFetch>) -> Result<(Arc<Serving>, Detached, Gone), Cause> {
        let layer = fetch.layer();
        let image = layer.erofs_image()?;
        let serving = self.servings.serve(fetch)?;
        let made = || -> Result<(Detached, Gone), Cause> {
            let detached = self.mounter.create(&image, layer.content().as_fd())?;
            fault::point("native-created");
            let gone = self.watches.watch(&hullspeed_erofs::mount::path_of(detached.as_fd()))?;
            Ok((detached, gone))
        };
        match made() {
            Ok((detached, gone)) => Ok((serving, detached, gone)),
            Err(error) => {
                serving.release(Gone::unknown());
                Err(error)
            }
        }
    }

    /// Looks after file systems that were in use when they were unmounted. Called every now and then.
    pub fn tidy(&self) {
        self.servings.tidy();
    }

    /// Denies what is asked of a layer whose group was kept, and of which nothing else can be had.
    pub fn deny(&self, toc: Digest, mut kept: KeptLayer) {
        if let Some(group) = kept.group.take() {
            self.servings.deny(toc, group, kept.data_identity);
        }
    }

    /// Takes down what is mounted of a layer of which all is denied, and gives back what was kept for it once nobody has it in use.
    pub fn end_denied(&self, toc: &Digest, target: &Path) -> Result<(), Cause> {
        if !self.servings.is_denied(toc) || !is_erofs(target)? {
            return Ok(());
        }
        let gone = self.watches.watch(target)?;
        unmount(target)?;
        if gone.within(GRACE) {
            self.servings.forget_denied(toc);
        }
        Ok(())
    }

    /// Layers of which a predecessor noted what it was asked.
    pub fn noted(&self) -> Vec<Digest> {
        self.servings.noted()
    }

    /// All that was kept is served: what the journal holds of others is of no use.
    pub fn settle(&self) {
        self.servings.settle();
    }

    /// Stops answering: a successor goes on.
    pub fn leave(&self) {
        self.servings.leave();
    }
}

impl Way for NativeWay {
    fn mount(&self, fetch: &Arc<LayerFetch>, _store: &LayerStore) -> Result<Box<dyn LayerMounted>, Cause> {
        let target = fetch.layer().mount_point();
        let (serving, detached, gone) = self.prepared(fetch)?;
        let mounted = NativeMounted::new(&target, &detached, gone, serving);
        if is_erofs(&target).unwrap_or(false) {
            // What an earlier process mounted is right as well; at no moment is there nothing.
            replace(detached, &target)?;
        } else {
            detach_stale(&target)?;
            detached.attach(&target)?;
        }
        Ok(Box::new(mounted.shown()))
    }

    fn resume(
        &self,
        fetch: &Arc<LayerFetch>,
        _store: &LayerStore,
        kept: &mut KeptLayer,
    ) -> Vec<Result<Box<dyn LayerMounted>, Cause>> {
        let (group, data) = (kept.group.take(), kept.data_identity);
        group
            .into_iter()
            .map(|group| self.resume_one(fetch, group, data))
            .collect()
    }
}

impl NativeWay {
    fn resume_one(
        &self,
        fetch: &Arc<LayerFetch>,
        group: Group,
        data: Option<(u64, u64)>,
    ) -> Result<Box<dyn LayerMounted>, Cause> {
        let target = fetch.layer().mount_point();
        let seen = || -> Result<(bool, (u32, u32)), Cause> {
            if data != Some(serving::identity(fetch.layer().content())?) {
                return Err("its data is another file by now".into());
            }
            bare(&target)?;
            Ok((is_erofs(&target)?, device_of(&target)?))
        };
        let (is_erofs, device) = match seen() {
            Ok(seen) => seen,
            Err(error) => {
                // Whoever has it in use is answered, at least.
                self.servings.deny(fetch.layer().toc_digest(), group, data);
                return Err(error);
            }
        };
        let serving = self.servings.resume(fetch, group)?;
        if !is_erofs {
            // Somebody may have it in use all the same; it is served as long as this process runs.
            serving.linger(Gone::unknown());
            return Err("no EROFS is mounted there".into());
        }
        let gone = self.watches.watch(&target).unwrap_or_else(|error| {
            tracing::warn!(path = %target.display(), %error, "it will not be known when a layer's file system has ended");
            Gone::unknown()
        });
        Ok(Box::new(NativeMounted {
            target,
            device,
            gone: Some(gone),
            serving: Some(serving),
            is_shown: true,
            // Which of the kernel's settings are its own nobody knows any more: they stay.
            _read_ahead: None,
        }))
    }
}

struct NativeMounted {
    target: PathBuf,
    device: (u32, u32),
    /// These are there until the file system is given up.
    gone: Option<Gone>,
    serving: Option<Arc<Serving>>,
    is_shown: bool,
    /// The layer's serving sets it as long as this is there.
    _read_ahead: Option<Arc<ReadAhead>>,
}

impl NativeMounted {
    fn new(target: &Path, detached: &Detached, gone: Gone, serving: Arc<Serving>) -> Self {
        let read_ahead = Arc::new(detached.read_ahead().clone());
        serving.pace(&read_ahead);
        Self {
            target: target.to_owned(),
            device: detached.device(),
            gone: Some(gone),
            serving: Some(serving),
            is_shown: false,
            _read_ahead: Some(read_ahead),
        }
    }

    fn shown(mut self) -> Self {
        self.is_shown = true;
        self
    }

    fn take_down(&mut self) -> Result<Ended, Cause> {
        let (Some(gone), Some(serving)) = (self.gone.take(), self.serving.take()) else {
            return Ok(Ended::Wholly);
        };
        let detached = match device_of(&self.target) {
            Ok(found) if found == self.device && self.is_shown => unmount(&self.target),
            Ok(_) | Err(_) => Ok(()),
        };
        fault::point("native-unmounted");
        if gone.within(GRACE) {
            let in_use = serving.release(gone);
            detached?;
            return Ok(if in_use { Ended::InUse } else { Ended::Wholly });
        }
        tracing::warn!(path = %self.target.display(), "a layer's file system is in use although it was unmounted; it is served on");
        serving.linger(gone);
        detached?;
        Ok(Ended::InUse)
    }
}

impl LayerMounted for NativeMounted {
    fn kind(&self) -> Kind {
        Kind::Erofs
    }

    fn target(&self) -> &Path {
        &self.target
    }

    fn is_alive(&self) -> bool {
        device_of(&self.target).is_ok_and(|device| device == self.device)
    }

    fn is_shown(&self) -> bool {
        self.is_alive()
    }

    fn forget(&self) -> Forget {
        let (fetch, target) = (
            self.serving.as_ref().map(|serving| serving.fetch()),
            self.target.clone(),
        );
        Box::new(move |chunk| {
            let Some(fetch) = fetch else { return Ok(()) };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(&target, flags, rustix::fs::Mode::empty())?;
            pages::forget(root, fetch.layer(), chunk)
        })
    }

    fn unmount(mut self: Box<Self>) -> Result<Ended, Cause> {
        self.take_down()
    }

    fn leave(mut self: Box<Self>) {
        // The mark, the group and the journal stay; nobody takes the mark away behind the successor's back.
        if let Some(serving) = self.serving.take() {
            serving.leave();
        }
    }
}

impl Drop for NativeMounted {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::warn!(path = %self.target.display(), error = &*error as &dyn std::error::Error, "a layer's mount did not end cleanly");
        }
    }
}

fn device_of(path: &Path) -> io::Result<(u32, u32)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE)?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

/// Puts a file system below what is mounted at `target`, and takes that away: at no moment is there nothing.
fn replace(detached: Detached, target: &Path) -> Result<(), Cause> {
    // A process that was killed between these two steps left its own there. It is right as well, and what was to go goes.
    while stack_at(target)?.len() > 1 {
        unmount(target)?;
    }
    detached.attach_beneath(target)?;
    fault::point("native-beneath");
    unmount(target)?;
    fault::point("native-replaced");
    Ok(())
}

/// Of EROFS mounts that are stacked at `target`, as a process leaves them that is killed while it replaces one, the lowest stays: it is
/// the newest.
fn bare(target: &Path) -> io::Result<()> {
    while let [above, below, ..] = &stack_at(target)?[..]
        && [above, below].iter().all(|kind| *kind == EROFS)
    {
        unmount(target)?;
    }
    Ok(())
}

fn unmount(target: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(
        target,
        UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
    )?)
}

/// Whether EROFS is mounted at `path`, by the mount table: a file system that nobody serves is not asked.
fn is_erofs(path: &Path) -> io::Result<bool> {
    Ok(kind_at(path)?.as_deref() == Some(EROFS))
}
