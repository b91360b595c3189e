//! What is written is read back the same, whatever the tree, the chunk size and the number of threads.

use super::*;
use crate::reader::LayerBlob;
use crate::verify::verify_layer;

use proptest::prelude::*;

mod support;
use support::*;

/// Names that only eStargz has.
fn without_marks(mut nodes: Nodes) -> Nodes {
    nodes.retain(|name, _| {
        !["stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark"].contains(&name.as_str())
    });
    nodes
}

/// Converts, and checks that both views of the result are the same: unpacked, and read chunk by chunk.
fn check_round_trip(tar: &[u8], options: &BuildOptions) -> Nodes {
    let (blob, built) = convert(tar, options);
    let report = verify_layer(blob.clone(), Some(built.toc_digest), Some(built.diff_id)).unwrap();
    assert_eq!(report.blob_digest, built.blob_digest);
    assert_eq!(report.uncompressed_size, built.uncompressed_size);
    assert_eq!(
        (report.blob_size, built.blob_size),
        (blob.len() as u64, blob.len() as u64)
    );
    let layer = LayerBlob::open(blob.clone()).unwrap();
    crate::index::build(&layer.toc, layer.layout(), built.toc_digest).unwrap();
    let toc = without_marks(in_toc(&blob));
    let mut disk = without_marks(on_disk(extract(&gunzip(&blob)).path()));
    // Parents that no entry describes are what the extractor makes them.
    disk.retain(|name, node| toc.contains_key(name) || node.kind != 'd');
    if is_root() {
        assert_eq!(disk, toc);
    }
    toc
}

fn arbitrary_name() -> impl Strategy<Value = String> {
    let part = prop_oneof![4 => "[ab]", 1 => "[ü<&> ]{1,3}", 1 => Just("n".repeat(101))];
    prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"))
}

fn arbitrary_samples() -> impl Strategy<Value = Vec<Sample>> {
    let content = prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..100),
        (any::<u8>(), 400..2500_usize).prop_map(|(byte, size)| vec![byte; size]),
    ];
    let typeflag = prop_oneof![6 => Just(b'0'), 3 => Just(b'5'), 3 => Just(b'1'), 1 => Just(b'2'), 1 => Just(b'6'), 1 => Just(b'3')];
    let mode = prop_oneof![Just(0o644), Just(0o755), Just(0o4711), Just(0o1777)];
    let uid = prop_oneof![Just(0), Just(1000), Just(3_000_000_000_u64)];
    let one = (
        arbitrary_name(),
        typeflag,
        content,
        mode,
        uid,
        1..1_700_000_000_u64,
        any::<prop::sample::Index>(),
    );
    prop::collection::vec(one, 0..25).prop_map(sane)
}

type Raw = (String, u8, Vec<u8>, u32, u64, u64, prop::sample::Index);

