//! Broken and hostile input: thousands of generated mutations of sound footers, TOC members, TOC documents and index
//! files. Each has to give a result or an error that says something, in bounded time and memory, and never a panic.
//!
//! The generator is seeded: the same mutations on every run. The bodies are those of the fuzz targets.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "../fuzz/probes.rs"]
mod probes;
#[path = "hostile/sys.rs"]
mod sys;

use std::time::{Duration, Instant};

use estargz::footer;
use estargz::index;
use estargz::member::{Compression, unfold};
use estargz::reader::LayerBlob;
use estargz::toc::{EntryType, MAX_TOC_BYTES, Toc, TocEntry, encode_member};

const LAYER: &[u8] = include_bytes!("data/reference.esgz");
/// Generous for a debug build on a busy machine; a loop or a quadratic check takes minutes.
const LONGEST: Duration = Duration::from_secs(5);
/// Most bytes held for one input of these sizes, about five times what the worst of the mutations needs. They name
/// sizes of gigabytes and more, so whoever trusts one of them goes far beyond it.
const MOST_HELD: usize = 256 << 10;
/// What the decompressor itself may need, whatever it unfolds.
const DECOMPRESSOR: usize = 1 << 20;

/// xorshift64*: enough to choose mutations.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// Bit flips, overwritten numbers, cuts, repeats and splices, up to four at once.
fn mutated(sound: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        match random.below(6) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => {
                let number = [0, 1, u64::MAX, 1 << 31, 1 << 63, random.next()][random.below(6)].to_le_bytes();
                let end = bytes.len().min(at + [1, 2, 4, 8][random.below(4)]);
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            3 => bytes.truncate(at),
            4 => {
                let end = at + random.below(bytes.len() - at).min(600);
                let piece = bytes[at..end].to_vec();
                let into = random.below(bytes.len());
                bytes.splice(into..into, piece);
            }
            _ => {
                let end = at + random.below(bytes.len() - at).min(600);
                bytes.drain(at..end);
            }
        }
    }
    bytes
}

/// Runs `work` on input number `round`, in bounded time and memory.
fn bounded<T>(round: usize, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let (result, peak) = sys::peak(work);
    assert!(start.elapsed() < LONGEST, "mutation {round} took {:?}", start.elapsed());
    assert!(peak <= MOST_HELD, "mutation {round} held {peak} bytes");
    result
}

/// Runs `probe` on `count` mutations; some must be refused, and none may take long or hold much memory.
fn assault(sounds: &[Vec<u8>], count: usize, seed: u64, mut probe: impl FnMut(&mut Vec<u8>) -> bool) {
    let mut random = Random(seed);
    let mut accepted = 0;
    for sound in sounds {
        assert!(probe(&mut sound.clone()), "the sound input is refused");
    }
    for round in 0..count {
        let mut bytes = mutated(&sounds[round % sounds.len()], &mut random);
        accepted += usize::from(bounded(round, || probe(&mut bytes)));
    }
    assert!(accepted < count, "no mutation was refused");
}

/// A TOC of our own with every kind of entry.
fn sample_toc() -> Toc {
    let digest = Some(estargz::digest::Digest::of("content"));
    let reg = |name: &str, size, offset| TocEntry {
        size,
        offset,
        chunk_digest: digest,
        ..TocEntry::new(name, EntryType::Reg)
    };
    let link = |name: &str, kind, target: &str| TocEntry {
        link_name: target.into(),
        ..TocEntry::new(name, kind)
    };
    let chunk = |chunk_offset, chunk_size, offset| TocEntry {
        chunk_offset,
        chunk_size,
        offset,
        chunk_digest: digest,
        ..TocEntry::new("a/big", EntryType::Chunk)
    };
    let entries = vec![
        reg(".prefetch.landmark", 1, 80),
        TocEntry {
            mod_time: "2024-02-29T12:34:56.5Z".into(),
            mode: 0o755,
            ..TocEntry::new("./a/", EntryType::Dir)
        },
        TocEntry {
            chunk_size: 400,
            ..reg("a/big", 1000, 200)
        },
        chunk(400, 400, 400),
        chunk(800, 0, 600),
        TocEntry {
            inner_offset: 512,
            ..reg("a/packed", 100, 800)
        },
        TocEntry {
            inner_offset: 1536,
            ..reg("a/packed2", 100, 800)
        },
        link("h1", EntryType::Hardlink, "h2"),
        link("h2", EntryType::Hardlink, "a/big"),
        link("s", EntryType::Symlink, "../<&>"),
        TocEntry {
            dev_major: 1,
            dev_minor: 5,
            ..TocEntry::new("c", EntryType::Char)
        },
        TocEntry {
            xattrs: [("user.x".into(), "AQID".into())].into(),
            ..TocEntry::new("p", EntryType::Fifo)
        },
        TocEntry::new("b/.wh.gone", EntryType::Reg),
        TocEntry::new("b/.wh..wh..opq", EntryType::Reg),
    ];
    Toc { version: 1, entries }
}

