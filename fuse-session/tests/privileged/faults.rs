//! What a served mount does when handlers, callers or the mount go wrong.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fuse_session::{MountConfig, MountError, Session};
use rustix::process::{Pid, Signal, kill_process};

use super::memory::{Content, Kind, MemoryFs, Tree, pattern};
use super::{Mounted, directory, eventually, is_mounted, runtime, spawn, wait, within};

fn broken() -> MemoryFs {
    let mut tree = Tree::default();
    tree.file(1, "good", pattern(10_000));
    tree.add(1, "never", Kind::File(Content::Never), 0o644);
    tree.add(1, "panics", Kind::File(Content::Panic), 0o644);
    tree.add(1, "panics-later", Kind::File(Content::PanicLater), 0o644);
    let second = Duration::from_secs(1);
    tree.add(1, "slow", Kind::File(Content::Slow(second, pattern(4096))), 0o644);
    tree.add(
        1,
        "slow-direct",
        Kind::File(Content::SlowDirect(second, pattern(4096))),
        0o644,
    );
    tree.add(1, "too-much", Kind::File(Content::TooMuch(pattern(2 << 20))), 0o644);
    tree.add(1, "too-long", Kind::Symlink("t".repeat(5000).into()), 0o777);
    tree.build()
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn reads_well(mounted: &Mounted) {
    assert_eq!(std::fs::read(mounted.path("good")).unwrap(), pattern(10_000));
}

#[test]
fn privileged_a_killed_caller_is_freed_from_a_handler_that_never_returns() {
    let mounted = Mounted::new(broken());
    // A name that is looked up for ever, and a file whose reads bypass the page cache: both wait in the kernel,
    // unkillable, until the request is answered.
    for name in ["hang", "never"] {
        let mut child = spawn("/bin/cat", &mounted.path(name));
        eventually("a pending request", || mounted.session().pending() == 1);
        assert_eq!(wait(&mut child, Duration::from_millis(300)), None, "{name} waits");
        kill_process(pid(&child), Signal::KILL).unwrap();
        let status = wait(&mut child, Duration::from_secs(5)).expect("a killed caller dies");
        assert_eq!(status.signal(), Some(libc::SIGKILL));
        eventually("the handler dropped", || mounted.session().pending() == 0);
    }
    reads_well(&mounted);
}

#[test]
fn privileged_a_signal_that_does_not_kill_spoils_no_read() {
    let mounted = Mounted::new(broken());
    for name in ["slow-direct", "slow"] {
        // cat would hide an EINTR by trying again; sysread does not.
        let script = r#"open F, "<", $ARGV[0] or exit 8; sysread(F, $b, 4096) // exit 9; print $b"#;
        let mut child = Command::new("perl")
            .args(["-e", script])
            .arg(mounted.path(name))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("a pending request", || mounted.session().pending() == 1);
        let _ = kill_process(pid(&child), Signal::STOP);
        std::thread::sleep(Duration::from_millis(100));
        let _ = kill_process(pid(&child), Signal::CONT);
        let mut read = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut read).unwrap();
        let status = wait(&mut child, Duration::from_secs(5)).unwrap();
        assert!(status.success(), "{name}: {status}");
        assert!(read == pattern(4096), "bytes of {name}");
    }
}

#[test]
fn privileged_an_interrupted_and_later_killed_caller_is_freed() {
    let mounted = Mounted::new(broken());
    let mut child = spawn("/bin/cat", &mounted.path("never"));
    eventually("a pending request", || mounted.session().pending() == 1);
    // The kernel reports the first signal only.
    kill_process(pid(&child), Signal::STOP).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(mounted.session().pending(), 1, "a stop is no reason to give up");
    kill_process(pid(&child), Signal::KILL).unwrap();
    let status = wait(&mut child, Duration::from_secs(5)).expect("a killed caller dies");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

#[test]
fn privileged_a_panic_is_an_input_output_error() {
    let mounted = Mounted::new(broken());
    for name in ["panics", "panics-later"] {
        let path = mounted.path(name);
        let error = within(Duration::from_secs(10), move || std::fs::read(path)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
    }
    let path = mounted.path("panic");
    let error = within(Duration::from_secs(10), move || path.metadata()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(mounted.session().is_alive());
    reads_well(&mounted);
}

#[test]
fn privileged_answers_too_long_hang_nobody() {
    let mounted = Mounted::new(broken());
    let path = mounted.path("too-much");
    let read = within(Duration::from_secs(10), move || {
        let mut buffer = [0; 100];
        File::open(path).unwrap().read_exact_at(&mut buffer, 0).map(|()| buffer)
    });
    assert_eq!(read.unwrap(), pattern(2 << 20)[..100]);
    let path = mounted.path("too-long");
    let error = within(Duration::from_secs(10), move || std::fs::read_link(path)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
}

#[test]
fn privileged_a_busy_mount_is_taken_down_in_time() {
    let mut mounted = Mounted::new(broken());
    let root = mounted.root().to_owned();
    let held = File::open(mounted.path("good")).unwrap();
    let waiting = {
        let path = mounted.path("never");
        std::thread::spawn(move || std::fs::read(path))
    };
    eventually("a pending request", || mounted.session().pending() == 1);
    let session = mounted.session.take().unwrap();
    let begun = Instant::now();
    within(Duration::from_secs(20), move || session.unmount()).unwrap();
    assert!(
        begun.elapsed() >= Duration::from_millis(300),
        "who uses it gets the grace"
    );
    assert!(!is_mounted(&root));
    let error = held.read_at(&mut [0; 16], 8192).unwrap_err();
    assert!(
        matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)),
        "{error}"
    );
    let error = within(Duration::from_secs(5), move || waiting.join().unwrap()).unwrap_err();
    assert!(
        matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED)),
        "{error}"
    );
}

#[test]
fn privileged_a_failed_mount_says_why_and_leaves_nothing() {
    let runtime = runtime();
    let scratch = directory();
    let config = || MountConfig::new(runtime.handle().clone());
    let missing = scratch.path().join("missing");
    match Session::mount(broken(), &missing, config()) {
        Err(MountError::Mount {
            target,
            step: "move_mount",
            ..
        }) => assert_eq!(target, missing),
        other => panic!("{other:?}"),
    }
    let mut refusing = broken();
    refusing.refuse_init = true;
    let refused = Session::mount(refusing, scratch.path(), config());
    assert!(matches!(refused, Err(MountError::Handshake { .. })), "{refused:?}");
    let mut many = config();
    many.workers = many.workers.saturating_add(1000);
    assert!(matches!(
        Session::mount(broken(), scratch.path(), many),
        Err(MountError::Config(_))
    ));
    assert!(!is_mounted(scratch.path()) && !is_mounted(&missing));
}
