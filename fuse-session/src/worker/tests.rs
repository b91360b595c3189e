//! The loop on a socket in the device's place: one packet is one message, so no kernel is needed to feed it garbage.

use std::os::fd::OwnedFd;
use std::time::Duration;

use fuse3::raw::reply::*;
use fuse3::{Errno, FileType, Result, Timestamp};
use proptest::test_runner::{Config, TestRunner};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use zerocopy::FromBytes;

use super::*;
use crate::abi::{OutHeader, opcode};
use crate::request::tests::{message, mutated};

/// Answers some operations at once, refuses others by default, waits for ever on inode 13, panics on 14.
struct Stub;

impl Stub {
    async fn misbehave(inode: u64) {
        match inode {
            13 => std::future::pending().await,
            14 => panic!("told to panic"),
            _ => {}
        }
    }

    fn attr(ino: u64) -> FileAttr {
        let time = Timestamp::new(0, 0);
        let (kind, blksize) = (FileType::RegularFile, 4096);
        FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            kind,
            perm: 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize,
        }
    }
}

impl fuse3::raw::Filesystem for Stub {
    async fn init(&self, _req: fuse3::raw::Request) -> Result<ReplyInit> {
        Err(Errno::from(libc::EIO))
    }

    async fn destroy(&self, _req: fuse3::raw::Request) {}

    async fn getattr(&self, _: fuse3::raw::Request, inode: u64, _: Option<u64>, _: u32) -> Result<ReplyAttr> {
        Self::misbehave(inode).await;
        Ok(ReplyAttr {
            ttl: Duration::MAX,
            attr: Self::attr(inode),
        })
    }

    async fn read(&self, _: fuse3::raw::Request, inode: u64, _: u64, _: u64, size: u32) -> Result<ReplyData> {
        Self::misbehave(inode).await;
        Ok(ReplyData {
            data: vec![7; 2 * size.min(4096) as usize].into(),
        })
    }

    async fn getxattr(&self, _: fuse3::raw::Request, _: u64, name: &std::ffi::OsStr, _: u32) -> Result<ReplyXAttr> {
        Ok(ReplyXAttr::Data(name.as_encoded_bytes().to_vec().into()))
    }
}

/// A worker thread and the other end of its socket.
struct Loop {
    kernel: Option<OwnedFd>,
    thread: Option<std::thread::JoinHandle<()>>,
    pending: Arc<Pending>,
    lifetime: Arc<Lifetime>,
    _runtime: tokio::runtime::Runtime,
}

impl Loop {
    fn start() -> Self {
        let (ours, kernel) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::sockopt::set_socket_timeout(
            &kernel,
            rustix::net::sockopt::Timeout::Recv,
            Some(Duration::from_secs(20)),
        )
        .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_time()
            .build()
            .unwrap();
        let pending = Arc::new(Pending::new(64, 1));
        let lifetime = Arc::new(Lifetime::new(1));
        let worker = Worker {
            index: 0,
            // No more than this one.
            roster: Arc::new(Roster::new(1, Duration::from_secs(60))),
            fs: Arc::new(Stub),
            channel: Arc::new(Channel::new(ours)),
            pending: Arc::clone(&pending),
            lifetime: Arc::clone(&lifetime),
            runtime: runtime.handle().clone(),
            // No connection has this number.
            device: DeviceNumber {
                major: 0,
                minor: u32::MAX,
            },
            can_resend: false,
            opener: None,
        };
        worker.roster.enlist();
        let thread = Some(std::thread::spawn(move || worker.run()));
        Self {
            kernel: Some(kernel),
            thread,
            pending,
            lifetime,
            _runtime: runtime,
        }
    }

    fn send(&self, message: &[u8]) {
        rustix::io::write(self.kernel.as_ref().unwrap(), message).unwrap();
    }

