//! Decoding: every opcode once, and anything at all many times.

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

/// A message as the kernel would send it.
pub(crate) fn message(opcode: u32, unique: u64, node: u64, arguments: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<InHeader>() + arguments.len()).unwrap();
    let header = InHeader {
        len,
        opcode,
        unique,
        nodeid: node,
        uid: 1,
        gid: 2,
        pid: 3,
        total_extlen: 0,
        padding: 0,
    };
    [header.as_bytes(), arguments].concat()
}

/// One well-formed message of each opcode that is decoded, and some that are refused.
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let read = abi::ReadIn {
        fh: 1,
        offset: 2,
        size: 4096,
        read_flags: 0,
        lock_owner: 3,
        flags: 0,
        padding: 0,
    };
    let release = abi::ReleaseIn {
        fh: 1,
        flags: 2,
        release_flags: 1,
        lock_owner: 3,
    };
    let open = abi::OpenIn {
        flags: 0,
        open_flags: 0,
    };
    let xattr = abi::GetxattrIn { size: 100, padding: 0 };
    let batch = abi::BatchForgetIn { count: 2, dummy: 0 };
    let one = abi::ForgetOne { nodeid: 5, nlookup: 1 };
    let forgets = [batch.as_bytes(), one.as_bytes(), one.as_bytes()].concat();
    let named = [xattr.as_bytes(), b"user.name\0"].concat();
    let arguments: Vec<(u32, Vec<u8>)> = vec![
        (opcode::LOOKUP, b"name\0".to_vec()),
        (opcode::FORGET, abi::ForgetIn { nlookup: 1 }.as_bytes().to_vec()),
        (opcode::BATCH_FORGET, forgets),
        (
            opcode::GETATTR,
            abi::GetattrIn {
                flags: 1,
                dummy: 0,
                fh: 9,
            }
            .as_bytes()
            .to_vec(),
        ),
        (opcode::READLINK, vec![]),
        (opcode::OPEN, open.as_bytes().to_vec()),
        (opcode::READ, read.as_bytes().to_vec()),
        (opcode::RELEASE, release.as_bytes().to_vec()),
        (opcode::STATFS, vec![]),
        (opcode::GETXATTR, named),
        (opcode::LISTXATTR, xattr.as_bytes().to_vec()),
        (
            opcode::FLUSH,
            abi::FlushIn {
                fh: 1,
                unused: 0,
                padding: 0,
                lock_owner: 2,
            }
            .as_bytes()
            .to_vec(),
        ),
        (opcode::OPENDIR, open.as_bytes().to_vec()),
        (opcode::READDIR, read.as_bytes().to_vec()),
        (opcode::READDIRPLUS, read.as_bytes().to_vec()),
        (opcode::RELEASEDIR, release.as_bytes().to_vec()),
        (
            opcode::ACCESS,
            abi::AccessIn { mask: 4, padding: 0 }.as_bytes().to_vec(),
        ),
        (
            opcode::LSEEK,
            abi::LseekIn {
                fh: 1,
                offset: 0,
                whence: 3,
                padding: 0,
            }
            .as_bytes()
            .to_vec(),
        ),
        (opcode::INTERRUPT, abi::InterruptIn { unique: 40 }.as_bytes().to_vec()),
        (opcode::DESTROY, vec![]),
        (opcode::NOTIFY_REPLY, vec![0; 40]),
        (opcode::WRITE, vec![0; 40]),
        (52, vec![0; 24]),
    ];
    (1..)
        .zip(arguments)
        .map(|(number, (opcode, arguments))| message(opcode, number * 2, 1, &arguments))
        .collect()
}

/// A sample with bytes changed, cut or added, its length field put right in most cases so that arguments are reached.
pub(crate) fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let sample = prop::sample::select(samples());
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let tail = prop::collection::vec(any::<u8>(), 0..40);
    (sample, changes, any::<prop::sample::Index>(), 0..4_u8, tail, 0..8_u8).prop_map(
        |(mut bytes, changes, cut, shape, tail, honest)| {
            for (place, value) in changes {
                let at = place.index(bytes.len());
                bytes[at] = value;
            }
            match shape {
                0 => bytes.truncate(cut.index(bytes.len()) + 1),
                1 => bytes.extend_from_slice(&tail),
                _ => {}
            }
            if honest > 0 && bytes.len() >= 4 {
                let len = u32::try_from(bytes.len()).unwrap();
                bytes[..4].copy_from_slice(&len.to_ne_bytes());
            }
            bytes
        },
    )
}