/// Keeps what GNU tar can extract one after the other: parents are directories, links have targets.
fn sane(raw: Vec<Raw>) -> Vec<Sample> {
    let mut kinds = std::collections::BTreeMap::<String, u8>::new();
    let mut samples = Vec::new();
    for (name, typeflag, content, mode, uid, mtime, index) in raw {
        let parents = name
            .match_indices('/')
            .map(|(i, _)| name[..i].to_owned())
            .collect::<Vec<_>>();
        let blocked = parents
            .iter()
            .any(|parent| kinds.get(parent).is_some_and(|&kind| kind != b'5'));
        let files: Vec<_> = kinds
            .iter()
            .filter(|(_, kind)| **kind != b'5')
            .map(|(name, _)| name.clone())
            .collect();
        let device = typeflag == b'3' && !is_root();
        let unlinkable = typeflag == b'1' && files.is_empty();
        if blocked || device || unlinkable {
            continue;
        }
        let link = match typeflag {
            b'1' => index.get(&files).clone(),
            b'2' => "nowhere/<&>".to_owned(),
            _ => String::new(),
        };
        // A link to itself, or into the directory it replaces, has no target left.
        if typeflag == b'1' && (link == name || link.starts_with(&format!("{name}/"))) {
            continue;
        }
        if typeflag != b'5' {
            kinds.retain(|other, _| !other.starts_with(&format!("{name}/")));
        }
        for parent in parents {
            kinds.entry(parent).or_insert(b'5');
        }
        let kind = if typeflag == b'1' { kinds[&link] } else { typeflag };
        kinds.insert(name.clone(), kind);
        let content = if typeflag == b'0' { content } else { Vec::new() };
        samples.push(Sample {
            name,
            typeflag,
            link,
            content,
            mode,
            uid,
            mtime,
        });
    }
    samples
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_tree_survives(samples in arbitrary_samples(), chunk_size in 200..1500_u32, pick in any::<prop::sample::Index>()) {
        let prioritized = match samples.get(pick.index(samples.len() + 1)) {
            Some(sample) => vec![sample.name.clone().into_bytes()],
            None => Vec::new(),
        };
        let nodes = check_round_trip(&tar_of(&samples), &BuildOptions { chunk_size, prioritized, ..options(2) });
        prop_assert_eq!(nodes, extracted(&samples));
    }

    #[test]
    fn threads_do_not_matter(samples in arbitrary_samples(), chunk_size in 100..1500_u32) {
        let tar = tar_of(&samples);
        let one = convert(&tar, &BuildOptions { chunk_size, ..options(1) });
        for threads in [2, 16] {
            let other = convert(&tar, &BuildOptions { chunk_size, ..options(threads) });
            prop_assert!(other == one);
        }
    }

    /// Whatever happens to a tar, it is an error or a layer that verifies.
    #[test]
    fn damaged_tars_do_no_harm(
        samples in arbitrary_samples(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        fix_checksum in any::<bool>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut tar = tar_of(&samples);
        for (index, byte) in damage {
            let at = index.index(tar.len());
            tar[at] = byte;
            if fix_checksum {
                let start = at - at % 512;
                let mut header = tar::Header::from_byte_slice(&tar[start..start + 512]).clone();
                header.set_cksum();
                tar[start..start + 512].copy_from_slice(header.as_bytes());
            }
        }
        if let Some(cut) = cut {
            tar.truncate(cut.index(tar.len()));
        }
        let mut blob = Vec::new();
        if let Ok(built) = build(tar.as_slice(), &mut blob, &options(1)) {
            verify_layer(blob, Some(built.toc_digest), Some(built.diff_id)).unwrap();
        }
    }
}

#[test]
fn what_pax_alone_can_say_survives() {
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("file"), b"content").unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(source.path().join("file"))
        .unwrap();
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000, 123_456_789))
        .unwrap();
    let path = source.path().to_str().unwrap();
    let tar = std::process::Command::new("tar")
        .args([
            "-C",
            path,
            "--format=posix",
            "--owner=someone:4000000000",
            "--pax-option=SCHILY.xattr.user.k:=v",
        ])
        .args(["-c", "file"])
        .output()
        .unwrap()
        .stdout;
    let nodes = check_round_trip(&tar, &options(1));
    assert_eq!(nodes["file"].mtime, (1_600_000_000, 123_456_789));
    assert_eq!(nodes["file"].owner.0, 4_000_000_000);
    let (blob, _) = convert(&tar, &options(1));
    let layer = LayerBlob::open(blob.clone()).unwrap();
    let entry = layer.toc.entries.iter().find(|entry| entry.name == "file").unwrap();
    assert_eq!(entry.mod_time, "2020-09-13T12:26:40.123456789Z");
    assert_eq!(entry.user_name, "someone");
    assert_eq!(entry.xattrs["user.k"], "dg==");
    let listing = gnu_tar(&["--xattrs", "-tvv"], &gunzip(&blob));
    assert!(listing.contains("user.k"), "{listing}");
}

#[test]
fn a_name_that_lost_does_not_come_back_in_the_output() {
    let long = "n".repeat(150);
    // What `--format=gnu` writes for long names, around records that name something else.
    let block = |name: &str, typeflag: u8, body: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[156] = typeflag;
        header.set_size(body.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_cksum();
        let mut out = [header.as_bytes().as_slice(), body].concat();
        out.resize(out.len().next_multiple_of(512), 0);
        out
    };
    let mut records = Vec::new();
    for key in ["path", "linkpath", "GNU.sparse.name", "SCHILY.devmajor"] {
        crate::input::pax::push(&mut records, key.as_bytes(), b"../../elsewhere");
    }
    crate::input::pax::push(&mut records, b"comment", b"kept");
    let tar = [
        block("long", b'L', long.as_bytes()),
        block("x", b'x', &records),
        block("file", b'0', b"content"),
        block("long", b'L', b"link"),
        block("long", b'K', long.as_bytes()),
        block("x", b'x', &records),
        block("other", b'2', b""),
    ]
    .concat();
    let nodes = check_round_trip(&tar, &options(1));
    assert_eq!(nodes.keys().collect::<Vec<_>>(), ["link", long.as_str()]);
    let (blob, _) = convert(&tar, &options(1));
    let unpacked = gunzip(&blob);
    let has = |text: &[u8]| unpacked.windows(text.len()).any(|window| window == text);
    assert!(!has(b"elsewhere") && has(b"comment=kept"));
}