fn sound_tocs() -> Vec<Vec<u8>> {
    vec![
        sample_toc().to_json(),
        LayerBlob::open(LAYER).unwrap().toc_document.json,
    ]
}

#[test]
fn footers() {
    let legacy = [
        &b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x16\x00"[..],
        b"0000000000000003STARGZ\x01\0\0\xff\xff",
        &[0; 8],
    ]
    .concat();
    let external = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x15\0SG\x11\0STARGZEXTERNALTOC\x01\0\0\xff\xff\0\0\0\0\0\0\0\0";
    let mut storage = b"\x50\x2a\x4d\x18\x40\0\0\0".to_vec();
    storage.extend(
        [20_u64, 30, 90, 1, 60, 10, 10]
            .iter()
            .flat_map(|number| number.to_le_bytes()),
    );
    storage.extend_from_slice(b"GNUlInUx");
    let with_room = |footer: &[u8]| [&[7; 100][..], footer].concat();
    let sounds = [
        with_room(&footer::encode(60)),
        with_room(&legacy),
        with_room(external),
        with_room(&footer::zstd::encode(100, &[1; 30], 90).unwrap()),
        with_room(&storage),
    ];
    assault(&sounds, 12_000, 1, |bytes| probes::footer(bytes));
    // It points before its own beginning: it is a tail, not a blob.
    assert!(!probes::footer(&LAYER[LAYER.len() - 13_000..]));
}

#[test]
fn members() {
    let mut random = Random(2);
    let reference = LAYER[13_900..LAYER.len() - footer::FOOTER_SIZE].to_vec();
    assault(&[reference], 2000, 3, |bytes| probes::member(bytes));
    // Damage behind the compression: tar headers and padding.
    let framed = encode_member(&sample_toc().to_json());
    for round in 0..1000 {
        let member = gzip(&mutated(&framed, &mut random));
        bounded(round, || probes::member(&member));
    }
}

/// Zstd frames, as members and as TOCs.
#[test]
fn frames() {
    let json = sample_toc().to_json();
    let mut random = Random(8);
    let sounds = [
        zstd::bulk::compress(&json, 3).unwrap(),
        zstd::encode_all(&json[..], 3).unwrap(),
    ];
    assert!(sounds.iter().all(|sound| probes::frame(sound)));
    let mut refused = 0;
    for round in 0..4000 {
        let bytes = mutated(&sounds[round % 2], &mut random);
        let start = Instant::now();
        let (accepted, peak) = sys::peak(|| probes::frame(&bytes));
        assert!(start.elapsed() < LONGEST, "mutation {round} took {:?}", start.elapsed());
        // A frame that says its size is given as much room beyond what is wanted.
        assert!(peak <= MOST_HELD + DECOMPRESSOR, "mutation {round} held {peak} bytes");
        refused += usize::from(!accepted);
    }
    assert!(refused > 1000, "only {refused} refused");
}

