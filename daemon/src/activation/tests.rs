//! What a service manager leaves, with real descriptors.

use std::fs::File;
use std::os::fd::IntoRawFd as _;
use std::os::unix::net::UnixStream;

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};

use super::*;

fn announced(count: &str, names: &str) -> Announced {
    Announced {
        process: Some(std::process::id().to_string()),
        count: Some(count.to_owned()),
        names: Some(names.to_owned()),
    }
}

/// Leaves these from `first` on as exec would, and takes them over. Each test has numbers of its own.
fn inherit(first: RawFd, descriptors: Vec<OwnedFd>, names: &str) -> Result<Inherited, ActivationError> {
    let count = descriptors.len().to_string();
    for (number, descriptor) in (first..).zip(descriptors) {
        let placed = fcntl_dupfd_cloexec(descriptor, number).unwrap();
        fcntl_setfd(&placed, FdFlags::empty()).unwrap();
        assert_eq!(placed.into_raw_fd(), number);
    }
    Inherited::starting_at(first, &announced(&count, names))
}

fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

#[test]
fn a_listener_is_taken_over_and_answers() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("s");
    let first = UnixListener::bind(&path).unwrap();
    let mut inherited = inherit(400, vec![first.into()], "cri").unwrap();
    let listener = inherited.listener("cri").unwrap();
    assert_eq!((inherited.left().count(), inherited.kept_names().count()), (0, 0));
    let _client = UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
    // It does not block, as tokio wants it.
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // No child gets what was inherited.
    assert_eq!(fcntl_getfd(&listener).unwrap(), FdFlags::CLOEXEC);
}

#[test]
fn a_listener_goes_by_its_name_and_the_only_one_by_any() {
    let place = tempfile::tempdir().unwrap();
    let bind = |name| UnixListener::bind(place.path().join(name)).unwrap();
    let mut inherited = Inherited::from_listeners([("a".to_owned(), bind("a")), ("b".to_owned(), bind("b"))]);
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
fn what_is_kept_goes_by_its_name_and_several_may_have_one() {
    use rustix::fs::fstat;

    let place = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(place.path().join("s")).unwrap();
    let (stream, _peer) = UnixStream::pair().unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let files = [file(), file(), file()];
    let inodes = files.each_ref().map(|file| fstat(file).unwrap().st_ino);
    let [one, two, three] = files;
    let all = vec![one, listener.into(), two, stream.into(), tcp.into(), three];
    let mut inherited = inherit(420, all, "data:cri:other:data:tcp").unwrap();
    let names: Vec<_> = inherited.kept_names().collect();
    assert_eq!(names, ["data", "other", "data", "tcp", "stored"]);
    let first = inherited.take_kept("data").unwrap();
    assert_eq!(fstat(&first).unwrap().st_ino, inodes[0]);
    assert_eq!(fcntl_getfd(&first).unwrap(), FdFlags::CLOEXEC);
    let second = inherited.take_kept("data").unwrap();
    assert!(rustix::net::sockopt::socket_type(second).is_ok());
    assert!(inherited.take_kept("data").is_none());
    assert_eq!(fstat(inherited.take_kept("stored").unwrap()).unwrap().st_ino, inodes[2]);
    assert_eq!(inherited.kept_names().collect::<Vec<_>>(), ["other", "tcp"]);
    assert_eq!(inherited.left().collect::<Vec<_>>(), ["cri"]);
    let error = inherited.only_listeners().unwrap_err();
    assert!(error.to_string().contains("\"other\""), "{error}");
}

#[test]
fn thousands_of_descriptors_are_taken_over() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: limit.maximum,
            ..limit
        },
    )
    .unwrap();
    let file = File::from(file());
    let all = std::iter::repeat_with(|| file.try_clone().unwrap().into())
        .take(5000)
        .collect();
    let names = (0..5000).map(|number| number.to_string()).collect::<Vec<_>>().join(":");
    let mut inherited = inherit(10_000, all, &names).unwrap();
    assert_eq!(inherited.kept_names().count(), 5000);
    assert!(inherited.take_kept("4999").is_some());
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
fn numbers_that_were_not_left_to_this_process_are_refused() {
    for count in ["", "x", "-1", "65537", "4294967296"] {
        let error = Inherited::take(&announced(count, "")).unwrap_err();
        assert!(matches!(error, ActivationError::Number(_)), "{error}");
    }
    // No descriptor has this number.
    let error = Inherited::starting_at(1 << 20, &announced("1", "")).unwrap_err();
    assert!(matches!(error, ActivationError::Descriptor { .. }), "{error}");
    // One of this process's own, which stays open.
    let own = fcntl_dupfd_cloexec(file(), 440).unwrap();
    let error = Inherited::starting_at(440, &announced("1", "")).unwrap_err();
    assert!(matches!(error, ActivationError::Descriptor { .. }), "{error}");
    rustix::fs::fstat(&own).unwrap();
    // What was taken once is not taken again.
    let taken = inherit(441, vec![file()], "a").unwrap();
    let error = Inherited::starting_at(441, &announced("1", "")).unwrap_err();
    assert!(matches!(error, ActivationError::Descriptor { .. }), "{error}");
    assert_eq!(taken.kept_names().count(), 1);
}
