//! The contest itself, which the project's figures hold, too. The rounds of both sessions alternate. Reads miss the page cache: its
//! pages are dropped before each round, the file is far larger than what one round reads, and read-ahead is off.

use std::error::Error;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fuse_session::{MountConfig, Session};
use rustix::fs::{Advice, fadvise};

#[path = "bare.rs"]
mod bare;
#[path = "../../tests/privileged/memory.rs"]
#[expect(dead_code, reason = "shared with the tests, which use all of it")]
mod memory;

const READERS: u64 = 4;
const FILE_BYTES: u64 = 256 << 30;
const BLOCK_BYTES: usize = 16 << 20;
const READ_BYTES: u64 = 4096;

/// Reads per second of one round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    /// Through our session.
    pub(crate) ours: f64,
    /// Through fuse3's.
    pub(crate) theirs: f64,
    /// Through a loop that reads a request and writes the same page as its answer: what the kernel leaves to be won.
    pub(crate) bare: f64,
}

/// Holds the contest, the three in turn; ours has its default number of workers if none is named. Reads that are direct bring nothing into the page
/// cache: what the kernel takes for a new page is then no part of what is compared.
pub(crate) fn hold(
    length: Duration,
    rounds: usize,
    workers: Option<NonZeroUsize>,
    reads_are_direct: bool,
) -> Result<Vec<Round>, Box<dyn Error + Send + Sync>> {
    let mut tree = memory::Tree::default();
    let content = memory::Content::Repeated(memory::pattern(BLOCK_BYTES), FILE_BYTES);
    tree.add(1, "file", memory::Kind::File(content), 0o644);
    let fs = tree.build();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (ours, theirs, bare) = (tempfile::tempdir()?, tempfile::tempdir()?, tempfile::tempdir()?);
    let mut config = MountConfig::new(runtime.handle().clone());
    config.workers = workers.unwrap_or(config.workers);
    let session = Session::mount(fs.clone(), ours.path(), config)?;
    let config = MountConfig::new(runtime.handle().clone());
    let _bare = bare::Mounted::serve(Session::mount(fs.clone(), bare.path(), config)?)?;
    let mut options = fuse3::MountOptions::default();
    options.allow_other(true).default_permissions(true).read_only(true);
    let oracle = runtime.block_on(fuse3::raw::Session::new(options).mount(fs, theirs.path()))?;
    let held = (0..rounds)
        .map(|_| {
            let theirs = round_of(theirs.path(), length, reads_are_direct)?;
            let ours = round_of(ours.path(), length, reads_are_direct)?;
            let bare = round_of(bare.path(), length, reads_are_direct)?;
            Ok(Round { ours, theirs, bare })
        })
        .collect();
    runtime.block_on(oracle.unmount())?;
    session.unmount()?;
    held
}

/// Reads per second of one round.
fn round_of(mount: &Path, length: Duration, reads_are_direct: bool) -> Result<f64, Box<dyn Error + Send + Sync>> {
    let path = mount.join("file");
    fadvise(File::open(&path)?, 0, None, Advice::DontNeed)?;
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Instant::now();
    std::thread::scope(|scope| -> std::io::Result<()> {
        let mut readers = Vec::new();
        for reader in 0..READERS {
            let flags = if reads_are_direct { libc::O_DIRECT } else { 0 };
            let file = File::options().read(true).custom_flags(flags).open(&path)?;
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
