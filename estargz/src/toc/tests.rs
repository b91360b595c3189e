//! Form, limits and messages of the TOC reader, and the spelling of the writer.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// What Go's encoder prints for the same document, written down by hand from its rules.
const GO_JSON: &str = "{\n\t\"version\": 1,\n\t\"entries\": [\n\t\t{\n\t\t\t\"name\": \"a\\u003cb\\u003e\\u0026\\u2028\\u2029é\\\"\\\\\\n\\r\\t\\b\\f\\u0001\\u001f\u{7f}\",\n\t\t\t\"type\": \"reg\",\n\t\t\t\"size\": 5,\n\t\t\t\"modtime\": \"2024-02-29T12:34:56Z\",\n\t\t\t\"mode\": 493,\n\t\t\t\"offset\": 120,\n\t\t\t\"xattrs\": {\n\t\t\t\t\"user.\\u0026\": \"AQI=\",\n\t\t\t\t\"user.b\": \"\"\n\t\t\t},\n\t\t\t\"digest\": \"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\"\n\t\t},\n\t\t{\n\t\t\t\"name\": \"\",\n\t\t\t\"type\": \"dir\"\n\t\t}\n\t]\n}";

fn go_toc() -> Toc {
    let mut file = TocEntry::new(
        "a<b>&\u{2028}\u{2029}é\"\\\n\r\t\u{8}\u{c}\u{1}\u{1f}\u{7f}",
        EntryType::Reg,
    );
    file.size = 5;
    file.mod_time = "2024-02-29T12:34:56Z".into();
    file.mode = 0o755;
    file.offset = 120;
    file.xattrs = [
        ("user.b".into(), encode_xattr(b"")),
        ("user.&".into(), encode_xattr(&[1, 2])),
    ]
    .into();
    file.digest = Some(Digest::of(b""));
    Toc {
        version: 1,
        entries: vec![file, TocEntry::new("", EntryType::Dir)],
    }
}

#[test]
fn json_is_spelled_as_go_spells_it() {
    assert_eq!(String::from_utf8(go_toc().to_json()).unwrap(), GO_JSON);
    assert_eq!(Toc::parse(GO_JSON.as_bytes()).unwrap(), go_toc());
    let empty = Toc {
        version: 1,
        entries: vec![],
    };
    assert_eq!(empty.to_json(), b"{\n\t\"version\": 1,\n\t\"entries\": []\n}");
}

#[test]
fn every_field_comes_back() {
    let mut entry = TocEntry::new("n", EntryType::Chunk);
    let numbers = [
        &mut entry.size,
        &mut entry.mode,
        &mut entry.uid,
        &mut entry.gid,
        &mut entry.offset,
        &mut entry.inner_offset,
        &mut entry.dev_major,
        &mut entry.dev_minor,
        &mut entry.chunk_offset,
        &mut entry.chunk_size,
    ];
    for (at, number) in numbers.into_iter().enumerate() {
        *number = at as u64 + 1;
    }
    entry.mod_time = "t".into();
    entry.link_name = "l".into();
    entry.user_name = "u".into();
    entry.group_name = "g".into();
    entry.xattrs.insert("x".into(), "eA==".into());
    entry.digest = Some(Digest::of(b"d"));
    entry.chunk_digest = Some(Digest::of(b"c"));
    let toc = Toc {
        version: 1,
        entries: vec![entry],
    };
    let json = toc.to_json();
    assert_eq!(Toc::parse(&json).unwrap(), toc);
    let keys: Vec<_> = String::from_utf8(json)
        .unwrap()
        .lines()
        .filter_map(|l| l.trim().split('"').nth(1).map(String::from))
        .collect();
    assert_eq!(
        keys.join(" "),
        "version entries name type size modtime linkName mode uid gid userName groupName offset innerOffset devMajor \
         devMinor xattrs x digest chunkOffset chunkSize chunkDigest"
    );
}

