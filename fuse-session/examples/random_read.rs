//! 4 KiB random reads by four readers: our session against fuse3's own, over the same file system in memory.
//!
//! Run as root: `cargo run --release -p fuse-session --example random_read [seconds per round] [rounds] [workers]`. The rounds of
//! both alternate; what counts is the ratio, not the figures. Reads miss the page cache: its pages are dropped
//! before each round, the file is far larger than what one round reads, and read-ahead is off.

#![expect(clippy::print_stdout, reason = "an example reports to its user")]

#[path = "../tests/privileged/memory.rs"]
#[expect(dead_code, reason = "shared with the tests, which use all of it")]
mod memory;

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fuse_session::{MountConfig, Session};
use rustix::fs::{Advice, fadvise};

const READERS: u64 = 4;
const FILE_BYTES: u64 = 256 << 30;
const BLOCK_BYTES: usize = 16 << 20;
const READ_BYTES: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let seconds: u64 = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let workers: std::num::NonZeroUsize = arguments
        .next()
        .map_or(Ok(std::num::NonZeroUsize::MIN.saturating_add(3)), |text| text.parse())?;
    let mut tree = memory::Tree::default();
    let content = memory::Content::Repeated(memory::pattern(BLOCK_BYTES), FILE_BYTES);
    tree.add(1, "file", memory::Kind::File(content), 0o644);
    let fs = tree.build();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (ours, theirs) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let mut config = MountConfig::new(runtime.handle().clone());
    config.workers = workers;
    let session = Session::mount(fs.clone(), ours.path(), config)?;
    let mut options = fuse3::MountOptions::default();
    options.allow_other(true).default_permissions(true).read_only(true);
    let oracle = runtime.block_on(fuse3::raw::Session::new(options).mount(fs, theirs.path()))?;

    let mut ratios = Vec::new();
    for round in 1..=rounds {
        let theirs = round_of(theirs.path(), Duration::from_secs(seconds))?;
        let ours = round_of(ours.path(), Duration::from_secs(seconds))?;
        println!(
            "round {round}: fuse3 {theirs:.0}/s, fuse-session {ours:.0}/s, ratio {:.2}",
            ours / theirs
        );
        ratios.push(ours / theirs);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median ratio {:.2}", ratios[rounds / 2]);
    runtime.block_on(oracle.unmount())?;
    session.unmount()?;
    Ok(())
}

/// Reads per second of one round.
fn round_of(mount: &Path, length: Duration) -> Result<f64, Box<dyn Error>> {
    let path = mount.join("file");
    fadvise(File::open(&path)?, 0, None, Advice::DontNeed)?;
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Instant::now();
    std::thread::scope(|scope| -> std::io::Result<()> {
        let mut readers = Vec::new();
        for reader in 0..READERS {
            let file = File::open(&path)?;
            fadvise(&file, 0, None, Advice::Random)?;
            let (stop, reads) = (&stop, &reads);
            readers.push(scope.spawn(move || -> std::io::Result<()> {
                let mut state = (reader + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let mut buffer = [0; 4096];
                while !stop.load(Ordering::Relaxed) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let page = state % (FILE_BYTES / READ_BYTES);
                    file.read_exact_at(&mut buffer, page * READ_BYTES)?;
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        std::thread::sleep(length);
        stop.store(true, Ordering::Relaxed);
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or(Ok(())))
    })?;
    #[expect(clippy::cast_precision_loss, reason = "a rate, shown without decimals")]
    let rate = reads.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64();
    Ok(rate)
}
