//! The keeper replaced by its own file, with its program at work.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hullspeed_keeper::handover::FORMAT;
use rustix::process::Signal;

use crate::pupil;
use crate::support::{KEEPER, Keeper, until};

/// A copy of the keeper that can be replaced, and the keeper that runs from it.
fn from_copy(place: &Path) -> (PathBuf, Keeper) {
    let program = place.join("keeper");
    fs::copy(KEEPER, &program).unwrap();
    let keeper = Keeper::of(&program, |command, _| {
        command.arg("--").args(pupil::command());
    });
    (program, keeper)
}

fn inode(path: impl AsRef<Path>) -> u64 {
    use std::os::unix::fs::MetadataExt as _;

    fs::metadata(path).unwrap().ino()
}

fn replace(program: &Path, with: &str) {
    let aside = program.with_extension("new");
    fs::copy(with, &aside).unwrap();
    fs::rename(&aside, program).unwrap();
}

/// How often a keeper began.
fn beginnings(keeper: &Keeper) -> usize {
    keeper.log().matches("\"message\":\"keeping\"").count()
}

#[test]
fn an_upgraded_keeper_has_its_program_and_everything_that_was_kept() {
    let place = tempfile::tempdir().unwrap();
    let (program, mut keeper) = from_copy(place.path());
    let mut pupil = keeper.pupil();
    let mut kept = vec![pupil.ask("keep before")];
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    let descriptors = keeper.descriptors();
    for round in 1..=10 {
        replace(&program, KEEPER);
        keeper.signal(Signal::USR1);
        // Sent while one keeper becomes the other.
        kept.extend((0..5).map(|number| pupil.ask(&format!("keep {round}-{number}"))));
        until("the next keeper", || beginnings(&keeper) == round + 1);
        assert_eq!(inode(format!("/proc/{}/exe", keeper.process.id())), inode(&program));
    }
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    assert_eq!(keeper.sockets(), [Path::new(pupil.socket())]);
    assert_eq!(keeper.descriptors(), descriptors + 50);
    assert_eq!(
        keeper.log().matches("the program is started").count(),
        1,
        "{}",
        keeper.log()
    );
    // Its end is noticed, and its successor has it all.
    pupil.kill();
    assert_eq!(keeper.pupil().kept(), kept);
    keeper.signal(Signal::TERM);
    assert_eq!(keeper.wait().code(), Some(0));
    assert!(keeper.sockets().is_empty());
}

#[test]
fn the_new_keeper_is_asked_about_the_whole_command_line() {
    let place = tempfile::tempdir().unwrap();
    let program = place.path().join("keeper");
    fs::copy(KEEPER, &program).unwrap();
    let said = place.path().join("said");
    let mut keeper = Keeper::of(&program, |command, _| {
        command.args(["--stop-timeout", "7", "--"]).args(pupil::command());
        command.stdout(fs::File::create(&said).unwrap());
    });
    let _pupil = keeper.pupil();
    // It repeats what it is asked, and agrees to everything; then it is the keeper, and that is the end of it.
    replace(&program, "/bin/echo");
    keeper.signal(Signal::USR1);
    keeper.wait();
    let said = fs::read_to_string(&said).unwrap();
    let run = keeper.place.path().join("run").display().to_string();
    let asked = format!("--accepts-handover {FORMAT} -- --runtime-directory {run} --stop-timeout 7 -- ");
    // What it was asked about is what it was started with.
    let lines: Vec<_> = said.lines().filter(|line| line.starts_with("--")).collect();
    let [question, start] = lines[..] else { panic!("{said}") };
    assert!(question.starts_with(&asked), "{said}");
    assert_eq!(
        question.strip_prefix(&format!("--accepts-handover {FORMAT} -- ")),
        Some(start)
    );
}

#[test]
fn what_was_not_asked_is_never_started() {
    let place = tempfile::tempdir().unwrap();
    let (program, mut keeper) = from_copy(place.path());
    let mut pupil = keeper.pupil();
    let kept = pupil.ask("keep a");
    let files = ["good", "bad"].map(|name| place.path().join(name));
    for (file, source) in files.iter().zip([KEEPER, "/bin/false"]) {
        fs::copy(source, file).unwrap();
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let aside = program.with_extension("new");
            // Bounded, or a failure of the other thread would be waited for in vain.
            for file in files.iter().cycle().take(50_000) {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                fs::hard_link(file, &aside).unwrap();
                fs::rename(&aside, &program).unwrap();
                // Renaming one name of a file to another does nothing.
                let _ = fs::remove_file(&aside);
                std::thread::sleep(Duration::from_micros(700));
            }
        });
        for round in 1..=60 {
            keeper.signal(Signal::USR1);
            until("an answer", || {
                let log = keeper.log();
                assert!(keeper.process.try_wait().unwrap().is_none(), "round {round}: {log}");
                beginnings(&keeper) - 1 + log.matches("is not replaced and goes on").count() >= round
            });
        }
        over.store(true, Ordering::Relaxed);
    });
    assert!(
        beginnings(&keeper) > 1 && keeper.log().contains("is not replaced"),
        "{}",
        keeper.log()
    );
    pupil.kill();
    assert_eq!(keeper.pupil().kept(), [kept]);
}

#[test]
fn a_program_that_ends_during_an_upgrade_is_started_again() {
    let place = tempfile::tempdir().unwrap();
    let (_program, mut keeper) = from_copy(place.path());
    let mut expected = Vec::new();
    for round in 0..10 {
        let mut pupil = keeper.pupil();
        assert_eq!(pupil.names(), expected, "round {round}");
        keeper.signal(Signal::USR1);
        pupil.tell(&format!("keep-and-die {round}"));
        expected.push(round.to_string());
    }
    assert_eq!(keeper.pupil().names(), expected);
    until("the last keeper", || beginnings(&keeper) > 1);
}

#[test]
fn a_keeper_that_could_not_go_on_is_not_started() {
    let place = tempfile::tempdir().unwrap();
    let (program, mut keeper) = from_copy(place.path());
    let mut pupil = keeper.pupil();
    let kept = pupil.ask("keep a");
    for broken in ["/bin/false", "/etc/hostname"] {
        replace(&program, broken);
        keeper.signal(Signal::USR1);
        until("refusal", || {
            keeper.log().matches("is not replaced and goes on").count() == 1 + usize::from(broken != "/bin/false")
        });
    }
    fs::remove_file(&program).unwrap();
    keeper.signal(Signal::USR1);
    until("refusal", || {
        keeper.log().matches("is not replaced and goes on").count() == 3
    });
    assert_eq!(pupil.ask("barrier 9000"), "ok");
    pupil.kill();
    assert_eq!(keeper.pupil().kept(), [kept]);
    assert_eq!(beginnings(&keeper), 1);
}
