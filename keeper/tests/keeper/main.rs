//! The keeper as its program, its operator and a stranger meet it: real processes, real signals.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

mod hardships;
mod pupil;
mod support;
mod upgrade;

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use hullspeed_keeper::handover::FORMAT;
use hullspeed_keeper::notification::{Address, Sender};
use rustix::process::Signal;

use self::support::{KEEPER, Keeper, script, until};

/// No test: the program that the others run.
#[test]
#[ignore = "run by the other tests"]
fn pupil() {
    pupil::run();
}

#[test]
fn what_is_kept_survives_a_hundred_kills_without_growth() {
    let mut keeper = Keeper::start(&[]);
    let mut pupil = keeper.pupil();
    let kept = ["fanotify", "journal", "data-00"].map(|name| pupil.ask(&format!("keep {name}")));
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    let mut before = None;
    for round in 0..100 {
        pupil.ask("say READY=1");
        // A program that lives shorter than this is started again later and later.
        std::thread::sleep(Duration::from_millis(105));
        pupil.kill();
        pupil = keeper.pupil();
        assert_eq!(pupil.kept(), kept, "round {round}");
        if round == 4 {
            before = Some((keeper.descriptors(), keeper.memory()));
        }
    }
    let (descriptors, memory) = before.unwrap();
    assert_eq!(keeper.descriptors(), descriptors);
    assert!(
        keeper.memory() <= memory + 64,
        "{memory} KiB became {}",
        keeper.memory()
    );
}

#[test]
fn what_is_sent_just_before_a_kill_is_kept() {
    let mut keeper = Keeper::start(&[]);
    let mut expected = Vec::new();
    for round in 0..8 {
        let mut pupil = keeper.pupil();
        assert_eq!(pupil.names(), expected, "round {round}");
        pupil.tell(&format!("keep-and-die last-{round}"));
        expected.push(format!("last-{round}"));
    }
    assert_eq!(keeper.pupil().names(), expected);
}

#[test]
fn listeners_come_first_and_kept_descriptors_in_their_order() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).display().to_string();
    let listen = [format!("snapshots={}", path("s")), format!("control={}", path("c"))];
    let mut keeper = Keeper::start(&["--listen", &listen[0], "--listen", &listen[1]]);
    let mut pupil = keeper.pupil();
    assert_eq!((pupil.listeners(), pupil.names().len()), ("snapshots,control", 0));
    for name in ["b", "a", "b", "two words"] {
        // The report is words.
        pupil.ask(&format!("keep {}", name.replace(' ', "~")));
    }
    pupil.ask("exit 0");
    let pupil = keeper.pupil();
    assert_eq!(
        (pupil.listeners(), pupil.names()),
        (
            "snapshots,control",
            ["b", "a", "b", "two~words"].map(str::to_owned).into()
        )
    );
    // A client of a program that is away waits; it is not refused.
    rustix::process::kill_process(pupil.process(), Signal::STOP).unwrap();
    UnixStream::connect(path("s")).unwrap();
    pupil.kill();
}

#[test]
fn what_is_forgotten_is_closed_and_what_is_sent_twice_kept_once() {
    let mut keeper = Keeper::start(&[]);
    let mut pupil = keeper.pupil();
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    let before = keeper.descriptors();
    for order in ["keep a", "again a", "again b", "keep c", "barrier 9000"] {
        assert!(!pupil.ask(order).is_empty());
    }
    assert_eq!(keeper.descriptors(), before + 2);
    for order in ["forget a", "forget nothing", "barrier 9000"] {
        assert_eq!(pupil.ask(order), "ok");
    }
    assert_eq!(keeper.descriptors(), before + 1);
    pupil.kill();
    assert_eq!(keeper.pupil().names(), ["c"]);
}

#[test]
fn a_full_store_keeps_what_it_has() {
    let mut keeper = Keeper::start(&["--max-descriptors", "2"]);
    let mut pupil = keeper.pupil();
    assert_eq!(pupil.capacity(), 2);
    for name in ["a", "b"] {
        pupil.ask(&format!("keep {name}"));
    }
    assert_eq!(pupil.ask("keep c"), "StorageFull");
    // The keeper itself refuses it too.
    for order in ["force d", "barrier 9000"] {
        assert_eq!(pupil.ask(order), "ok");
    }
    keeper.until_said("the store has room for 2 descriptors and is full");
    pupil.kill();
    assert_eq!(keeper.pupil().names(), ["a", "b"]);
}

