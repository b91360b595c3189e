//! A hull in hand: an ordinary sandbox that containerd made ahead, with everything open that its adoption needs.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::containerd::facts::Facts;

/// The host's table of names, which every sandbox starts with a copy of.
pub const HOST_HOSTS: &str = "/etc/hosts";

/// Largest file of the host's that we copy into a sandbox.
pub(super) const MAX_FILE_BYTES: u64 = 4 << 20;

/// Most that is read of a process's status, stat or command line.
const MAX_PROC_BYTES: u64 = 64 << 10;

/// Why a sandbox cannot serve as a hull.
#[derive(Debug, thiserror::Error)]
pub enum HullError {
    /// The id is not one of containerd's.
    #[error("{id:?} is not a sandbox id")]
    Id {
        /// The id.
        id: String,
    },
    /// A process is not there.
    #[error("cannot watch process {pid} of sandbox {id}")]
    Process {
        /// The sandbox.
        id: String,
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: rustix::io::Errno,
    },
    /// The pause process is nobody's whom we know.
    #[error("process {pid} of sandbox {id} is not the child of its shim")]
    Shim {
        /// The sandbox.
        id: String,
        /// The pause process.
        pid: i32,
    },
    /// The sandbox shares a namespace with the host.
    #[error("sandbox {id} has no {namespace} namespace of its own")]
    Shared {
        /// The sandbox.
        id: String,
        /// Which.
        namespace: &'static str,
    },
    /// A file cannot be opened or read.
    #[error("cannot open {} of sandbox {id}", path.display())]
    Open {
        /// The sandbox.
        id: String,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It died meanwhile.
    #[error("sandbox {id} died while it was opened")]
    Dead {
        /// The sandbox.
        id: String,
    },
}

/// What tells one state of a file from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Stamp {
    /// The state of the file at `path`; none if it cannot be told.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }
}

/// The namespaces of a sandbox that adoption enters.
#[derive(Debug)]
pub(super) struct Namespaces {
    pub(super) uts: OwnedFd,
    pub(super) net: OwnedFd,
    pub(super) ipc: OwnedFd,
}

/// The files of a sandbox that adoption rewrites. Containers have them mounted: they keep their inodes.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) hostname: File,
    pub(super) resolv_conf: File,
    pub(super) hosts: File,
    /// The host's file that the sandbox's is a copy of; none if it is not.
    pub(super) hosts_stamp: Option<Stamp>,
}

/// A hull. Dropping it closes its files; the sandbox itself goes through [`super::HullSource::discard`].
#[derive(Debug)]
pub struct Hull {
    /// The sandbox's id.
    pub id: String,
    /// The runtime handler that it was made for, as pods name it.
    pub runtime_handler: String,
    /// When it was opened, which is when it was made unless this process is younger.
    pub opened_at: Instant,
    pub(super) namespaces: Namespaces,
    pub(super) files: Files,
    pause: OwnedFd,
    shim: OwnedFd,
}

impl Hull {
    /// Opens sandbox `id`, whose pause process is `pid`. Blocks for some tens of microseconds.
    pub fn open(id: &str, runtime_handler: &str, pid: i32, facts: &Facts) -> Result<Self, HullError> {
        Self::open_below(id, runtime_handler, pid, &facts.root.join("sandboxes"))
    }

