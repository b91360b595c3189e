//! Streams of every tar dialect, GNU tar's own among them, and broken ones.

use super::*;
use std::process::Command;

/// What the tests compare: name, kind, link, content.
type Seen = (String, TarKind, String, Vec<u8>);

fn read_all(tar: &[u8]) -> Result<Vec<(TarEntry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(tar);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut content = Vec::new();
        let mut buf = [0; 777];
        loop {
            match reader.read_body(&mut buf)? {
                0 => break,
                count => content.extend_from_slice(&buf[..count]),
            }
        }
        assert_eq!(content.len() as u64, entry.size);
        entries.push((entry, content));
    }
    reader.finish()?;
    Ok(entries)
}

fn seen(tar: &[u8]) -> Vec<Seen> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    read_all(tar)
        .unwrap()
        .into_iter()
        .map(|(entry, content)| (text(&entry.name), entry.kind, text(&entry.link), content))
        .collect()
}

fn tar_of(dir: &std::path::Path, args: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .current_dir(dir)
        .arg("-c")
        .args(args)
        .arg("tree")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn header(name: &str, typeflag: u8, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[156] = typeflag;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    header
}

fn padded(header: &tar::Header, body: &[u8]) -> Vec<u8> {
    let mut out = [header.as_bytes().as_slice(), body].concat();
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out
}

fn pax_entry(records: &[(&str, &str)], entry: Vec<u8>) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in records {
        pax::push(&mut body, key.as_bytes(), value.as_bytes());
    }
    [padded(&header("x", b'x', body.len() as u64), &body), entry].concat()
}

#[test]
fn every_format_of_gnu_tar_reads_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("sub")).unwrap();
    std::fs::write(tree.join("file"), vec![b'x'; 1500]).unwrap();
    std::fs::write(tree.join("empty"), b"").unwrap();
    std::os::unix::fs::symlink("file", tree.join("sub/link")).unwrap();
    let plain = seen(&tar_of(dir.path(), &["--format=v7", "--sort=name"]));
    assert_eq!(plain.len(), 5);
    std::fs::write(tree.join("n".repeat(120)), b"long").unwrap();
    std::os::unix::fs::symlink("l".repeat(150), tree.join("sub/long")).unwrap();
    std::fs::hard_link(tree.join("n".repeat(120)), tree.join("o".repeat(130))).unwrap();
    let expected = seen(&tar_of(dir.path(), &["--format=gnu", "--sort=name"]));
    assert_eq!(expected.len(), 8);
    assert!(
        expected
            .iter()
            .any(|(name, _, _, content)| name.len() == 125 && content == b"long")
    );
    for format in ["oldgnu", "posix"] {
        assert_eq!(
            seen(&tar_of(dir.path(), &[&format!("--format={format}"), "--sort=name"])),
            expected,
            "{format}"
        );
    }
}

#[test]
fn every_sparse_format_is_expanded() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("tree")).unwrap();
    let file = std::fs::File::create(dir.path().join("tree/sparse")).unwrap();
    // More holes than fit in an old header, and one at the end.
    for i in 0..60_u64 {
        file.write_all_at(&[b'a' + u8::try_from(i % 26).unwrap(); 4096], i * 65536)
            .unwrap();
    }
    file.set_len(60 * 65536 + 5).unwrap();
    let expected = std::fs::read(dir.path().join("tree/sparse")).unwrap();
    for args in [
        &["--format=gnu"][..],
        &["--sparse-version=0.0"],
        &["--sparse-version=0.1"],
        &["--sparse-version=1.0"],
    ] {
        let format = if args[0].contains("gnu") {
            "--format=gnu"
        } else {
            "--format=posix"
        };
        let tar = tar_of(dir.path(), &[&["-S", format], args].concat());
        assert!(tar.len() < expected.len() / 4, "{args:?} is not sparse");
        let entries = seen(&tar);
        assert_eq!(entries[1].0, "tree/sparse", "{args:?}");
        assert!(entries[1].3 == expected, "{args:?}");
    }
}