#[test]
fn a_strangers_messages_are_refused() {
    let mut keeper = Keeper::start(&[]);
    let mut pupil = keeper.pupil();
    pupil.ask("keep a");
    pupil.ask("barrier 9000");
    let before = keeper.descriptors();
    // This process has the same user, but is not of the program's group.
    let stranger = Sender::new(Address::parse(pupil.socket().as_ref()).unwrap()).unwrap();
    let (file, probe) = std::io::pipe().unwrap();
    stranger.send(b"FDSTORE=1\nFDNAME=b", Some(probe.as_fd())).unwrap();
    stranger.send(b"FDSTOREREMOVE=1\nFDNAME=a", None).unwrap();
    stranger.send(&[b'x'; 5000], None).unwrap();
    stranger.send(b"", None).unwrap();
    drop(probe);
    // The keeper has no end of the pipe any more: this would wait otherwise.
    let mut file = file;
    assert_eq!(file.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    keeper.until_said("\"refused\":4");
    assert_eq!(keeper.descriptors(), before);
    pupil.kill();
    assert_eq!(keeper.pupil().names(), ["a"]);
}

#[test]
fn the_notification_socket_is_for_nobody_else_and_goes_with_the_keeper() {
    use std::os::unix::fs::PermissionsExt as _;

    let mut keeper = Keeper::start(&[]);
    let pupil = keeper.pupil();
    assert_eq!(keeper.sockets(), [Path::new(pupil.socket())]);
    let run = keeper.place.path().join("run");
    assert_eq!(run.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let of_keepers = sockets.lines().filter(|line| line.contains("hullspeed-keeper"));
    assert_eq!(of_keepers.filter(|line| line.contains('@')).count(), 0, "{sockets}");
    keeper.signal(Signal::TERM);
    keeper.wait();
    assert!(keeper.sockets().is_empty());
}

#[test]
fn keepers_share_a_directory_and_clear_away_what_a_killed_one_left() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("shared").display().to_string();
    let options = ["--runtime-directory", directory.as_str()];
    let start = || {
        let mut keeper = Keeper::start(&options);
        let pupil = keeper.pupil();
        (keeper, pupil)
    };
    let ((mut first, of_first), (_second, mut of_second)) = (start(), start());
    let left = Path::new(of_first.socket()).to_owned();
    first.signal(Signal::KILL);
    first.wait();
    assert!(left.exists());
    let (_third, mut of_third) = start();
    assert!(!left.exists());
    for pupil in [&mut of_second, &mut of_third] {
        assert_eq!(pupil.ask("barrier 9000"), "ok");
    }
}

#[test]
fn a_barrier_waits_for_the_keeper_and_not_for_ever() {
    let mut keeper = Keeper::start(&[]);
    let mut pupil = keeper.pupil();
    keeper.signal(Signal::STOP);
    assert_eq!(pupil.ask("barrier 100"), "TimedOut");
    keeper.signal(Signal::CONT);
    assert_eq!(pupil.ask("barrier 9000"), "ok");
}

#[test]
fn a_stop_ends_the_program_first_and_then_the_keeper() {
    let mut keeper = Keeper::start(&[]);
    let pupil = keeper.pupil();
    let process = pupil.process();
    keeper.signal(Signal::TERM);
    assert_eq!(keeper.wait().code(), Some(0));
    assert!(rustix::process::test_kill_process(process).is_err());
    let log = keeper.log();
    let places = ["stopping", "the program ended", "stopped"].map(|word| log.find(word).unwrap());
    assert!(places.is_sorted(), "{log}");
    assert!(!log.contains("is started again"), "{log}");
}

#[test]
fn a_program_that_does_not_stop_is_killed() {
    let mut keeper = Keeper::with(|command, place| {
        let path = place.join("deaf");
        script(&path, "trap '' TERM");
        command.args(["--stop-timeout", "1", "--"]).arg(path);
    });
    let _pupil = keeper.pupil();
    keeper.signal(Signal::INT);
    assert_eq!(keeper.wait().code(), Some(0));
    assert!(keeper.log().contains("did not end in time"), "{}", keeper.log());
}

#[test]
fn a_hangup_starts_what_is_at_the_programs_path_now() {
    let mut keeper = Keeper::with(|command, place| {
        script(&place.join("program"), "");
        command.arg("--").arg(place.join("program"));
    });
    let mut pupil = keeper.pupil();
    let kept = pupil.ask("keep a");
    let mark = keeper.place.path().join("mark");
    script(
        &keeper.place.path().join("program"),
        &format!("touch {}", mark.display()),
    );
    keeper.signal(Signal::HUP);
    let next = keeper.pupil();
    assert!(mark.exists(), "the old program was started");
    assert_eq!((next.kept(), next.process() == pupil.process()), (vec![kept], false));
}

#[test]
fn a_program_that_cannot_be_started_is_tried_again_and_loses_nothing() {
    let mut keeper = Keeper::with(|command, place| {
        script(&place.join("program"), "");
        command.arg("--").arg(place.join("program"));
    });
    let mut pupil = keeper.pupil();
    let kept = pupil.ask("keep a");
    let program = keeper.place.path().join("program");
    std::fs::remove_file(&program).unwrap();
    pupil.kill();
    keeper.until_said("the program cannot be started");
    keeper.until_said("exit code 127");
    script(&program, "");
    assert_eq!(keeper.pupil().kept(), [kept]);
}

#[test]
fn what_the_program_says_is_passed_on() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("outer");
    let outer = UnixDatagram::bind(&path).unwrap();
    outer.set_read_timeout(Some(support::LIMIT)).unwrap();
    let mut keeper = Keeper::with(|command, _| {
        command.env("NOTIFY_SOCKET", &path).arg("--").args(pupil::command());
    });
    let heard = || {
        let mut buffer = [0; 256];
        let length = outer.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut pupil = keeper.pupil();
    pupil.ask("say STOPPING=1|MAINPID=1|STATUS=7 layers|READY=1|WATCHDOG=1");
    assert_eq!([heard(), heard()], ["READY=1", "STATUS=7 layers"]);
    keeper.signal(Signal::TERM);
    assert_eq!(heard(), "STOPPING=1");
    keeper.wait();
}

#[test]
fn the_program_gets_usual_signals_and_nothing_but_what_is_its_own() {
    let place = tempfile::tempdir().unwrap();
    let listen = format!("a={}", place.path().join("a").display());
    let output = place.path().join("output");
    // Each looks at itself: a shell that waits for a child blocks signals for moments.
    let text = format!(
        "grep -E 'Sig(Blk|Ign)' /proc/self/status > {0}; ls /proc/self/fd >> {0}; env | grep -E '^(LISTEN|FDSTORE|NOTIFY|HULL)' >> {0}; mv {0} {0}.done; exec sleep 100",
        output.display()
    );
    let run = place.path().join("run");
    let mut keeper = Command::new(KEEPER);
    keeper
        .arg("--runtime-directory")
        .arg(&run)
        .args(["--listen", &listen, "--", "sh", "-c", &text])
        .env("NOTIFY_SOCKET", "@nobody")
        .env("LISTEN_FDS", "9");
    let mut keeper = keeper.stderr(Stdio::null()).spawn().unwrap();
    let done = output.with_extension("done");
    until("the program's output", || done.exists());
    rustix::process::kill_process(rustix::process::Pid::from_child(&keeper), Signal::TERM).unwrap();
    assert!(keeper.wait().unwrap().success());
    let found = std::fs::read_to_string(done).unwrap();
    assert!(found.contains("SigBlk:\t0000000000000000"), "{found}");
    // SIGPIPE is ignored by every Rust program, and by no other.
    let ignored = found.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & (1 << 12), 0, "{found}");
    assert!(
        found.contains("LISTEN_FDS=1\n") && found.contains("LISTEN_FDNAMES=a\n"),
        "{found}"
    );
    assert!(
        found.contains(&format!("NOTIFY_SOCKET={}/notify-", run.display())) && found.contains("FDSTORE=4096\n"),
        "{found}"
    );
    let descriptors: Vec<_> = found.lines().filter_map(|line| line.parse::<u32>().ok()).collect();
    // The 4 is the directory that is listed.
    assert_eq!(descriptors, [0, 1, 2, 3, 4], "{found}");
}

