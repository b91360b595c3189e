//! Into a sandbox's namespace and back.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::PatchError;

/// A kind of namespace that adoption enters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Host and domain name.
    Uts,
    /// Network.
    Net,
    /// System V and POSIX IPC.
    Ipc,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Uts => "uts",
            Self::Net => "net",
            Self::Ipc => "ipc",
        }
    }

    fn link(self) -> LinkNameSpaceType {
        match self {
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Net => LinkNameSpaceType::Network,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
        }
    }
}

/// The namespaces to come back to.
#[derive(Debug)]
pub(super) struct Home {
    uts: OwnedFd,
    net: OwnedFd,
    ipc: OwnedFd,
}

impl Home {
    /// Those that the calling thread is in.
    pub(super) fn open() -> Result<Self, PatchError> {
        let open = |kind: Kind| {
            let path = Path::new("/proc/thread-self/ns").join(kind.name());
            let file = File::open(&path).map_err(PatchError::file("open", &path))?;
            Ok::<_, PatchError>(OwnedFd::from(file))
        };
        Ok(Self {
            uts: open(Kind::Uts)?,
            net: open(Kind::Net)?,
            ipc: open(Kind::Ipc)?,
        })
    }

    /// Does `work` in the namespace behind `there`, and comes back whatever becomes of it.
    pub(super) fn away<T>(
        &self,
        kind: Kind,
        there: &OwnedFd,
        work: impl FnOnce() -> Result<T, PatchError>,
    ) -> Result<T, PatchError> {
        let namespace = kind.name();
        let enter = |fd: &OwnedFd| move_into_link_name_space(fd.as_fd(), Some(kind.link()));
        enter(there).map_err(|source| PatchError::Enter { namespace, source })?;
        let done = work();
        let home = match kind {
            Kind::Uts => &self.uts,
            Kind::Net => &self.net,
            Kind::Ipc => &self.ipc,
        };
        enter(home).map_err(|source| PatchError::Leave { namespace, source })?;
        done
    }
}