#[test]
fn sparse_maps_that_lie_are_refused() {
    let body = vec![7; 512];
    for records in [
        &[("GNU.sparse.size", "100"), ("GNU.sparse.map", "0,512")][..],
        &[("GNU.sparse.size", "5000"), ("GNU.sparse.map", "0,511")],
        &[("GNU.sparse.size", "5000"), ("GNU.sparse.map", "0,256,100,256")],
        &[("GNU.sparse.size", "5000"), ("GNU.sparse.map", "0,256,100")],
        &[("GNU.sparse.size", "5000"), ("GNU.sparse.map", "0,x")],
        &[
            ("GNU.sparse.size", "5000"),
            ("GNU.sparse.map", "18446744073709551615,512"),
        ],
        &[("GNU.sparse.size", "5000"), ("GNU.sparse.numbytes", "512")],
        &[("GNU.sparse.size", "9223372036854775807"), ("GNU.sparse.map", "0,512")],
        &[
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.realsize", "512"),
        ],
        &[("GNU.sparse.major", "2"), ("GNU.sparse.minor", "0")],
        &[
            ("GNU.sparse.minor", "1"),
            ("GNU.sparse.size", "512"),
            ("GNU.sparse.map", "0,512"),
        ],
        &[("GNU.sparse.map", "0,512")],
    ] {
        let tar = pax_entry(records, padded(&header("f", b'0', 512), &body));
        assert!(matches!(read_all(&tar), Err(TarError::BadField { .. })), "{records:?}");
    }
    let tar = pax_entry(
        &[("GNU.sparse.size", "2000"), ("GNU.sparse.map", "1000,512")],
        padded(&header("f", b'0', 512), &body),
    );
    let expected = [vec![0; 1000], body, vec![0; 488]].concat();
    assert_eq!(read_all(&tar).unwrap()[0].1, expected);
}

/// An entry `file` with a GNU long name and long link in front, either left out if empty.
fn gnu_entry(name: &str, link: &str, records: &[(&str, &str)], typeflag: u8) -> Vec<u8> {
    let mut tar = Vec::new();
    for (kind, text) in [(b'L', name), (b'K', link)] {
        if !text.is_empty() {
            tar.extend(padded(&header("long", kind, text.len() as u64), text.as_bytes()));
        }
    }
    let body = if typeflag == b'0' { &[7; 512][..] } else { &[] };
    tar.extend(pax_entry(
        records,
        padded(&header("file", typeflag, body.len() as u64), body),
    ));
    tar
}

#[test]
fn the_winning_name_is_go_s_and_the_others_are_gone() {
    let sparse = [("GNU.sparse.size", "512"), ("GNU.sparse.map", "0,512")];
    let named = [("path", "pax"), ("GNU.sparse.name", "sparse"), ("linkpath", "pax-link")];
    let all = [sparse.as_slice(), &named].concat();
    for (name, records, expected) in [
        ("gnu", &all[..], "sparse"),
        ("", &all, "sparse"),
        ("gnu", &sparse, "gnu"),
        ("gnu", &named, "gnu"),
        // Not a sparse file: the name of one means nothing.
        ("", &named, "pax"),
        ("", &named[1..], "file"),
        ("", &[("path", "")], "file"),
    ] {
        let entries = read_all(&gnu_entry(name, "", records, b'0')).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&entries[0].0.name),
            expected,
            "{name} {records:?}"
        );
        assert_eq!(entries[0].0.records, [], "{name} {records:?}");
    }
    for (link, records, expected) in [("gnu-link", &named[..], "gnu-link"), ("", &named, "pax-link")] {
        let entries = read_all(&gnu_entry("gnu", link, records, b'2')).unwrap();
        assert_eq!(String::from_utf8_lossy(&entries[0].0.link), expected);
        assert_eq!(
            (entries[0].0.name.as_slice(), &entries[0].0.records),
            (&b"gnu"[..], &Vec::new())
        );
    }
}