    fn open_below(id: &str, runtime_handler: &str, pid: i32, sandboxes: &Path) -> Result<Self, HullError> {
        let name_only = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if id.is_empty() || !id.bytes().all(name_only) {
            return Err(HullError::Id { id: id.into() });
        }
        let pause = watch(id, pid)?;
        let parent = parent_of(pid).ok_or_else(|| HullError::Dead { id: id.into() })?;
        let shim = watch(id, parent)?;
        if !is_shim(parent, id) {
            return Err(HullError::Shim { id: id.into(), pid });
        }
        let namespaces = Namespaces {
            uts: namespace(id, pid, "uts")?,
            net: namespace(id, pid, "net")?,
            ipc: namespace(id, pid, "ipc")?,
        };
        let directory = sandboxes.join(id);
        // The stamp is older than the look at both files, so a change in between is found at the next look.
        let stamp = Stamp::of(Path::new(HOST_HOSTS));
        let hosts = open_file(id, &directory, "hosts")?;
        let copied = same_content(&hosts, Path::new(HOST_HOSTS));
        let files = Files {
            hostname: open_file(id, &directory, "hostname")?,
            resolv_conf: open_file(id, &directory, "resolv.conf")?,
            hosts,
            hosts_stamp: stamp.filter(|_| copied),
        };
        let hull = Self {
            id: id.to_owned(),
            runtime_handler: runtime_handler.to_owned(),
            opened_at: Instant::now(),
            namespaces,
            files,
            pause,
            shim,
        };
        // Alive after all was opened by its number, the process is the one whose number that was.
        if hull.is_alive() && parent_of(pid) == Some(parent) {
            Ok(hull)
        } else {
            Err(HullError::Dead { id: id.into() })
        }
    }

    /// Whether pause and shim still run. Asks the kernel, does not wait.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut watched = [
            PollFd::new(&self.pause, PollFlags::IN),
            PollFd::new(&self.shim, PollFlags::IN),
        ];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A process that has ended makes its descriptor readable.
        matches!(poll(&mut watched, Some(&now)), Ok(0))
    }

    /// How long we have had it.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.opened_at.elapsed()
    }
}

fn watch(id: &str, pid: i32) -> Result<OwnedFd, HullError> {
    let failed = |source| HullError::Process {
        id: id.to_owned(),
        pid,
        source,
    };
    let process = Pid::from_raw(pid)
        .filter(|_| pid > 0)
        .ok_or(failed(rustix::io::Errno::SRCH))?;
    pidfd_open(process, PidfdFlags::empty()).map_err(failed)
}

fn read_proc(pid: i32, file: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(format!("/proc/{pid}/{file}")).ok()?;
    file.take(MAX_PROC_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// The parent of a process.
pub(crate) fn parent_of(pid: i32) -> Option<i32> {
    let stat = read_proc(pid, "stat")?;
    let stat = String::from_utf8_lossy(&stat);
    // The command's name is in parentheses and may hold any character; state and parent follow the last one.
    let behind = stat.rsplit_once(')')?.1;
    behind.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// A shim carries the id of the sandbox that it was started for in its command line.
fn is_shim(pid: i32, id: &str) -> bool {
    let Some(line) = read_proc(pid, "cmdline") else {
        return false;
    };
    let arguments: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
    let program = arguments.first().map(|program| String::from_utf8_lossy(program));
    let named = program.is_some_and(|program| {
        program
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .starts_with("containerd-shim")
    });
    named
        && arguments
            .windows(2)
            .any(|pair| pair[0] == b"-id" && pair[1] == id.as_bytes())
}

fn namespace(id: &str, pid: i32, name: &'static str) -> Result<OwnedFd, HullError> {
    let path = PathBuf::from(format!("/proc/{pid}/ns/{name}"));
    let failed = |source| HullError::Open {
        id: id.to_owned(),
        path: path.clone(),
        source,
    };
    let file = File::open(&path).map_err(failed)?;
    let theirs = file.metadata().map_err(failed)?;
    let ours = std::fs::metadata(format!("/proc/self/ns/{name}")).map_err(failed)?;
    if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
        return Err(HullError::Shared {
            id: id.to_owned(),
            namespace: name,
        });
    }
    Ok(file.into())
}

fn open_file(id: &str, directory: &Path, name: &str) -> Result<File, HullError> {
    let path = directory.join(name);
    let open = || {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(&path, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("it is not a regular file"));
        }
        Ok(file)
    };
    open().map_err(|source| HullError::Open {
        id: id.to_owned(),
        path: path.clone(),
        source,
    })
}

fn same_content(copy: &File, original: &Path) -> bool {
    let read = |file: &File| {
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let Ok(original) = File::open(original) else {
        return false;
    };
    matches!((read(copy), read(&original)), (Some(copy), Some(original)) if copy == original)
}
