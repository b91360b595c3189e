//! The keeper replaced by its own file, with its program at work.

use std::fs;
use std::path::{Path, PathBuf};

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