#[test]
fn pax_overrides_the_header_and_global_headers_do_not() {
    let mut global = Vec::new();
    pax::push(&mut global, b"path", b"wrong");
    pax::push(&mut global, b"comment", b"0123");
    let records = [
        ("path", "right"),
        ("uid", "4294967290"),
        ("mtime", "-1.5"),
        ("uname", "someone"),
        ("size", "3"),
        ("SCHILY.xattr.user.x", "old"),
        ("SCHILY.xattr.user.x", "new"),
        ("gname", ""),
        ("atime", "7.5"),
        ("hdrcharset", "BINARY"),
    ];
    let tar = [
        padded(&header("pax_global_header", b'g', global.len() as u64), &global),
        pax_entry(&records, padded(&header("other", b'0', 512), b"abc")),
        padded(&header("next", b'0', 0), b""),
    ]
    .concat();
    let entries = read_all(&tar).unwrap();
    let entry = &entries[0].0;
    assert_eq!(
        (entry.name.as_slice(), entry.uid, entry.size),
        (&b"right"[..], 4_294_967_290, 3)
    );
    assert_eq!(
        entry.mtime,
        Timestamp {
            seconds: -2,
            nanos: 500_000_000
        }
    );
    assert_eq!(entry.user, b"someone");
    assert_eq!(entry.xattrs, [(b"user.x".to_vec(), b"new".to_vec())]);
    assert_eq!(entry.records, [(b"atime".to_vec(), b"7.5".to_vec())]);
    assert_eq!(entries[1].0.name, b"next");
}

#[test]
fn links_and_directories_have_no_content_whatever_they_say() {
    let mut tar = padded(&header("d", b'5', 4096), b"");
    tar.extend(padded(&header("f", b'0', 1), b"1"));
    let entries = read_all(&tar).unwrap();
    assert_eq!(entries.len(), 2);
    assert_eq!((entries[0].0.size, entries[1].0.size), (0, 1));
}

#[test]
fn numbers_in_headers() {
    for (field, value) in [
        (&b"0000644\0"[..], Some(0o644)),
        (b"   644 \0", Some(0o644)),
        (b"\0\0\0\0\0\0\0\0", Some(0)),
        (b"644\0junk", Some(0o644)),
        (b"\x80\0\0\0\0\0\x01\x02", Some(258)),
        (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
        (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        (b"0000648\0", None),
        (b"-000644\0", None),
        (b"64 4\0\0\0\0", None),
        (b"777777777777777777777777", None),
    ] {
        assert_eq!(numeric(field), value, "{}", field.escape_ascii());
    }
}

#[test]
fn what_has_no_place_in_a_layer_is_named() {
    for typeflag in [b'M', b'D', b'N', b'X', b'?'] {
        let error = read_all(&padded(&header("odd", typeflag, 0), b"")).unwrap_err();
        assert!(error.to_string().contains("\"odd\" at offset 0"), "{error}");
    }
}

#[test]
fn ends_and_beginnings() {
    assert!(matches!(read_all(b""), Err(TarError::Empty)));
    assert!(read_all(&[0; 1024]).unwrap().is_empty());
    assert!(read_all(&[0; 512]).unwrap().is_empty());
    assert!(matches!(read_all(b"hello"), Err(TarError::Truncated { .. })));
    assert!(matches!(read_all(&[b'x'; 1024]), Err(TarError::NoHeader { offset: 0 })));
    // A block of zeros with an entry behind it is damage, not an end.
    let entry = padded(&header("f", b'0', 3), b"abc");
    assert!(matches!(
        read_all(&[&[0; 512], entry.as_slice()].concat()),
        Err(TarError::NoHeader { .. })
    ));
    // A stream may end with its last entry, and nowhere inside it.
    assert_eq!(read_all(&entry).unwrap().len(), 1);
    for end in 1..515 {
        let error = read_all(&entry[..end]).unwrap_err();
        assert!(matches!(error, TarError::Truncated { .. }), "{end}: {error}");
    }
    let long = [padded(&header("long", b'L', 4), b"name"), entry].concat();
    for end in 1..1024 + 515 {
        assert!(read_all(&long[..end]).is_err(), "{end}");
    }
}

#[test]
fn an_extended_header_is_never_larger_than_its_limit() {
    for typeflag in [b'x', b'g', b'L', b'K', b'V'] {
        let error = read_all(&padded(&header("h", typeflag, MAX_EXTENSION_BYTES + 1), b"")).unwrap_err();
        assert!(matches!(error, TarError::BadField { .. }), "{error}");
    }
}