/// Few bytes that unfold to many, or say they do.
#[test]
fn bombs() {
    const UNFOLDED: usize = 64 << 20;
    const WANTED: usize = 1 << 20;
    let bomb = gzip(&vec![0; UNFOLDED]);
    // Zeros are the end of an archive; what follows is not kept.
    let (accepted, peak) = sys::peak(|| probes::member(&bomb));
    assert!(!accepted && peak <= DECOMPRESSOR, "{peak} bytes held");
    let (_, peak) = sys::peak(|| unfold(Compression::Gzip, &bomb, WANTED, &mut Vec::new()));
    assert!(peak <= WANTED + DECOMPRESSOR, "{peak} bytes held");
    let bomb = zstd::encode_all(&vec![0; UNFOLDED][..], 3).unwrap();
    let (_, peak) = sys::peak(|| unfold(Compression::Zstd, &bomb, WANTED, &mut Vec::new()));
    assert!(peak <= WANTED + DECOMPRESSOR, "{peak} bytes held");
    // A TOC of nearly the limit, of which next to nothing is there.
    let mut framed = encode_member(b"{}");
    let mut header = tar::Header::from_byte_slice(&framed[..512]).clone();
    header.set_size(MAX_TOC_BYTES as u64 - 1);
    header.set_cksum();
    framed[..512].copy_from_slice(header.as_bytes());
    let (accepted, peak) = sys::peak(|| probes::member(&gzip(&framed)));
    assert!(!accepted && peak <= DECOMPRESSOR, "{peak} bytes held");
    // The measure itself: what is held shows.
    assert!(sys::peak(|| vec![1_u8; UNFOLDED]).1 >= UNFOLDED);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn documents() {
    assault(&sound_tocs(), 4000, 4, |bytes| probes::toc(bytes));
}

/// Sound JSON with values that mean harm.
#[test]
fn documents_with_hostile_values() {
    const VALUES: &[&str] = &[
        "0",
        "1",
        "-1",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551616",
        "1e308",
        "1e999",
        "0.5",
        "null",
        "true",
        "[]",
        "{}",
        "\"\"",
        "\"/\"",
        "\"..\"",
        "\"a\"",
        "\"a/big\"",
        "\"h1\"",
        "\"h2\"",
        "\"./\"",
        "\".wh.\"",
        "\".wh...\"",
        "\".wh.a\"",
        "\"a/.wh..wh..opq\"",
        "\"a\\u0000b\"",
        "\"\\ud800\"",
        "\"reg\"",
        "\"dir\"",
        "\"chunk\"",
        "\"hardlink\"",
        "\"symlink\"",
        "\"char\"",
        "\"9999-99-99T99:99:99Z\"",
        "\"sha256:00\"",
        "{\"user.a\":\"!\"}",
        "{\"\":\"\"}",
        "[[[[[[[[]]]]]]]]",
        "4096",
        "8388607",
        "8388608",
        "67108864",
        "67108865",
    ];
    let mut random = Random(5);
    let mut accepted = 0;
    let sounds: Vec<String> = sound_tocs()
        .into_iter()
        .map(|json| String::from_utf8(json).unwrap())
        .collect();
    for round in 0..6000 {
        let mut lines: Vec<String> = sounds[round % 2].lines().map(String::from).collect();
        for _ in 0..=random.below(3) {
            let at = random.below(lines.len());
            let Some((key, value)) = lines[at].split_once(": ") else {
                continue;
            };
            let comma = if value.ends_with(',') { "," } else { "" };
            lines[at] = format!("{key}: {}{comma}", random.pick(VALUES));
        }
        let json = lines.join("\n");
        accepted += usize::from(bounded(round, || probes::toc(json.as_bytes())));
    }
    assert!((1..6000).contains(&accepted), "{accepted} accepted");
}

#[test]
fn index_files() {
    let sound = |(json, compression): (Vec<u8>, Compression)| {
        let layout = index::BlobLayout {
            blob_size: 1 << 24,
            toc_offset: 1 << 23,
            compression,
        };
        index::build(&Toc::parse(&json).unwrap(), layout, estargz::digest::Digest::of(json)).unwrap()
    };
    let sounds: Vec<_> = sound_tocs()
        .into_iter()
        .zip([Compression::Gzip, Compression::Zstd])
        .map(sound)
        .collect();
    assault(&sounds, 1000, 6, |bytes| probes::index(bytes));
    // With the checksum made right, the damage meets the checks of every record.
    let mut refused = 0;
    assault(&sounds, 12_000, 7, |bytes| {
        probes::seal_index(bytes);
        let accepted = probes::index(bytes);
        refused += usize::from(!accepted);
        accepted
    });
    assert!(refused > 3000, "only {refused} refused");
}