#[test]
fn mistakes_are_one_line_each_and_have_codes() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (listen, path) = (format!("a={}", file.display()), file.display().to_string());
    let run = place.path().join("run").display().to_string();
    for (arguments, code, word) in [
        (&["--none"][..], 64, "--none"),
        (&["--"], 64, "missing"),
        (&["--accepts-handover", "0", "--", "--", "true"], 64, ""),
        (
            &["--accepts-handover", FORMAT, "--", "--none", "--", "true"],
            64,
            "--none",
        ),
        (
            &["--accepts-handover", FORMAT, "--", "--stop-timeout", "3", "--", "true"],
            0,
            "",
        ),
        (
            &["--runtime-directory", &run, "--listen", &listen, "--", "true"],
            73,
            "not a socket",
        ),
        (&["--runtime-directory", &path, "--", "true"], 73, "file"),
    ] {
        let output = Command::new(KEEPER).args(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(
            said.contains(word) && said.lines().filter(|line| line.contains("hullspeed-keeper: ")).count() <= 1,
            "{said}"
        );
    }
    let output = Command::new(KEEPER)
        .env("HULLSPEED_KEEPER_HANDOVER", "x")
        .args(["--", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(71));
    for (flag, word) in [("--help", "--max-descriptors"), ("--version", "hullspeed-keeper ")] {
        let output = Command::new(KEEPER).arg(flag).output().unwrap();
        assert!(output.status.success() && String::from_utf8(output.stdout).unwrap().contains(word));
    }
}
