//! How long the image of a layer takes to make, and how large it is: `image_speed FILES [LABELLED]`.
//!
//! The layer is made up: directories of 16 files and a subdirectory now and then, names as long as a distribution's are
//! on average. With a second argument every file has an SELinux label.

use std::hint::black_box;
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use estargz::index::{self, BlobLayout, LayerIndex};
use estargz::member::Compression;
use estargz::toc::{EntryType, Toc, TocEntry};

const FILES_IN_A_DIRECTORY: usize = 16;
const ROUNDS: usize = 51;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let files: usize = arguments.next().unwrap_or("5000".to_owned()).parse()?;
    let labelled = arguments.next().is_some();
    let mut entries = Vec::with_capacity(files);
    let mut offset = 0;
    for at in 0..files {
        let directory = at / FILES_IN_A_DIRECTORY;
        let name = format!(
            "usr/share/some-{:03}/package-{directory}/file-number-{at}.txt",
            directory / 64
        );
        let mut entry = TocEntry::new(name, EntryType::Reg);
        offset += 1000;
        (entry.mode, entry.offset, entry.size) = (0o644, offset, 1 + (at as u64 * 7919) % 60_000);
        entry.mod_time = "2024-05-06T07:08:09Z".to_owned();
        entry.chunk_digest = Some(Digest::of(offset.to_le_bytes()));
        if labelled {
            // `system_u:object_r:usr_t:s0` with its NUL.
            entry.xattrs.insert(
                "security.selinux".to_owned(),
                "c3lzdGVtX3U6b2JqZWN0X3I6dXNyX3Q6czAA".to_owned(),
            );
        }
        entries.push(entry);
    }
    let layout = BlobLayout {
        blob_size: 1 << 50,
        toc_offset: 1 << 49,
        compression: Compression::Gzip,
    };
    let toc = Toc { version: 1, entries };
    let index = LayerIndex::open(index::build(&toc, layout, Digest::of("toc"))?)?;
    drop(toc);

    let mut times = Vec::with_capacity(ROUNDS);
    let mut size = 0;
    for _ in 0..if files > 100_000 { 5 } else { ROUNDS } {
        let start = Instant::now();
        size = black_box(hullspeed_erofs::image(black_box(&index))?).len();
        times.push(start.elapsed());
    }
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or(Duration::ZERO);
    let inodes = index.inode_count();
    #[expect(clippy::print_stdout, reason = "an example that measures")]
    {
        println!(
            "{inodes} inodes: median {median:?}, {size} bytes, {} per inode",
            size / inodes as usize
        );
    }
    Ok(())
}
