//! The run directory: the one place where a run keeps everything, and the guard that takes everything away.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::process::{Process, Spawner};
use crate::sweep::{RunNames, sweep};

/// Longest path of a Unix socket below the run directory, without its end; the kernel allows 108 bytes in all.
const MAX_DIRECTORY_BYTES: usize = 64;

/// How long [`RunDir::abort`] goes on while what it takes away comes back.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// Passes in a row that have to find nothing, and the pause after each.
const ABORT_QUIET_PASSES: u32 = 2;
const ABORT_PAUSE: Duration = Duration::from_millis(50);

/// A run's directory, locked while the run lasts. Dropping it sweeps the run and removes the directory.
///
/// Declare it before everything that is started in it: what is declared later is dropped first.
pub struct RunDir {
    path: PathBuf,
    names: RunNames,
    spawner: Spawner,
    keep_files: bool,
    _lock: File,
    _parent: Option<tempfile::TempDir>,
}

impl RunDir {
    /// Takes `path` for a run. What an earlier run left there is swept; a live run there is refused.
    pub fn open(path: &Path) -> Result<Self> {
        Self::with_parent(path, None)
    }

    /// Like [`Self::open`]; but where Unix sockets would not fit below `path`, the run takes a directory in `/var/tmp`
    /// that is named after it, so that the next run for the same path finds and sweeps what this one may leave.
    pub fn open_near(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).with_context(|| format!("cannot resolve {}", path.display()))?;
        if path.as_os_str().len() <= MAX_DIRECTORY_BYTES {
            return Self::open(&path);
        }
        let digest = hex::encode(Sha256::digest(path.as_os_str().as_bytes()));
        Self::open(
            &Path::new("/var/tmp")
                .join(format!("hullspeed-{}", &digest[..12]))
                .join("run"),
        )
    }

    /// A fresh directory below the system's temporary one.
    pub fn temporary() -> Result<Self> {
        let parent = tempfile::Builder::new()
            .prefix("hullspeed-")
            .tempdir()
            .context("no temporary directory")?;
        let path = parent.path().join("run");
        Self::with_parent(&path, Some(parent))
    }

    fn with_parent(path: &Path, parent: Option<tempfile::TempDir>) -> Result<Self> {
        let outer = path.parent().context("the run directory needs a parent")?;
        fs::create_dir_all(outer).with_context(|| format!("cannot create {}", outer.display()))?;
        let outer = outer
            .canonicalize()
            .with_context(|| format!("cannot resolve {}", outer.display()))?;
        let path = outer.join(path.file_name().context("the run directory needs a name")?);
        let length = path.as_os_str().len();
        if length > MAX_DIRECTORY_BYTES {
            bail!(
                "{} is too long for Unix sockets in it ({length} > {MAX_DIRECTORY_BYTES} bytes); use a shorter path",
                path.display()
            );
        }
        let lock = lock(&path)?;
        sweep(&path).with_context(|| format!("cannot sweep what an earlier run left in {}", path.display()))?;
        remove_tree(&path)?;
        fs::create_dir_all(path.join("logs")).with_context(|| format!("cannot create {}", path.display()))?;
        let names = RunNames::new(&path);
        Ok(Self {
            path,
            names,
            spawner: Spawner::start()?,
            keep_files: false,
            _lock: lock,
            _parent: parent,
        })
    }

    /// Keeps logs and state on disk when the run ends, to look at a failure. Processes and mounts go all the same.
    pub fn keep_files(&mut self, keep: bool) {
        self.keep_files = keep;
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the things outside the directory.
    #[must_use]
    pub fn names(&self) -> &RunNames {
        &self.names
    }

    /// A directory below the run's, created.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }

    /// Starts a child whose output goes to `logs/<name>.log`.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        let log = self.path.join("logs").join(format!("{name}.log"));
        Process::spawn(&self.spawner, &self.path, name, &log, command)
    }
}

impl RunDir {
    /// Ends the run from outside, for a signal handler: nothing more is spawned, and everything is taken away while the
    /// code that was at work may still be at it, so that is repeated until nothing comes back. The process should exit
    /// next.
    pub fn abort(&self) -> Result<()> {
        self.spawner.close();
        let end = Instant::now() + ABORT_LIMIT;
        let mut quiet = 0;
        while quiet < ABORT_QUIET_PASSES {
            match self.take_away() {
                // The first pass finds something, of course.
                Ok(found) => quiet = if found { 0 } else { quiet + 1 },
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => quiet = 0,
            }
            if Instant::now() > end {
                break;
            }
            thread::sleep(ABORT_PAUSE);
        }
        let _ = fs::remove_file(lock_path(&self.path));
        Ok(())
    }

    /// One pass of [`Self::abort`]: whether anything was there.
    fn take_away(&self) -> Result<bool> {
        let found = !self.keep_files && self.path.exists();
        sweep(&self.path)?;
        if !self.keep_files {
            remove_tree(&self.path)?;
        }
        Ok(found)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let swept = sweep(&self.path).and_then(|()| {
            if self.keep_files {
                Ok(())
            } else {
                remove_tree(&self.path)
            }
        });
        match swept {
            Ok(()) => {
                let _ = fs::remove_file(lock_path(&self.path));
            }
            Err(error) => eprintln!("warning: {} was not cleaned: {error:#}", self.path.display()),
        }
    }
}

fn lock_path(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

fn lock(path: &Path) -> Result<File> {
    let path = lock_path(path);
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => bail!("another run uses this directory ({} is locked)", path.display()),
        Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Removes a directory and all in it; refuses while anything is mounted below it, so that nothing is deleted through
/// a mount.
pub fn remove_tree(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    if let Some(mount) = crate::sweep::mounts_below(path)?.first() {
        bail!(
            "{} is still a mount point; {} is left in place",
            mount.display(),
            path.display()
        );
    }
    fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))
}
