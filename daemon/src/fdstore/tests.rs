//! The client against a socket of the test's own: what goes over it, and what does not.

use std::fs::File;
use std::io::Read as _;
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::*;

fn receive(socket: &UnixDatagram) -> (String, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0; 4096];
    let parts = &mut [io::IoSliceMut::new(&mut text)];
    let got = recvmsg(
        socket,
        parts,
        &mut control,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    let descriptors = descriptors.collect();
    (String::from_utf8_lossy(&text[..got.bytes]).into_owned(), descriptors)
}

fn store(socket: &str, capacity: usize) -> Store {
    Store::new(OsStr::new(socket), capacity).unwrap().unwrap()
}

/// A supervisor's socket with a path, and a store behind it.
fn pair(capacity: usize) -> (tempfile::TempDir, UnixDatagram, Store) {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let store = store(path.to_str().unwrap(), capacity);
    (place, socket, store)
}

#[test]
fn a_descriptor_goes_with_its_name_and_is_forgotten_by_it() {
    let name = format!("hullspeed-fdstore-{}", std::process::id());
    let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let store = store(&format!("@{name}"), 3);
    let mut file = tempfile::tempfile().unwrap();
    store.keep("data-00", file.as_fd()).unwrap();
    let (text, mut descriptors) = receive(&socket);
    assert_eq!(text, "FDSTORE=1\nFDPOLL=0\nFDNAME=data-00");
    file.write_all(b"the same file").unwrap();
    let mut found = String::new();
    let mut kept = File::from(descriptors.pop().unwrap());
    std::io::Seek::rewind(&mut kept).unwrap();
    kept.read_to_string(&mut found).unwrap();
    assert_eq!((found.as_str(), descriptors.len()), ("the same file", 0));
    store.forget("data-00").unwrap();
    let (text, descriptors) = receive(&socket);
    assert_eq!(
        (text.as_str(), descriptors.len()),
        ("FDSTOREREMOVE=1\nFDNAME=data-00", 0)
    );
    assert!(store.is_empty());
}

#[test]
fn what_the_store_would_lose_is_refused() {
    let (_place, socket, store) = pair(2);
    let file = tempfile::tempfile().unwrap();
    for name in ["", "a:b", "a\nFDNAME=b", &"n".repeat(256)] {
        let error = store.keep(name, file.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        assert_eq!(store.forget(name).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    store.keep("a", file.as_fd()).unwrap();
    store.keep("a", file.as_fd()).unwrap();
    let error = store.keep("b", file.as_fd()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
    store.forget("none of it").unwrap();
    assert_eq!(store.len(), 2);
    store.forget("a").unwrap();
    store.keep("b", file.as_fd()).unwrap();
    let sent: Vec<_> = std::iter::repeat_with(|| receive(&socket).0).take(5).collect();
    assert!(
        sent.iter().all(|text| !text.contains("n".repeat(9).as_str())),
        "{sent:?}"
    );
    assert!(Store::new(OsStr::new("@x"), 0).unwrap().is_none());
}

#[test]
fn more_names_than_a_process_can_be_started_with_are_refused() {
    let (_place, socket, store) = pair(1 << 20);
    let file = tempfile::tempfile().unwrap();
    let name = "n".repeat(255);
    let mut kept = 0;
    let error = loop {
        match store.keep(&name, file.as_fd()) {
            Ok(()) => kept += 1,
            Err(error) => break error,
        }
        receive(&socket);
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
    // A process really starts with that many, and the variable's name before them.
    let names = vec![name.as_str(); kept].join(":");
    let status = std::process::Command::new("/bin/true")
        .env("LISTEN_FDNAMES", &names)
        .status();
    assert!(status.unwrap().success());
    let more = std::process::Command::new("/bin/true")
        .env("LISTEN_FDNAMES", names + &":n".repeat(600))
        .status();
    assert_eq!(more.unwrap_err().kind(), io::ErrorKind::ArgumentListTooLong);
}

#[test]
fn a_barrier_ends_when_its_descriptor_is_closed_and_not_before() {
    let (_place, socket, store) = pair(1);
    let error = store.barrier(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let (text, descriptors) = receive(&socket);
    assert_eq!((text.as_str(), descriptors.len()), ("BARRIER=1", 1));
    let reader = std::thread::spawn(move || {
        rustix::event::poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
        // The descriptor is closed here.
        (receive(&socket).0, socket)
    });
    store.barrier(Duration::from_secs(20)).unwrap();
    assert_eq!(reader.join().unwrap().0, "BARRIER=1");
}

#[test]
fn a_barrier_fails_if_the_supervisor_goes_before_it_is_read() {
    let name = format!("hullspeed-barrier-{}", std::process::id());
    let abstract_socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    let (place, socket, with_path) = pair(1);
    for (socket, store) in [(socket, with_path), (abstract_socket, store(&format!("@{name}"), 1))] {
        let supervisor = std::thread::spawn(move || {
            rustix::event::poll(&mut [PollFd::new(&socket, PollFlags::IN)], None).unwrap();
            // With the message in its queue.
            drop(socket);
        });
        let error = store.barrier(Duration::from_secs(20)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
        supervisor.join().unwrap();
    }
    drop(place);
}

#[test]
fn a_supervisor_that_is_gone_is_an_error() {
    let (place, socket, store) = pair(1);
    drop((socket, place));
    let file = tempfile::tempfile().unwrap();
    assert_eq!(
        store.keep("a", file.as_fd()).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    assert!(store.is_empty(), "what was not sent is counted");
}