#[test]
fn a_sparse_file_with_a_long_name_keeps_it() {
    use std::os::unix::fs::FileExt;
    let source = tempfile::tempdir().unwrap();
    // Sorted before the stand-in of GNU tar, `d/GNUSparseFile.PID/…`, and so overridden by it if that is written too.
    let name = format!("d/{}", "A".repeat(180));
    std::fs::create_dir(source.path().join("d")).unwrap();
    let file = std::fs::File::create(source.path().join(&name)).unwrap();
    file.write_all_at(b"end", 300_000).unwrap();
    for version in ["0.0", "0.1", "1.0"] {
        let output = std::process::Command::new("tar")
            .args(["-C", source.path().to_str().unwrap(), "-S", "--format=posix"])
            .args([&format!("--sparse-version={version}"), "-c", &name])
            .output()
            .unwrap();
        assert!(output.status.success() && output.stdout.len() < 100_000, "{version}");
        let nodes = check_round_trip(&output.stdout, &options(1));
        assert_eq!(
            nodes.keys().filter(|name| name.starts_with("d/")).collect::<Vec<_>>(),
            [&name],
            "{version}"
        );
        let (blob, _) = convert(&output.stdout, &options(1));
        let listing = gnu_tar(&["-t"], &gunzip(&blob));
        assert!(
            listing.lines().any(|line| line == name) && !listing.contains("GNUSparse"),
            "{version}: {listing}"
        );
    }
}

#[test]
fn landmarks_and_order() {
    let tar = tar_of(&[dir("d/"), file("a", b"1"), file("d/b", b"2"), link("c", b'1', "d/b")]);
    let names = |prioritized: &[&str]| {
        let prioritized = prioritized.iter().map(|path| path.as_bytes().to_vec()).collect();
        let (blob, built) = convert(
            &tar,
            &BuildOptions {
                prioritized,
                ..options(1)
            },
        );
        assert_eq!(
            gnu_tar(&["-t"], &gunzip(&blob)).lines().last(),
            Some("stargz.index.json")
        );
        let layer = LayerBlob::open(blob).unwrap();
        let names: Vec<_> = layer.toc.entries.into_iter().map(|entry| entry.name).collect();
        (names.join(" "), built.missing_prioritized.len())
    };
    assert_eq!(names(&[]), (".no.prefetch.landmark d/ a d/b c".into(), 0));
    assert_eq!(names(&["/c", "x"]), ("d/ d/b c .prefetch.landmark a".into(), 1));
    assert_eq!(names(&["x"]), (".prefetch.landmark d/ a d/b c".into(), 1));
}

#[test]
fn converting_a_converted_layer_changes_nothing() {
    let tar = tar_of(&[
        dir("d/"),
        file("d/a", &[1; 5000]),
        link("b", b'1', "d/a"),
        link("s", b'2', "b"),
    ]);
    let (blob, built) = convert(
        &tar,
        &BuildOptions {
            prioritized: vec![b"b".to_vec()],
            ..options(1)
        },
    );
    let (again, _) = convert(
        &gunzip(&blob),
        &BuildOptions {
            prioritized: vec![b"b".to_vec()],
            ..options(1)
        },
    );
    assert!(blob == again);
    let plain = convert(&gunzip(&blob), &options(1));
    assert_ne!(plain.1, built);
    assert!(convert(&gunzip(&plain.0), &options(1)) == plain);
}

