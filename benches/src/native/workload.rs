//! What is done to a tree: the inside of the program `workload`, and how the figures call it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::{process, programs};
use serde::{Deserialize, Serialize};

/// What programs read at once.
const BUFFER: usize = 128 << 10;

/// A page.
const PAGE: usize = 4096;

/// Name of the program.
const PROGRAM: &str = "workload";

/// Something done to a tree.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Workload {
    /// Reads a file from its beginning to its end, in pieces of 128 KiB. Counts bytes.
    Sequential {
        /// The file.
        file: PathBuf,
        /// How often.
        #[arg(default_value_t = 1)]
        passes: usize,
    },
    /// Reads pages of a file in an order that follows nothing. Counts reads.
    Random {
        /// The file.
        file: PathBuf,
        /// How many.
        reads: u64,
    },
    /// Asks for the attributes of every path of a list. Counts paths.
    Stat {
        /// A file with a path on each line.
        list: PathBuf,
        /// How often.
        #[arg(default_value_t = 1)]
        passes: usize,
    },
    /// Lists every directory of a tree. Counts entries.
    List {
        /// The tree.
        root: PathBuf,
        /// How often.
        #[arg(default_value_t = 1)]
        passes: usize,
    },
    /// Lists every directory of a tree and asks for the attributes of everything in it. Counts entries.
    Find {
        /// The tree.
        root: PathBuf,
    },
    /// Opens, reads and closes every file of a list, several at once. Counts bytes.
    Files {
        /// A file with a path on each line.
        list: PathBuf,
        /// Readers; each takes the next file of the list.
        readers: usize,
    },
    /// Runs a program with a tree as its root until it ends. Counts bytes of its output.
    Execute {
        /// The tree.
        root: PathBuf,
        /// The program.
        program: PathBuf,
        /// Its arguments.
        arguments: Vec<String>,
    },
}

/// What a workload did.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Done {
    /// How much, in what the workload counts.
    pub amount: u64,
    /// In which time.
    pub seconds: f64,
}

impl Done {
    /// How much in a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.amount as f64 / self.seconds
    }
}

impl Workload {
    /// Does it here.
    pub fn run(&self) -> Result<Done> {
        match self {
            Self::Sequential { file, passes } => timed(|| {
                let mut buffer = vec![0; BUFFER];
                (0..*passes).try_fold(0, |sum, _| Ok(sum + read_whole(file, &mut buffer)?))
            }),
            Self::Random { file, reads } => random(file, *reads),
            Self::Stat { list, passes } => {
                let paths = lines(list)?;
                timed(|| (0..*passes).try_fold(0, |sum, _| Ok(sum + stat_all(&paths)?)))
            }
            Self::List { root, passes } => timed(|| (0..*passes).try_fold(0, |sum, _| Ok(sum + walk(root, false)?))),
            Self::Find { root } => timed(|| walk(root, true)),
            Self::Files { list, readers } => files(&lines(list)?, *readers),
            Self::Execute {
                root,
                program,
                arguments,
            } => {
                rustix::process::chroot(root).with_context(|| format!("cannot change root to {}", root.display()))?;
                std::env::set_current_dir("/")?;
                timed(|| {
                    let mut command = Command::new(program);
                    command.args(arguments).env_clear();
                    Ok(process::output(&mut command)?.len() as u64)
                })
            }
        }
    }

    /// Has the program do it, in a process of its own.
    pub fn run_apart(&self) -> Result<Done> {
        let mut command = Command::new(programs::find(PROGRAM)?);
        match self {
            Self::Sequential { file, passes } => command.arg("sequential").arg(file).arg(passes.to_string()),
            Self::Random { file, reads } => command.arg("random").arg(file).arg(reads.to_string()),
            Self::Stat { list, passes } => command.arg("stat").arg(list).arg(passes.to_string()),
            Self::List { root, passes } => command.arg("list").arg(root).arg(passes.to_string()),
            Self::Find { root } => command.arg("find").arg(root),
            Self::Files { list, readers } => command.arg("files").arg(list).arg(readers.to_string()),
            Self::Execute {
                root,
                program,
                arguments,
            } => command.args(["execute", "--"]).arg(root).arg(program).args(arguments),
        };
        let said = process::output(&mut command)?;
        let done: Done = serde_json::from_slice(&said).context("the workload did not say what it did")?;
        ensure!(done.seconds > 0.0, "the workload took no time");
        Ok(done)
    }
}

fn timed(work: impl FnOnce() -> Result<u64>) -> Result<Done> {
    let begin = Instant::now();
    let amount = work()?;
    let seconds = begin.elapsed().as_secs_f64();
    Ok(Done { amount, seconds })
}

fn lines(list: &Path) -> Result<Vec<PathBuf>> {
    let file = File::open(list).with_context(|| format!("cannot open {}", list.display()))?;
    let lines = BufReader::new(file).lines().map(|line| Ok(PathBuf::from(line?)));
    lines.collect()
}

fn read_whole(path: &Path, buffer: &mut [u8]) -> Result<u64> {
    let said = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(said)?;
    let mut sum = 0;
    loop {
        match file.read(buffer).with_context(said)? {
            0 => return Ok(sum),
            read => sum += read as u64,
        }
    }
}

fn random(path: &Path, reads: u64) -> Result<Done> {
    let said = || format!("cannot read {}", path.display());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut buffer = [0; PAGE];
    timed(|| {
        let file = File::open(path).with_context(said)?;
        let pages = file.metadata().with_context(said)?.len() / PAGE as u64;
        ensure!(pages > 0, "{} has no page", path.display());
        for _ in 0..reads {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            file.read_exact_at(&mut buffer, state % pages * PAGE as u64)
                .with_context(said)?;
        }
        Ok(reads)
    })
}

fn stat_all(paths: &[PathBuf]) -> Result<u64> {
    for path in paths {
        fs::symlink_metadata(path).with_context(|| format!("cannot stat {}", path.display()))?;
    }
    Ok(paths.len() as u64)
}

fn walk(root: &Path, stats: bool) -> Result<u64> {
    let mut directories = vec![root.to_path_buf()];
    let mut entries = 0;
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
            let entry = entry?;
            entries += 1;
            let kind = if stats {
                entry.metadata()?.file_type()
            } else {
                entry.file_type()?
            };
            if kind.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(entries)
}

fn files(paths: &[PathBuf], readers: usize) -> Result<Done> {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let read = || -> Result<u64> {
        let mut buffer = vec![0; BUFFER];
        let mut sum = 0;
        while let Some(path) = paths.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
            sum += read_whole(path, &mut buffer)?;
        }
        Ok(sum)
    };
    timed(|| {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a reader panicked")))
                .sum()
        })
    })
}