    fn answer(&self) -> (OutHeader, Vec<u8>) {
        let mut buffer = vec![0; 64 * 1024];
        let len = rustix::io::read(self.kernel.as_ref().unwrap(), &mut buffer[..]).expect("an answer in time");
        let (header, payload) = OutHeader::read_from_prefix(&buffer[..len]).unwrap();
        assert_eq!(
            usize::try_from(header.len),
            Ok(len),
            "the kernel refuses an answer of another length"
        );
        assert!(
            (-511..=0).contains(&header.error),
            "the kernel refuses errno {}",
            header.error
        );
        assert!(header.error == 0 || payload.is_empty(), "an error with a payload");
        (header, payload.to_vec())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(self.kernel.take());
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking() {
            assert!(ended.unwrap().is_ok());
            assert!(!self.lifetime.is_alive());
        }
    }
}

#[test]
fn mutated_requests_get_at_most_one_answer_each_and_the_loop_goes_on() {
    const SENTINEL: u64 = 0x5e47_1e1d_0000_0001;
    let looped = Loop::start();
    let getattr = [0; 16];
    let mut runner = TestRunner::new(Config {
        cases: 12_000,
        ..Config::default()
    });
    runner
        .run(&mutated(), |bytes| {
            // Inodes 13 and 14 are for the tests below.
            let node = bytes
                .get(16..24)
                .map(|node| u64::from_ne_bytes(node.try_into().unwrap()));
            if matches!(node, Some(13 | 14)) {
                return Ok(());
            }
            let unique = bytes
                .get(8..16)
                .map(|unique| u64::from_ne_bytes(unique.try_into().unwrap()));
            looped.send(&bytes);
            looped.send(&message(opcode::GETATTR, SENTINEL, 1, &getattr));
            let (first, _) = looped.answer();
            if first.unique != SENTINEL {
                assert_eq!(Some(first.unique), unique);
                assert_eq!(looped.answer().0.unique, SENTINEL);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(looped.pending.count(), 0);
}

#[test]
fn a_panic_is_answered_and_data_is_cut_to_the_size_asked_for() {
    let looped = Loop::start();
    looped.send(&message(opcode::GETATTR, 2, 14, &[0; 16]));
    let (header, _) = looped.answer();
    assert_eq!((header.unique, header.error), (2, -libc::EIO));
    let read = crate::abi::ReadIn {
        fh: 0,
        offset: 0,
        size: 100,
        read_flags: 0,
        lock_owner: 0,
        flags: 0,
        padding: 0,
    };
    looped.send(&message(opcode::READ, 4, 1, zerocopy::IntoBytes::as_bytes(&read)));
    assert_eq!(looped.answer().1, [7; 100]);
}

#[test]
fn an_interrupt_is_matched_to_its_request_or_sent_back() {
    let looped = Loop::start();
    // The thread id 2^32 - 1 cannot exist: a caller that is gone.
    let mut hangs = message(opcode::GETATTR, 20, 13, &[0; 16]);
    hangs[32..36].copy_from_slice(&u32::MAX.to_ne_bytes());
    looped.send(&hangs);
    looped.send(&message(opcode::INTERRUPT, 31, 0, &30_u64.to_ne_bytes()));
    let (header, _) = looped.answer();
    assert_eq!((header.unique, header.error), (31, -libc::EAGAIN), "no request 30");
    assert_eq!(looped.pending.count(), 1);
    looped.send(&message(opcode::INTERRUPT, 21, 0, &20_u64.to_ne_bytes()));
    let (header, _) = looped.answer();
    assert_eq!((header.unique, header.error), (20, -libc::EINTR));
}

#[test]
fn the_end_of_the_session_frees_what_is_pending() {
    let mut looped = Loop::start();
    looped.send(&message(opcode::GETATTR, 2, 13, &[0; 16]));
    while looped.pending.count() == 0 {
        std::thread::yield_now();
    }
    // The device end closes; the runtime lives on.
    looped.kernel = None;
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while looped.pending.count() > 0 {
        assert!(std::time::Instant::now() < deadline, "the pending handler is dropped");
        std::thread::yield_now();
    }
}