#[test]
fn every_sample_decodes_to_its_operation() {
    let decoded: Vec<String> = samples()
        .iter()
        .map(|bytes| {
            let request = Request::decode(bytes).unwrap();
            assert_eq!(
                (
                    request.caller.node,
                    request.caller.uid,
                    request.caller.gid,
                    request.caller.pid
                ),
                (1, 1, 2, 3)
            );
            let operation = format!("{:?}", request.operation);
            operation.split([' ', '(']).next().unwrap().to_owned()
        })
        .collect();
    let expected = "Lookup Forget Forget Getattr Readlink Open Read Release Statfs Getxattr Listxattr Flush Opendir \
                    Readdir Readdirplus Releasedir Access Lseek Interrupt Destroy Ignored Refused Refused";
    assert_eq!(decoded, expected.split(' ').collect::<Vec<_>>());
}

#[test]
fn arguments_arrive_unchanged() {
    let decode = |opcode, arguments: &[u8]| Request::decode(&message(opcode, 6, 77, arguments)).unwrap().operation;
    let read = abi::ReadIn {
        fh: 1,
        offset: 2,
        size: 3,
        read_flags: 0,
        lock_owner: 4,
        flags: 0,
        padding: 0,
    };
    let Operation::Read(range) = decode(opcode::READ, read.as_bytes()) else {
        panic!()
    };
    assert_eq!((range.fh, range.offset, range.size, range.lock_owner), (1, 2, 3, 4));
    let Operation::Lookup { name } = decode(opcode::LOOKUP, b"a\xff b\0trailing\0") else {
        panic!()
    };
    assert_eq!(name.as_encoded_bytes(), b"a\xff b");
    let no_handle = abi::GetattrIn {
        flags: 0,
        dummy: 0,
        fh: 9,
    };
    assert!(matches!(
        decode(opcode::GETATTR, no_handle.as_bytes()),
        Operation::Getattr { fh: None, flags: 0 }
    ));
    let Operation::Forget { nodes } = decode(opcode::FORGET, &7_u64.to_ne_bytes()) else {
        panic!()
    };
    assert_eq!(nodes, [(77, 7)]);
}

#[test]
fn every_cut_of_every_sample_is_an_error_or_a_request() {
    for sample in samples() {
        for len in 0..sample.len() {
            assert!(
                Request::decode(&sample[..len]).is_err(),
                "the length field no longer fits"
            );
            let mut honest = sample[..len].to_vec();
            if len >= 4 {
                honest[..4].copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
            }
            let _ = Request::decode(&honest);
        }
    }
}

#[test]
fn a_forget_count_beyond_the_message_is_refused_before_memory_is_taken() {
    let lie = abi::BatchForgetIn {
        count: u32::MAX,
        dummy: 0,
    };
    let error = Request::decode(&message(opcode::BATCH_FORGET, 6, 0, lie.as_bytes())).unwrap_err();
    assert!(matches!(error, DecodeError::Truncated { unique: 6, .. }));
}

#[test]
fn writing_is_refused_as_read_only_and_the_rest_as_unknown() {
    let errno = |code| match Request::decode(&message(code, 2, 1, &[])).unwrap().operation {
        Operation::Refused { errno, .. } => errno,
        other => panic!("{other:?}"),
    };
    for code in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51] {
        assert_eq!(errno(code), libc::EROFS, "{code}");
    }
    for code in [0, 7, 19, 20, 30, 31, 37, 39, 40, 48, 50, 52, 53, 4096, u32::MAX] {
        assert_eq!(errno(code), libc::ENOSYS, "{code}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn mutations_never_panic(bytes in mutated()) {
        if let Err(error) = Request::decode(&bytes) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
