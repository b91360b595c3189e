//! The session against the real kernel. Needs root and `/dev/fuse`, and fails without them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "privileged/behaviour.rs"]
mod behaviour;
#[path = "privileged/differential.rs"]
mod differential;
#[path = "privileged/faults.rs"]
mod faults;
#[path = "privileged/forgetting.rs"]
mod forgetting;
#[path = "privileged/memory.rs"]
mod memory;
#[path = "privileged/passthrough.rs"]
mod passthrough;
#[path = "privileged/rights.rs"]
mod rights;
#[path = "privileged/succession.rs"]
mod succession;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use fuse_session::{MountConfig, Session};
use memory::MemoryFs;
use tokio::runtime::Runtime;

/// A mounted session with what it needs; unmounts before it removes the directory.
struct Mounted {
    session: Option<Session>,
    runtime: Runtime,
    directory: tempfile::TempDir,
}

impl Mounted {
    fn new(fs: MemoryFs) -> Self {
        Self::with(fs, |_| {})
    }

    fn with(fs: MemoryFs, change: impl FnOnce(&mut MountConfig)) -> Self {
        let runtime = runtime();
        let directory = directory();
        let mut config = MountConfig::new(runtime.handle().clone());
        config.unmount_grace = Duration::from_millis(300);
        change(&mut config);
        let session = Session::mount(fs, directory.path(), config).expect("mounting needs root and /dev/fuse");
        Self {
            session: Some(session),
            runtime,
            directory,
        }
    }

    fn session(&self) -> &Session {
        self.session.as_ref().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn root(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        drop(self.session.take());
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

fn directory() -> tempfile::TempDir {
    assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
    assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse");
    tempfile::Builder::new()
        .prefix("fuse-session-")
        .tempdir_in("/tmp")
        .unwrap()
}

/// Runs `work` and fails if it takes longer than `limit`; what hangs is left behind on its thread.
fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(limit).expect("finishes in time, without a panic")
}

fn spawn(program: impl AsRef<Path>, argument: &Path) -> Child {
    Command::new(program.as_ref())
        .arg(argument)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    None
}

/// Waits until `condition` holds.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}