#[test]
fn members_begin_where_the_format_wants_them() {
    let tar = tar_of(&[
        file("a", &[b'x'; 2500]),
        file("empty", b""),
        file("b", b"y"),
        file("exact", &[b'z'; 2000]),
    ]);
    let (blob, built) = convert(
        &tar,
        &BuildOptions {
            chunk_size: 1000,
            ..options(1)
        },
    );
    let layer = LayerBlob::open(blob.clone()).unwrap();
    let seen: Vec<_> = layer
        .toc
        .entries
        .iter()
        .map(|entry| {
            (
                entry.name.as_str(),
                entry.chunk_offset,
                entry.chunk_size,
                entry.offset > 0,
                entry.digest.is_some(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            (".no.prefetch.landmark", 0, 0, true, true),
            ("a", 0, 1000, true, true),
            ("a", 1000, 1000, true, false),
            ("a", 2000, 0, true, false),
            ("empty", 0, 0, false, true),
            ("b", 0, 0, true, true),
            ("exact", 0, 1000, true, true),
            ("exact", 1000, 0, true, false),
        ]
    );
    // Header, landmark, three chunks, b, two chunks, TOC, footer.
    assert_eq!(verify_layer(blob, None, None).unwrap().members, 10);
    assert_eq!(layer.footer.toc_offset, built.toc_offset);
}

#[test]
fn many_headers_in_a_row_make_no_large_member() {
    let samples: Vec<_> = (0..1000).map(|i| dir(&format!("directory-{i}/"))).collect();
    let (blob, _) = convert(&tar_of(&samples), &options(1));
    // 1000 headers of 512 bytes in pieces of 64 KiB, and the usual four.
    assert_eq!(verify_layer(blob, None, None).unwrap().members, 7 + 4);
}

#[test]
fn errors_name_the_entry() {
    let latin = {
        let mut tar = tar_of(&[file("caf_", b"")]);
        tar[3] = 0xe9;
        let mut header = tar::Header::from_byte_slice(&tar[..512]).clone();
        header.set_cksum();
        tar[..512].copy_from_slice(header.as_bytes());
        tar
    };
    let text = |tar: &[u8], options: &BuildOptions| {
        let error = build(tar, std::io::sink(), options).unwrap_err();
        let source = std::error::Error::source(&error)
            .map(ToString::to_string)
            .unwrap_or_default();
        format!("{error}: {source}")
    };
    assert!(text(&latin, &options(1)).contains("entry \"caf\u{fffd}\" cannot be converted: its name is not UTF-8"));
    let dangling = text(&tar_of(&[link("h", b'1', "gone")]), &options(1));
    assert!(
        dangling.contains("hard link \"h\": its target \"gone\" is not in the layer"),
        "{dangling}"
    );
    assert!(text(b"", &options(1)).contains("empty"));
    let tar = tar_of(&[file("a", &[1; 3000])]);
    assert!(text(&tar[..2000], &options(1)).contains("truncated at offset 2000, inside the content of \"a\""));
    assert!(
        text(
            &tar,
            &BuildOptions {
                level: 13,
                ..options(1)
            }
        )
        .contains("deflate level 13")
    );
    assert!(
        text(
            &tar,
            &BuildOptions {
                chunk_size: 0,
                ..options(1)
            }
        )
        .contains("chunk size 0")
    );
}

#[test]
fn a_full_disk_is_an_error() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let tar = tar_of(&[file("a", &[1; 3000])]);
    assert!(matches!(
        build(tar.as_slice(), Full, &options(2)),
        Err(BuildError::Write(_))
    ));
}

#[test]
fn a_layer_larger_than_memory_allows_goes_through_the_spool_file() {
    // Noise, so that chunks stay large and the pool's limit in bytes is met.
    let mut state = 1_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    })
    .take(spool::MEMORY_BYTES * 2 + 12_345)
    .collect();
    let tar = tar_of(&[file("a", &noise), file("b", &noise[5..]), file("c", b"end")]);
    let one = convert(&tar, &options(1));
    assert!(convert(&tar, &options(3)) == one);
    assert_eq!(
        verify_layer(one.0, None, Some(one.1.diff_id)).unwrap().chunks,
        1 + 33 + 33 + 1
    );
}

/// The bytes are a promise: whoever converts the same layer with another version gets the same digests. If this test
/// fails, the change needs a note in the CHANGELOG, because caches and signatures of converted images become useless.
#[test]
fn golden_bytes() {
    let text: Vec<u8> = (0..20_000_u32)
        .flat_map(|i| format!("{} ", i * i % 977).into_bytes())
        .collect();
    let samples = [
        dir("./"),
        dir("usr/"),
        file("usr/text", &text),
        Sample {
            mode: 0o4755,
            uid: 3_000_000,
            ..file("usr/tool", &text[..5000])
        },
        link("usr/hard", b'1', "usr/text"),
        link("soft", b'2', "usr/<text>"),
        sample("usr/null", b'3'),
        file(&("long/".repeat(30) + "name"), b""),
        file("usr/.wh.gone", b""),
    ];
    let chunked = BuildOptions {
        chunk_size: 16 << 10,
        level: 6,
        prioritized: vec![b"usr/hard".to_vec()],
        ..options(2)
    };
    let (_, built) = convert(&tar_of(&samples), &chunked);
    let (_, plain) = convert(&tar_of(&samples), &BuildOptions { level: 9, ..options(2) });
    let golden: Vec<_> = [
        built.blob_digest,
        built.toc_digest,
        built.diff_id,
        plain.blob_digest,
        plain.diff_id,
    ]
    .iter()
    .map(|digest| digest.hex()[..16].to_owned())
    .collect();
    assert_eq!(
        golden,
        [
            "ec227b15e8573ef6",
            "6d326e7ab27e1b49",
            "1ec07f9de34df26a",
            "8488bb763c81b886",
            "1054726da3992651"
        ]
    );
}
