//! What must not hold the keeper up, and what it says of what it cannot help.

use std::fs::File;
use std::io::Read as _;
use std::process::Stdio;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::pty::OpenptFlags;

use crate::pupil;
use crate::support::{Keeper, until};

#[test]
fn a_log_that_nobody_reads_does_not_hold_the_keeper_up() {
    let mut keeper = Keeper::with(|command, _| {
        command.arg("--").args(pupil::command()).stderr(Stdio::piped());
    });
    let mut pupil = keeper.pupil();
    let mut log = keeper.process.stderr.take().unwrap();
    // Fill the pipe from a descriptor of our own.
    let path = format!("/proc/{}/fd/2", keeper.process.id());
    let filler = rustix::fs::open(
        path,
        rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK,
        rustix::fs::Mode::empty(),
    );
    let filler = filler.unwrap();
    while rustix::io::write(&filler, &[b'\n'; 512]).is_ok() {}
    pupil.ask("say READY=1");
    pupil.kill();
    let mut pupil = keeper.pupil();
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    let mut emptied = vec![0; 1 << 20];
    assert!(log.read(&mut emptied).unwrap() > 0);
    drop(filler);
    keeper.signal(Signal::TERM);
    keeper.wait();
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"lines_dropped\":"), "{rest}");
}

/// A terminal whose other end reads nothing, as with `^S`.
#[test]
fn a_terminal_that_is_stopped_does_not_hold_the_keeper_up() {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
    let terminal = |flags| rustix::fs::open(&*name, OFlags::RDWR | OFlags::NOCTTY | flags, Mode::empty()).unwrap();
    let given = File::from(terminal(OFlags::CLOEXEC));
    let mut keeper = Keeper::with(|command, _| {
        command.arg("--").args(pupil::command()).stderr(given);
    });
    let mut pupil = keeper.pupil();
    let filler = terminal(OFlags::NONBLOCK | OFlags::CLOEXEC);
    while rustix::io::write(&filler, &[b'x'; 512]).is_ok() {}
    pupil.ask("say READY=1");
    pupil.kill();
    let mut pupil = keeper.pupil();
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    // The descriptor that the program shares is as it was.
    let flags = std::fs::read_to_string(format!("/proc/{}/fdinfo/2", pupil.process().as_raw_pid())).unwrap();
    let flags = flags.lines().find_map(|line| line.strip_prefix("flags:\t")).unwrap();
    let flags = u32::from_str_radix(flags, 8).unwrap();
    assert_eq!(flags & OFlags::NONBLOCK.bits(), 0);
    keeper.signal(Signal::TERM);
    keeper.wait();
}

#[test]
fn a_socket_that_lingers_does_not_hold_the_keeper_up() {
    let mut keeper = Keeper::start(&[]);
    let mut pupil = keeper.pupil();
    // Refused, not asked to be kept at all, and as the answer to a barrier.
    for message in ["FDSTORE=1|FDNAME=a", "STATUS=a", "BARRIER=1"] {
        assert_eq!(pupil.ask(&format!("linger {message}")), "ok");
        assert_eq!(pupil.ask("barrier 9000"), "ok", "{message}");
    }
    keeper.until_said("it is no file, no fanotify group and no /dev/fuse");
    pupil.kill();
    assert!(keeper.pupil().names().is_empty());
}

#[test]
fn a_descriptor_that_the_keeper_may_not_open_is_told() {
    let mut keeper = Keeper::start(&[]);
    let mut pupil = keeper.pupil();
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    let most = Some(keeper.descriptors() as u64);
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    rustix::process::prlimit(Some(keeper.pid()), Resource::Nofile, limit).unwrap();
    for number in 0..20 {
        pupil.ask(&format!("keep over-{number}"));
    }
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    keeper.until_said("a descriptor that should be kept is lost");
    let log = keeper.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("is lost")).collect();
    assert!(told.len() >= 15 && told[0].contains("\"name\":\"over-"), "{log}");
    assert!(
        told.last().unwrap().contains(&format!("\"lost\":{}", told.len())),
        "{log}"
    );
}

#[test]
fn a_killed_program_that_stays_is_told_and_killed_again() {
    let mut keeper = Keeper::start(&["--stop-timeout", "1"]);
    let mut pupil = keeper.pupil();
    let kept = pupil.ask("keep a");
    // The end of a traced process is its tracer's first: its parent waits as for one that the kernel holds.
    let process = pupil.process();
    trace(process);
    keeper.signal(Signal::HUP);
    let (said, number) = ("the program was killed and is still there", process.as_raw_pid());
    until("two complaints", || keeper.log().matches(said).count() >= 2);
    let log = keeper.log();
    let line = log.lines().find(|line| line.contains(said)).unwrap();
    assert!(
        line.contains(&format!("\"process\":{number}")) && line.contains("\"kills\":1"),
        "{line}"
    );
    until("its end", || {
        let ended = rustix::process::waitpid(Some(process), rustix::process::WaitOptions::NOHANG);
        ended.unwrap().is_some_and(|(_, status)| status.signaled())
    });
    assert_eq!(keeper.pupil().kept(), [kept]);
}

#[expect(unsafe_code, reason = "the kernel has no safer call for it")]
fn trace(process: Pid) {
    // SAFETY: it changes nothing in this process.
    let traced = unsafe { libc::ptrace(libc::PTRACE_SEIZE, process.as_raw_pid(), 0, 0) };
    assert_eq!(traced, 0, "{}", std::io::Error::last_os_error());
}
