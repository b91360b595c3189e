//! Handing a served mount from one process to the next: taking a kept connection up, and leaving one behind.
//!
//! A connection lives as long as somebody holds its descriptor. What the kernel sent and nobody answered stays with the
//! connection and is sent again on request, so a process may be killed at any moment; its successor needs the descriptor, the
//! device number and what was negotiated. Node ids have to mean the same to both.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use fuse3::raw::Filesystem;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::{Session, initialise};
use crate::channel::Channel;
use crate::control;
use crate::mount::{self, DeviceNumber, MountConfig, MountError};
use crate::negotiate::Negotiated;

/// Device number of `/dev/fuse`.
const FUSE_DEVICE: (u32, u32) = (10, 229);

impl Session {
    /// Serves a connection that another process began to serve and no process serves now: no mount, no handshake.
    ///
    /// `device` is the descriptor that process had (or a duplicate: never another one opened on the device), `number` and
    /// `negotiated` are what its session said. Requests that were read by predecessors and not answered come first. Where the
    /// kernel cannot send them again ([`Negotiated::can_resend`]) they wait for ever; what is asked from now on is answered.
    ///
    /// The file system's `init` is called as for a new mount. Workers, limits and read-ahead are those of `config`, whatever the
    /// predecessor's were; what was fixed when the file system was mounted (name, who may see it, capabilities) stays. Blocks
    /// for `init` only, and asks nothing of the mount.
    ///
    /// # Errors
    /// When `device` is no descriptor of a living connection ([`MountError::Kept`]): then nothing is touched. And as for
    /// [`Session::mount`]: then the connection is ended, as [`crate::end`] does it, since who uses the mount would wait for ever;
    /// the dead mount stays at `target`. That another mount is at `target` by now is no error: those who use this one are served
    /// ([`Session::is_shown`]).
    pub fn resume<FS>(
        fs: FS,
        device: OwnedFd,
        target: &Path,
        number: DeviceNumber,
        negotiated: Negotiated,
        config: MountConfig,
    ) -> Result<Self, MountError>
    where
        FS: Filesystem + Send + Sync + 'static,
    {
        check_descriptor(device.as_fd(), number).map_err(MountError::Kept)?;
        let target = std::path::absolute(target).unwrap_or_else(|_| target.to_owned());
        let channel = Arc::new(Channel::new(device));
        let taken = Self::take_up(fs, Arc::clone(&channel), &target, number, negotiated, config);
        if taken.is_err() {
            match channel.abort(number) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    tracing::error!(mount_point = %target.display(), %errno, "who uses a mount that cannot be served waits");
                }
            }
        }
        taken
    }

    fn take_up<FS>(
        fs: FS,
        channel: Arc<Channel>,
        target: &Path,
        number: DeviceNumber,
        negotiated: Negotiated,
        config: MountConfig,
    ) -> Result<Self, MountError>
    where
        FS: Filesystem + Send + Sync + 'static,
    {
        config.check()?;
        let fs = Arc::new(fs);
        initialise(&fs, fuse3::raw::Request::default(), &config.runtime).map_err(|errno| MountError::Handshake {
            target: target.to_owned(),
            source: crate::HandshakeError::Refused(errno),
        })?;
        if negotiated.passes_through() && config.passthrough.is_none() {
            tracing::warn!(mount_point = %target.display(), "open modes are not kept: files in use may not open again");
        }
        let config = adapted(config, number, &negotiated);
        let session = Self::serve(fs, channel, target.to_owned(), number, negotiated, &config)?;
        if negotiated.can_resend()
            && let Err(errno) = session.channel.resend()
        {
            tracing::warn!(mount_point = %session.target.display(), %errno, "requests of a predecessor are not sent again");
        }
        tracing::debug!(mount_point = %session.target.display(), minor = number.minor, "resumed");
        Ok(session)
    }

    /// Stops serving in this process and leaves the mount and the connection to a successor.
    ///
    /// Nothing that is in flight is answered any more, with data or with an error: the successor gets it again. Handlers that
    /// wait are dropped. The file system's `destroy` is not called. Threads that block in a read of the device are woken; one that
    /// cannot be stays until the process exits, and what it may still read it gives back. [`Session::closed`] resolves to
    /// [`crate::End::Left`].
    ///
    /// Somebody else must hold a duplicate of the descriptor (`as_fd`) or the connection ends with this one. Where the kernel
    /// cannot send requests again ([`Negotiated::can_resend`]), what is in flight is lost: unmount instead.
    pub fn leave(mut self) {
        // First of all, so that handlers which fail because the process ends tell nobody.
        self.channel.silence();
        self.unmounted = true;
        self.lifetime.abandon();
        self.pending.end();
        self.roster.wake_up(&self.channel, self.lifetime.running());
        // They are not joined: some may wait for ever.
        drop(self.roster.take_threads());
        tracing::debug!(mount_point = %self.target.display(), minor = self.device.minor, "left to a successor");
    }
}

/// Ends a kept connection that nobody can serve again, whatever is mounted of it: those who use it would wait for ever.
///
/// # Errors
/// When `device` is no descriptor of that living connection ([`MountError::Kept`]), or the kernel refuses ([`MountError::End`]).
pub fn end(device: OwnedFd, number: DeviceNumber) -> Result<(), MountError> {
    check_descriptor(device.as_fd(), number).map_err(MountError::Kept)?;
    match Channel::new(device).abort(number) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(MountError::End(errno)),
    }
}

/// Fits the configuration to a connection that was made with another one, and the connection to the configuration.
fn adapted(mut config: MountConfig, number: DeviceNumber, negotiated: &Negotiated) -> MountConfig {
    mount::set_read_ahead(number, config.read_ahead_kib);
    let agreed = negotiated.max_background();
    match control::set_max_background(number, config.max_background) {
        Ok(()) => {}
        Err(errno) if agreed == config.max_background => tracing::debug!(%errno, "background limit not looked at"),
        Err(errno) => {
            tracing::warn!(%errno, agreed, "the kernel's limit of background requests stays");
        }
    }
    // So much may be in flight already, whatever the limit is now.
    config.max_pending = config.max_pending.max(usize::from(agreed));
    config
}

/// Whether `device` can be served: what is handed over may be anything.
fn check_descriptor(device: BorrowedFd<'_>, number: DeviceNumber) -> Result<(), &'static str> {
    let Ok(stat) = rustix::fs::fstat(device) else {
        return Err("it cannot be examined");
    };
    let is_device = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice;
    if !is_device || (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) != FUSE_DEVICE {
        return Err("it is no descriptor of the FUSE device");
    }
    let mut polled = [PollFd::new(&device, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut polled, Some(&now)) {
        Ok(_) if polled[0].revents().contains(PollFlags::ERR) => return Err("its connection is over"),
        Ok(_) | Err(Errno::INTR) => {}
        Err(_) => return Err("it cannot be polled"),
    }
    match control::connection_of(device) {
        Some(minor) if minor != number.minor => Err("it belongs to another connection"),
        // Kernels before 6.18 do not say which one.
        _ => Ok(()),
    }
}
