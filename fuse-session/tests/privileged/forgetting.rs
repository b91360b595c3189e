//! Pages that the kernel is made to forget, by helpers that wait in its place.

use std::path::PathBuf;
use std::time::Duration;

use fuse_session::forgetting::{Afterwards, ForgetError, Helpers};

use super::memory::{Content, Kind, Tree, pattern};
use super::succession::helper;
use super::{Mounted, directory, eventually, spawn, within};

/// Helpers that are there at once at most.
const MOST: usize = 8;

/// A file that can be read while there is a file at the path.
fn gated() -> (tempfile::TempDir, PathBuf, Mounted) {
    let place = directory();
    let gate = place.path().join("gate");
    let mut tree = Tree::default();
    let content = Content::When(gate.clone(), pattern(50_000));
    assert_eq!(tree.add(1, "gated", Kind::File(content), 0o644), 2);
    (place, gate, Mounted::new(tree.build()))
}

#[test]
fn privileged_what_was_forgotten_is_asked_for_again() {
    let (_place, gate, mounted) = gated();
    let (helpers, notifier) = (
        Helpers::new(helper, Duration::from_secs(20)),
        mounted.session().notifier(),
    );
    let forget = |inode, range| helpers.forget_pages(&notifier, inode, range, Afterwards::Over);
    std::fs::write(&gate, "").unwrap();
    let path = mounted.path("gated");
    assert_eq!(std::fs::read(&path).unwrap(), pattern(50_000));
    std::fs::remove_file(&gate).unwrap();
    // What the kernel does not know, and nothing, is forgotten already.
    forget(77, 0..4096).unwrap();
    forget(2, 4096..4096).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), pattern(50_000));
    let error = forget(2, u64::MAX - 1..u64::MAX).unwrap_err();
    // With the test harness's own exit code.
    assert!(matches!(error, ForgetError::Refused(_)), "{error}");
    forget(2, 8192..8193).unwrap();
    let reader = spawn("/bin/cat", &path);
    eventually("a question", || mounted.session().pending() > 0);
    std::fs::write(&gate, "").unwrap();
    let output = within(Duration::from_secs(10), move || reader.wait_with_output()).unwrap();
    assert_eq!(output.stdout, pattern(50_000));
    let session = within(Duration::from_secs(10), move || {
        let mut mounted = mounted;
        mounted.session.take().unwrap().unmount()
    });
    session.unwrap();
    // The session is over, and nothing is left to forget.
    helpers.forget_pages(&notifier, 2, 0..4096, Afterwards::Over).unwrap();
}

#[test]
fn privileged_helpers_that_wait_are_few_and_are_not_waited_for() {
    let (_place, gate, mounted) = gated();
    let (helpers, notifier) = (
        Helpers::new(helper, Duration::from_millis(300)),
        mounted.session().notifier(),
    );
    let forget = || helpers.forget_pages(&notifier, 2, 0..4096, Afterwards::Over);
    let reader = spawn("/bin/cat", &mounted.path("gated"));
    eventually("a question", || mounted.session().pending() > 0);
    for number in 0..MOST {
        let error = forget().unwrap_err();
        assert!(matches!(error, ForgetError::Patience(_)), "{number}: {error}");
    }
    let error = forget().unwrap_err();
    assert!(matches!(error, ForgetError::Busy), "{error}");
    std::fs::write(&gate, "").unwrap();
    let output = within(Duration::from_secs(10), move || reader.wait_with_output()).unwrap();
    assert_eq!(output.stdout, pattern(50_000));
    eventually("room for another helper", || forget().is_ok());
}
