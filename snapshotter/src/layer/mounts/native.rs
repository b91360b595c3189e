//! Layers that the kernel serves itself: EROFS over `data`, filled on demand. See [`crate::layer::native`].

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use hullspeed_erofs::mount::{Detached, Mounter};
use rustix::fs::inotify;
use rustix::fs::{Advice, AtFlags, CWD, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use tokio::runtime::Handle;

use super::kept::{Descriptors, KeptLayer};
use super::{Forget, Kind, LayerMounted, Way};
use crate::layer::Cause;
use crate::layer::cache::detach_stale;
use crate::layer::fetch::LayerFetch;
use crate::layer::native::group::Group;
use crate::layer::native::service::{Member, Service};

/// The largest page of any machine this runs on.
const PAGE: u64 = 64 << 10;
/// How long it is waited for the end of a file system that was unmounted.
const GRACE: Duration = Duration::from_secs(2);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(5);

/// Mounts natively.
pub struct NativeWay {
    shared: Arc<Shared>,
}

struct Shared {
    service: Service,
    mounter: Mounter,
    descriptors: Descriptors,
    read_ahead_kib: u32,
    runtime: Handle,
    /// Layers whose file system is in use although it was unmounted: their readers are answered as long as this process runs.
    lingering: Mutex<Vec<Serving>>,
}

impl NativeWay {
    /// What is not complete is answered for by `service`; its descriptors are kept in the store of `descriptors`.
    pub fn new(service: Service, descriptors: Descriptors, read_ahead_kib: u32, runtime: Handle) -> Self {
        Self {
            shared: Arc::new(Shared {
                service,
                mounter: Mounter::default(),
                descriptors,
                read_ahead_kib,
                runtime,
                lingering: Mutex::default(),
            }),
        }
    }

    /// Mounts a complete layer in the place of what is mounted there, which stays for those who use it. At no moment is there neither.
    pub fn take_over(&self, fetch: &Arc<LayerFetch>) -> Result<Box<dyn LayerMounted>, Cause> {
        let layer = fetch.layer();
        if !fetch.is_complete() {
            return Err("it is not complete".into());
        }
        let target = layer.mount_point();
        let image = layer.erofs_image()?;
        layer.leave_to_kernel();
        let detached = self.shared.detached(fetch, &image)?;
        let device = detached.device();
        detached.attach_beneath(&target)?;
        rustix::mount::unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
        Ok(Box::new(NativeMounted {
            gone: Gone::watch(&target)?,
            target,
            device,
            serving: Serving::new(&self.shared, fetch, None),
        }))
    }

    /// Stops answering: a successor goes on.
    pub fn leave(&self) {
        self.shared.service.leave();
    }
}

impl Way for NativeWay {
    fn mount(&self, fetch: &Arc<LayerFetch>) -> Result<Box<dyn LayerMounted>, Cause> {
        let layer = fetch.layer();
        let target = layer.mount_point();
        detach_stale(&target)?;
        let image = layer.erofs_image()?;
        // From here on no hole is punched; if this fails, not until the layer is closed.
        layer.leave_to_kernel();
        let serving = self.shared.serve(fetch)?;
        let mounted = self.shared.show(fetch, &image, &target);
        let (device, gone) = match mounted {
            Ok(mounted) => mounted,
            Err(error) => {
                serving.end();
                return Err(error);
            }
        };
        serving.watch();
        Ok(Box::new(NativeMounted {
            target,
            device,
            gone,
            serving,
        }))
    }

    fn resume(&self, fetch: &Arc<LayerFetch>, kept: KeptLayer) -> Result<Box<dyn LayerMounted>, Cause> {
        let layer = fetch.layer();
        let target = layer.mount_point();
        let group = kept.group.ok_or("no group was kept")?;
        if !layer.is_read_by_kernel() {
            return Err("its data was not kept".into());
        }
        let member = self.shared.service.resume(group, fetch.clone())?;
        let serving = Serving::new(&self.shared, fetch, Some(member));
        let found = device_of(&target).map_err(Cause::from).and_then(|device| {
            let gone = Gone::watch(&target)?;
            is_erofs(&target)?
                .then_some((device, gone))
                .ok_or_else(|| "no EROFS is mounted there".into())
        });
        let (device, gone) = match found {
            Ok(found) => found,
            Err(error) => {
                // Somebody may still have it in use, or nobody ever saw it: there is no telling.
                self.shared.linger(serving);
                return Err(error);
            }
        };
        serving.watch();
        Ok(Box::new(NativeMounted {
            target,
            device,
            gone,
            serving,
        }))
    }
}

impl Shared {
    /// Sets up what answers for a layer, unless it is complete.
    fn serve(self: &Arc<Self>, fetch: &Arc<LayerFetch>) -> Result<Serving, Cause> {
        if fetch.is_complete() {
            return Ok(Serving::new(self, fetch, None));
        }
        let layer = fetch.layer();
        let toc = layer.toc_digest();
        let slot = self.service.journal().claim(&toc);
        let slot = slot.ok_or("no slot in the journal of events is free")?;
        let made = Group::new().and_then(|group| {
            group.mark(layer.content())?;
            self.descriptors
                .keep_native(&toc, group.as_fd(), layer.content().as_fd())?;
            Ok(group)
        });
        let group = match made {
            Ok(group) => group,
            Err(error) => {
                slot.release();
                return Err(error.into());
            }
        };
        match self.service.join(group, slot, fetch.clone()) {
            Ok(member) => Ok(Serving::new(self, fetch, Some(member))),
            Err(error) => {
                self.descriptors.forget_native(&toc);
                Err(error.into())
            }
        }
    }

    fn show(&self, fetch: &LayerFetch, image: &Path, target: &Path) -> Result<((u32, u32), Gone), Cause> {
        let detached = self.detached(fetch, image)?;
        let device = detached.device();
        detached.attach(target)?;
        let gone = Gone::watch(target).inspect_err(|_| {
            // The first error is the one to report.
            let _ = rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
        })?;
        Ok((device, gone))
    }

    fn detached(&self, fetch: &LayerFetch, image: &Path) -> Result<Detached, Cause> {
        let detached = self.mounter.create(image, fetch.layer().content().as_fd())?;
        if let Err(error) = detached.set_read_ahead(self.read_ahead_kib) {
            tracing::warn!(%error, "the read-ahead of a layer's mount stays at the kernel's default");
        }
        Ok(detached)
    }

    fn linger(&self, serving: Serving) {
        tracing::warn!(toc = %serving.fetch.layer().toc_digest(), "a layer's file system is in use although it was unmounted; it is served on");
        self.lingering
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(serving);
    }
}

/// What answers for a mounted layer.
struct Serving {
    shared: Arc<Shared>,
    fetch: Arc<LayerFetch>,
    member: Arc<Mutex<Option<Arc<Member>>>>,
    watching: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Serving {
    fn new(shared: &Arc<Shared>, fetch: &Arc<LayerFetch>, member: Option<Arc<Member>>) -> Self {
        Self {
            shared: shared.clone(),
            fetch: fetch.clone(),
            member: Arc::new(Mutex::new(member)),
            watching: Mutex::default(),
        }
    }

    /// Leaves the kernel alone with the layer once it is complete.
    fn watch(&self) {
        let (member, descriptors) = (self.member.clone(), self.shared.descriptors.clone());
        let (completed, toc) = (self.fetch.completed(), self.fetch.layer().toc_digest());
        let watch = async move {
            if completed.await {
                // A panic there has been reported, and leaves the layer served.
                let _ = tokio::task::spawn_blocking(move || retire(&member, &descriptors, &toc)).await;
            }
        };
        let task = self.shared.runtime.spawn(watch);
        *self.watching.lock().unwrap_or_else(PoisonError::into_inner) = Some(task.abort_handle());
    }

    fn unwatch(&self) {
        if let Some(task) = self.watching.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }

    /// Nobody reads of the layer any more.
    fn end(self) {
        self.unwatch();
        retire(&self.member, &self.shared.descriptors, &self.fetch.layer().toc_digest());
    }
}

/// Takes the mark away and gives back what was kept for it.
fn retire(member: &Mutex<Option<Arc<Member>>>, descriptors: &Descriptors, toc: &Digest) {
    let mut member = member.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(retiring) = member.take() else { return };
    match retiring.clone().retire() {
        Ok(()) => {
            descriptors.forget_native(toc);
            tracing::debug!(%toc, "the kernel serves the layer alone");
        }
        Err(error) => {
            tracing::warn!(%toc, %error, "the layer's mark stays");
            *member = Some(retiring);
        }
    }
}

struct NativeMounted {
    target: PathBuf,
    device: (u32, u32),
    gone: Gone,
    serving: Serving,
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
        let (fetch, target) = (self.serving.fetch.clone(), self.target.clone());
        Box::new(move |chunk| {
            let path = fetch.layer().index().path_of(chunk.ino);
            let path = target.join(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(&path)));
            // It is a regular file by the index, and opening it reads nothing of it.
            let file = rustix::fs::open(
                &path,
                OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )?;
            // Only pages that lie in the range as a whole are dropped.
            let first = chunk.file_offset / PAGE * PAGE;
            let end = chunk
                .file_offset
                .saturating_add(u64::from(chunk.size))
                .next_multiple_of(PAGE);
            Ok(rustix::fs::fadvise(
                file,
                first,
                NonZeroU64::new(end - first),
                Advice::DontNeed,
            )?)
        })
    }

    fn unmount(self: Box<Self>) -> Result<(), Cause> {
        let Self {
            target,
            device,
            gone,
            serving,
        } = *self;
        let detached = match device_of(&target) {
            Ok(found) if found == device => {
                rustix::mount::unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            }
            Ok(_) | Err(_) => Ok(()),
        };
        if gone.within(GRACE) {
            serving.end();
        } else {
            let shared = serving.shared.clone();
            shared.linger(serving);
        }
        Ok(detached?)
    }

    fn leave(self: Box<Self>) {
        // The mark, the group and the journal stay; nobody takes the mark away behind the successor's back.
        self.serving.unwatch();
        std::mem::forget(
            self.serving
                .member
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }
}

/// Tells when a file system has ended: its mount may be gone, and others (overlays over it) still have it in use.
struct Gone {
    watch: std::os::fd::OwnedFd,
}

impl Gone {
    fn watch(root: &Path) -> io::Result<Self> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        // What is asked for never happens on a read-only file system; the end is told in any case.
        inotify::add_watch(&watch, root, inotify::WatchFlags::MODIFY | inotify::WatchFlags::ONLYDIR)?;
        Ok(Self { watch })
    }

    fn within(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
        loop {
            let mut reader = inotify::Reader::new(&self.watch, &mut buffer);
            match reader.next() {
                // Only the root is watched, and only its end is news.
                Ok(event)
                    if event
                        .events()
                        .intersects(inotify::ReadFlags::UNMOUNT | inotify::ReadFlags::IGNORED) =>
                {
                    return true;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) if Instant::now() < until => std::thread::sleep(LOOK),
                Err(_) => return false,
            }
        }
    }
}

fn device_of(path: &Path) -> io::Result<(u32, u32)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(CWD, path, flags, StatxFlags::TYPE)?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

/// `EROFS_SUPER_MAGIC_V1`.
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;

/// Whether EROFS is mounted at `path`. Asks the file system there, which is the kernel's own or the cache's.
fn is_erofs(path: &Path) -> io::Result<bool> {
    let directory = File::open(path)?;
    let found = rustix::fs::fstatfs(&directory)?.f_type;
    Ok(u64::try_from(found).is_ok_and(|found| found == EROFS_MAGIC))
}