#[test]
fn what_go_would_accept_is_accepted() {
    let reg = |json: &str| {
        Toc::parse(format!(r#"{{"version":1,"entries":[{{"type":"reg",{json}}}]}}"#).as_bytes())
            .unwrap()
            .entries
            .remove(0)
    };
    for json in [
        r#"{"version":1,"entries":null}"#,
        r#"{"version":1}"#,
        r#"{"entries":[],"VERSION":1,"more":[{"a":[1.5,null]}]}"#,
    ] {
        assert_eq!(Toc::parse(json.as_bytes()).unwrap().entries, []);
    }
    let entry =
        reg(r#""NumLink":3,"name":null,"size":null,"xattrs":{"user.a":null},"digest":"","modtime":null,"x":{"y":[]}"#);
    let mut want = TocEntry::new("", EntryType::Reg);
    want.xattrs.insert("user.a".into(), String::new());
    assert_eq!(entry, want);
    assert_eq!(reg(r#""Name":"a","NAME":"b","SIZE":7,"chunkoffset":2"#).name, "b");
    assert_eq!(reg(r#""size":9223372036854775807"#).size, i64::MAX as u64);
}

#[test]
fn faults_name_entry_and_field() {
    let long = "n".repeat(MAX_PATH_BYTES + 1);
    let dir =
        |json: &str| format!(r#"{{"version":1,"entries":[{{"name":"ok","type":"dir"}},{{"type":"dir",{json}}}]}}"#);
    for (json, want) in [
        (
            dir(r#""size":-1"#),
            "entry 1 of the TOC is not valid at field `size`: invalid value: integer `-1`, expected a whole number from 0 to 9223372036854775807",
        ),
        (
            dir(r#""uid":9223372036854775808"#),
            "entry 1 of the TOC is not valid at field `uid`: invalid value: integer `9223372036854775808`",
        ),
        (
            dir(r#""gid":1e400"#),
            "entry 1 of the TOC is not valid at field `gid`: number out of range",
        ),
        (
            dir(r#""mode":1.5"#),
            "entry 1 of the TOC is not valid at field `mode`: invalid type: floating point `1.5`",
        ),
        (
            dir(r#""offset":"7""#),
            "entry 1 of the TOC is not valid at field `offset`: invalid type: string \"7\"",
        ),
        (
            dir(r#""chunkDigest":"sha256:00""#),
            "entry 1 of the TOC is not valid at field `chunkDigest`: \"sha256:00\" is not a digest",
        ),
        (
            dir(r#""digest":"md5:00""#),
            "entry 1 of the TOC is not valid at field `digest`: \"md5:00\" is not a digest",
        ),
        (
            dir(r#""xattrs":[1]"#),
            "entry 1 of the TOC is not valid at field `xattrs`: invalid type: sequence",
        ),
        (
            dir(&format!(r#""name":"{long}""#)),
            "entry 1 of the TOC is not valid at field `name`: 4097 bytes of text, the limit is 4096",
        ),
        (
            dir(&format!(r#""xattrs":{{"{}":""}}"#, &long[..256])),
            "entry 1 of the TOC is not valid at field `xattrs`: beyond the limits of 255 bytes for a name",
        ),
        (
            dir(&format!(r#""xattrs":{{"a":"{}"}}"#, "A".repeat(87_385))),
            "entry 1 of the TOC is not valid at field `xattrs`: beyond the limits",
        ),
        (
            dir(r#""type":"socket""#),
            "entry 1 of the TOC is not valid at field `type`: \"socket\" is no entry type",
        ),
        (
            dir(r#""type":null"#),
            "entry 1 of the TOC is not valid at field `type`: missing field `type`",
        ),
        (
            r#"{"version":1,"entries":[7]}"#.into(),
            "entry 0 of the TOC is not valid at field `name`: invalid type: integer `7`, expected an entry object",
        ),
        (
            r#"{"version":1,"entries":{}}"#.into(),
            "the TOC is not a JSON document of the expected form: invalid type: map, expected an array",
        ),
        (
            r#"{"version":2,"entries":[]}"#.into(),
            "the TOC is of version 2; only version 1 is known",
        ),
        (
            "null".into(),
            "the TOC is not a JSON document of the expected form: invalid type: null",
        ),
        (
            r#"{"version":1}x"#.into(),
            "the TOC is not a JSON document of the expected form: trailing characters at line 1 column 14",
        ),
        (
            String::new(),
            "the TOC is not a JSON document of the expected form: EOF",
        ),
        (
            "[".repeat(100_000),
            "the TOC is not a JSON document of the expected form: invalid type: sequence",
        ),
    ] {
        let error = error_chain(&Toc::parse(json.as_bytes()).unwrap_err());
        assert!(error.starts_with(want), "{error}\n{want}");
    }
}

#[test]
fn the_entry_limit_stops_the_reader() {
    let mut json = br#"{"version":1,"entries":["#.to_vec();
    for _ in 0..=MAX_ENTRIES {
        json.extend_from_slice(br#"{"type":"dir"},"#);
    }
    let error = error_chain(&Toc::parse(&json).unwrap_err());
    assert!(
        error.starts_with("entry 1048576 of the TOC is not valid at field `type`: more than 1048576 entries"),
        "{error}"
    );
}

#[test]
fn a_member_comes_back() {
    let json = go_toc().to_json();
    let tar = encode_member(&json);
    assert_eq!(tar.len() % 512, 0);
    let member = gzip(&tar);
    let document = parse_member(&member).unwrap();
    assert_eq!(
        document,
        TocDocument {
            digest: Digest::of(&json),
            json
        }
    );
}

#[test]
fn members_that_hold_something_else_are_named() {
    let json = b"{}".as_slice();
    let mut renamed = encode_member(json);
    let other = {
        let mut header = tar::Header::new_ustar();
        header.set_path("etc/passwd").unwrap();
        header.set_size(2);
        header.set_cksum();
        [header.as_bytes(), &renamed[512..]].concat()
    };
    renamed[0] = b'S';
    let claims_more = {
        let mut header = tar::Header::new_ustar();
        header.set_path(TOC_TAR_NAME).unwrap();
        header.set_size(MAX_TOC_BYTES as u64 + 1);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let mut bad_checksum = gzip(&encode_member(json));
    let at = bad_checksum.len() - 6;
    bad_checksum[at] ^= 1;
    for (member, want) in [
        (
            gzip(&other),
            "the TOC member begins with the tar entry \"etc/passwd\" instead of \"stargz.index.json\"",
        ),
        (
            gzip(b""),
            "the TOC member begins with the tar entry \"\" instead of \"stargz.index.json\"",
        ),
        (
            gzip(&[0; 1024]),
            "the TOC member begins with the tar entry \"\" instead of \"stargz.index.json\"",
        ),
        (
            gzip(&claims_more),
            "the TOC is larger than the limit of 268435456 bytes (uncompressed)",
        ),
        (gzip(&renamed), "the TOC member of"),
        (gzip(&encode_member(json)[..513]), "the TOC member of"),
        (bad_checksum, "the TOC member of"),
        (
            b"junk of more than ten bytes".to_vec(),
            "the TOC member of 27 bytes is not a sound gzip member that holds a tar entry: invalid gzip header",
        ),
        (
            vec![],
            "the TOC member of 0 bytes is not a sound gzip member that holds a tar entry: ",
        ),
    ] {
        let error = error_chain(&parse_member(&member).unwrap_err());
        assert!(error.starts_with(want), "{error}\n{want}");
    }
}

#[test]
fn a_member_that_never_ends_is_cut() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    let mut header = tar::Header::new_ustar();
    header.set_path(TOC_TAR_NAME).unwrap();
    header.set_size(1);
    header.set_cksum();
    encoder.write_all(header.as_bytes()).unwrap();
    let zeros = vec![0; 1 << 20];
    for _ in 0..3 {
        encoder.write_all(&zeros).unwrap();
    }
    let bomb = encoder.finish().unwrap();
    // Half of the compressed bytes are enough: what lies far behind the entry is neither kept nor unfolded.
    let document = parse_member(&bomb[..bomb.len() / 2]).unwrap();
    assert_eq!(document.json, [0]);
}

#[test]
fn xattr_values_are_base64() {
    for value in [&b""[..], b"\x00\xff", b"abc"] {
        assert_eq!(decode_xattr(&encode_xattr(value)).unwrap(), value);
    }
    assert_eq!(decode_xattr("***"), None);
}

#[test]
fn names_are_cleaned() {
    for (name, want) in [
        ("", ""),
        ("/", ""),
        ("./", ""),
        ("..", ""),
        ("a", "a"),
        ("./a//b/", "a/b"),
        ("/a/./b", "a/b"),
        ("../x", "x"),
        ("a/../../b", "b"),
        ("a/b/..", "a"),
        ("a/...", "a/..."),
    ] {
        assert_eq!(clean_path(name).join("/"), want, "{name:?}");
    }
}
