//! Listeners as a service manager leaves them, with real descriptors.

use std::os::fd::{AsRawFd as _, IntoRawFd as _};
use std::os::unix::net::UnixStream;

use super::*;

fn announced(count: &str, names: &str) -> Announced {
    Announced {
        process: Some(std::process::id().to_string()),
        count: Some(count.to_owned()),
        names: Some(names.to_owned()),
    }
}

#[test]
fn a_listener_is_taken_over_and_answers() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("s");
    let first = UnixListener::bind(&path).unwrap();
    let descriptor = first.into_raw_fd();
    let mut inherited = Inherited::starting_at(descriptor, &announced("1", "cri")).unwrap();
    let listener = inherited.listener("cri").unwrap();
    assert_eq!(inherited.left().count(), 0);
    let _client = UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
    // It does not block, as tokio wants it.
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // No child gets what was inherited.
    let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).unwrap();
    let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert_ne!(flags & libc::O_CLOEXEC, 0);
}

#[test]
fn a_listener_goes_by_its_name_and_the_only_one_by_any() {
    let place = tempfile::tempdir().unwrap();
    let bind = |name| UnixListener::bind(place.path().join(name)).unwrap();
    let mut inherited = Inherited {
        listeners: vec![("a".to_owned(), bind("a")), ("b".to_owned(), bind("b"))],
    };
    assert!(inherited.listener("c").is_none(), "one of several was guessed");
    let found = inherited.listener("b").unwrap();
    assert_eq!(
        found.local_addr().unwrap().as_pathname(),
        Some(place.path().join("b").as_path())
    );
    assert_eq!(inherited.left().collect::<Vec<_>>(), ["a"]);
    assert!(inherited.listener("hullspeed-prewarm.socket").is_some());
    assert!(inherited.listener("a").is_none());
}

#[test]
fn what_is_meant_for_another_process_is_left_alone() {
    for process in [None, Some("1"), Some(""), Some("x")] {
        let announced = Announced {
            process: process.map(str::to_owned),
            ..announced("1", "cri")
        };
        assert_eq!(Inherited::take(&announced).unwrap().listeners.len(), 0);
    }
    let nothing = Announced {
        count: None,
        ..announced("", "")
    };
    assert_eq!(Inherited::take(&nothing).unwrap().listeners.len(), 0);
}

#[test]
fn what_is_no_listener_is_refused() {
    for count in ["", "x", "-1", "33", "4294967296"] {
        let error = Inherited::take(&announced(count, "")).unwrap_err();
        assert!(matches!(error, ActivationError::Number(_)), "{error}");
    }
    // No descriptor has this number.
    let error = Inherited::starting_at(1 << 20, &announced("1", "")).unwrap_err();
    assert!(matches!(error, ActivationError::Descriptor { .. }), "{error}");
    let file = tempfile::tempfile().unwrap();
    let (stream, _peer) = UnixStream::pair().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for descriptor in [file.as_raw_fd(), stream.as_raw_fd(), tcp.as_raw_fd()] {
        let error = Inherited::starting_at(descriptor, &announced("1", "")).unwrap_err();
        assert!(matches!(error, ActivationError::NotAListener { .. }), "{error}");
    }
}
