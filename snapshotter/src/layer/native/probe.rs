//! Whether this node can mount layers natively: tried, not guessed.
//!
//! A tiny layer is mounted from the very filesystem that the cache is on. A hole is read, filled on demand and compared; a read is denied
//! and must be an error; and a process that has read a question is killed before it answers, which its successor then does.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use estargz::index::{self, BlobLayout, LayerIndex};
use estargz::member::Compression;
use estargz::toc::Toc;
use hullspeed_erofs::mount::{Detached, Mounter};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};

use super::event::{Asked, Event};
use super::group::{Answer, Group};
use super::journal::{Journal, Received, Slot};
use crate::layer::Cause;
use crate::layer::mounts::ways::Reach;

/// Files of the tiny layer, each a block long.
const FILES: [&str; 3] = ["fill", "deny", "kill"];
const BLOCK: usize = 4096;
/// What is written where the hole was.
const CONTENT: [u8; BLOCK] = [0xa5; BLOCK];
/// What the name of the directory begins with.
const PREFIX: &str = ".self-test-";
/// How long each wait lasts at most.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether something has come.
const LOOK: Duration = Duration::from_millis(1);
/// The first argument of the process that is killed.
const STAND_IN: &str = "self-test-stand-in";

/// What was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A file-backed EROFS mount shows what is there.
    Erofs,
    /// There is a store for descriptors, which must outlive this process.
    Store,
    /// The kernel asks before somebody reads of the filesystem that the cache is on.
    Events,
    /// A hole was filled on demand, and read as it was filled.
    Fill,
    /// A read that was denied was an error.
    Deny,
    /// A question that a process had read when it was killed was answered by the next one.
    Kill,
}

impl Step {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Store => "store",
            Self::Events => "events",
            Self::Fill => "fill",
            Self::Deny => "deny",
            Self::Kill => "kill",
        }
    }
}

/// What came of the trial: steps up to the first that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Steps in order, with what went wrong.
    pub steps: Vec<(Step, Result<(), String>)>,
}

impl Report {
    /// Which layers can be mounted natively.
    pub fn reach(&self) -> Reach {
        let passed = |step| {
            self.steps
                .iter()
                .any(|(tried, outcome)| *tried == step && outcome.is_ok())
        };
        if passed(Step::Kill) {
            Reach::All
        } else if passed(Step::Erofs) {
            Reach::Complete
        } else {
            Reach::Nothing
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (step, outcome)) in self.steps.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            match outcome {
                Ok(()) => write!(f, "{comma}{}: passed", step.name())?,
                Err(reason) => write!(f, "{comma}{}: {reason}", step.name())?,
            }
        }
        Ok(())
    }
}

/// Tries it on the filesystem of `root`; `has_store` says whether there is a store for descriptors. Blocks, as a rule for some
/// milliseconds.
pub fn run(root: &Path, has_store: bool) -> Report {
    let mut report = Report { steps: Vec::new() };
    let trial = report.note(Step::Erofs, || Trial::new(root));
    let Some(trial) = trial else { return report };
    let store = if has_store {
        Ok(())
    } else {
        Err("there is none; run under systemd with FileDescriptorStoreMax=, or under hullspeed-keeper".into())
    };
    if report.note(Step::Store, || store).is_none() {
        return report;
    }
    let Some(questions) = report.note(Step::Events, || Questions::new(&trial)) else {
        return report;
    };
    let _passed = report
        .note(Step::Fill, || questions.fill())
        .and_then(|()| report.note(Step::Deny, || questions.deny()))
        .and_then(|()| report.note(Step::Kill, || questions.kill()));
    report
}

/// Tries whether the kernel reads a file by itself that FUSE opens: one of an EROFS mount of the filesystem of `root`.
pub fn passthrough(root: &Path, runtime: &tokio::runtime::Handle) -> Result<(), Cause> {
    let trial = Trial::new(root)?;
    trial.data.write_all_at(&CONTENT, 0)?;
    let mount = trial.mount()?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let sample = rustix::fs::openat(mount.as_fd(), FILES[0], flags, Mode::empty())?;
    let scratch = trial.directory.path().join("mnt");
    fs::create_dir(&scratch)?;
    Ok(fuse_session::passthrough::probe(sample.as_fd(), &scratch, runtime)?)
}

impl Report {
    fn note<T>(&mut self, step: Step, attempt: impl FnOnce() -> Result<T, Cause>) -> Option<T> {
        let outcome = attempt();
        let told = outcome.as_ref().map(|_| ());
        self.steps
            .push((step, told.map_err(|error| hullspeed_daemon::error::chain(&**error))));
        outcome.ok()
    }
}

/// A layer with nothing in it, on the filesystem of the cache.
struct Trial {
    directory: tempfile::TempDir,
    data: File,
    toc: Digest,
}

impl Trial {
    fn new(root: &Path) -> Result<Self, Cause> {
        fs::create_dir_all(root)?;
        sweep(root);
        let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(root)?;
        let json = toc();
        let toc = Digest::of(json.as_bytes());
        let layout = BlobLayout {
            blob_size: 1 << 20,
            toc_offset: 1 << 19,
            compression: Compression::Gzip,
        };
        let index = index::build(&Toc::parse_verified(json.as_bytes())?, layout, toc)?;
        let image = hullspeed_erofs::image(&LayerIndex::open(&index[..])?)?;
        fs::write(directory.path().join("erofs"), image)?;
        let path = directory.path().join("data");
        let data = File::options().read(true).write(true).create_new(true).open(&path)?;
        data.set_len((FILES.len() * BLOCK) as u64)?;
        let trial = Self { directory, data, toc };
        // Without a mark the holes are zeros; that the file system is there at all is what counts.
        let mount = trial.mount()?;
        let found = read(mount.as_fd(), FILES[0])?;
        if found != [0; BLOCK] {
            return Err("a hole is not zeros".into());
        }
        Ok(trial)
    }

    fn mount(&self) -> Result<Detached, Cause> {
        Ok(Mounter::default().create(&self.directory.path().join("erofs"), self.data.as_fd())?)
    }
}

/// Removes what a trial left that was interrupted.
fn sweep(root: &Path) {
    let is_left = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(PREFIX);
    for entry in fs::read_dir(root).into_iter().flatten().flatten().filter(is_left) {
        // What stays takes a few blocks.
        let _ = fs::remove_dir_all(entry.path());
    }
}

/// A table of contents for [`FILES`].
fn toc() -> String {
    let digest = Digest::of(CONTENT);
    let entry = |(at, name): (usize, &&str)| {
        format!(
            r#"{{"name":"{name}","type":"reg","size":{BLOCK},"modtime":"2020-01-01T00:00:00Z","mode":420,"offset":{},"digest":"{digest}","chunkDigest":"{digest}"}}"#,
            at * 100
        )
    };
    let entries: Vec<_> = FILES.iter().enumerate().map(entry).collect();
    format!(r#"{{"version":1,"entries":[{}]}}"#, entries.join(","))
}

fn read(root: BorrowedFd<'_>, name: &str) -> io::Result<Vec<u8>> {
    let file = File::from(rustix::fs::openat(
        root,
        name,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?);
    let mut bytes = vec![0; BLOCK];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The layer, mounted with a mark.
struct Questions<'a> {
    trial: &'a Trial,
    // Closed before the mount is: whoever waits is let go.
    group: Group,
    journal: Arc<Journal>,
    slot: Slot,
    mount: Arc<Detached>,
}

impl<'a> Questions<'a> {
    fn new(trial: &'a Trial) -> Result<Self, Cause> {
        let journal = Arc::new(Journal::new()?);
        let slot = journal.claim(&trial.toc).ok_or("a new journal has no slot")?;
        let group = Group::new()?;
        group.mark(&trial.data)?;
        Ok(Self {
            trial,
            group,
            journal,
            slot,
            mount: Arc::new(trial.mount()?),
        })
    }

    /// Reads a file on a thread of its own; it ends at the latest when the group is closed.
    fn reader(&self, name: &'static str) -> io::Result<mpsc::Receiver<io::Result<Vec<u8>>>> {
        let (sender, receiver) = mpsc::channel();
        let mount = self.mount.clone();
        std::thread::Builder::new()
            .name("self-test".to_owned())
            .spawn(move || sender.send(read(mount.as_fd(), name)))?;
        Ok(receiver)
    }

    fn question(&self, file: usize) -> Result<Event, Cause> {
        let mut polled = [PollFd::new(&self.group, PollFlags::IN)];
        let patience = Timespec::try_from(PATIENCE)?;
        if poll(&mut polled, Some(&patience))? == 0 {
            return Err("the kernel did not ask".into());
        }
        let Received::Events(events) = self.slot.receive(self.group.as_fd(), 1)? else {
            return Err("the kernel's question cannot be read".into());
        };
        let event = *events.first().ok_or("the kernel's question is not understood")?;
        check(event.asked, file)?;
        Ok(event)
    }

    fn answer(&self, number: i32, answer: Answer) -> Result<(), Cause> {
        if !self.group.answer(number, answer)? {
            return Err("the kernel does not know of its question".into());
        }
        self.slot.forget(number);
        Ok(())
    }

    fn write(&self, file: usize) -> io::Result<()> {
        // Through a descriptor that was opened before the mark: one that raised events would wait for this thread.
        self.trial.data.write_all_at(&CONTENT, (file * BLOCK) as u64)
    }

    fn fill(&self) -> Result<(), Cause> {
        let reader = self.reader(FILES[0])?;
        let event = self.question(0)?;
        self.write(0)?;
        self.answer(event.fd, Answer::Allow)?;
        super::sys::close_event(event.fd);
        right(&reader)
    }

    fn deny(&self) -> Result<(), Cause> {
        let reader = self.reader(FILES[1])?;
        let until = Instant::now() + PATIENCE;
        // The kernel asks once more after it was refused ahead of the read.
        while Instant::now() < until {
            match reader.recv_timeout(LOOK) {
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                Ok(Err(error)) => return Err(error.into()),
                Ok(Ok(_)) => return Err("what was denied was read".into()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err("the reader is gone".into()),
            }
            let Received::Events(events) = self.slot.receive(self.group.as_fd(), 1)? else {
                continue;
            };
            for event in events {
                self.answer(event.fd, Answer::Deny)?;
                super::sys::close_event(event.fd);
            }
        }
        Err("the reader that was denied waits".into())
    }

    fn kill(&self) -> Result<(), Cause> {
        let mut child = Command::new("/proc/self/exe")
            .arg(STAND_IN)
            .arg(self.trial.toc.to_string())
            .stdin(Stdio::from(self.group.as_fd().try_clone_to_owned()?))
            .stdout(Stdio::from(self.journal.as_fd().try_clone_to_owned()?))
            .stderr(Stdio::null())
            .spawn()?;
        let asked = self.reader(FILES[2]).map_err(Cause::from).and_then(|reader| {
            let until = Instant::now() + PATIENCE;
            while !self.slot.is_occupied() {
                if Instant::now() > until || child.try_wait()?.is_some() {
                    return Err("a second process does not get the kernel's question".into());
                }
                std::thread::sleep(LOOK);
            }
            Ok(reader)
        });
        // With SIGKILL, before it has answered; in any case it must be gone before its question is answered for it.
        child.kill()?;
        child.wait()?;
        let reader = asked?;
        let left = self.slot.left();
        let entry = left.first().ok_or("the killed process left no question")?;
        check(entry.asked, 2)?;
        self.write(2)?;
        self.answer(entry.number, Answer::Allow)?;
        right(&reader)
    }
}

fn check(asked: Asked, file: usize) -> Result<(), Cause> {
    let offset = (file * BLOCK) as u64;
    match asked {
        Asked::Range { offset: from, count } if from == offset && count == BLOCK as u64 => Ok(()),
        other => Err(format!("asked for {other:?} instead of {BLOCK} bytes at {offset}").into()),
    }
}

fn right(reader: &mpsc::Receiver<io::Result<Vec<u8>>>) -> Result<(), Cause> {
    match reader.recv_timeout(PATIENCE)? {
        Ok(found) if found == CONTENT => Ok(()),
        Ok(_) => Err("other bytes were read than were written".into()),
        Err(error) => Err(error.into()),
    }
}

/// If this process was started to be killed by [`run`]: reads the question on its standard input into the journal on its standard
/// output, and waits. To be called before anything else.
pub fn stand_in() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(STAND_IN) {
        return None;
    }
    let layer = arguments.next().and_then(|digest| digest.parse().ok());
    let served = layer
        .ok_or(io::ErrorKind::InvalidInput.into())
        .and_then(|layer| wait_for_end(&layer));
    Some(if served.is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn wait_for_end(layer: &Digest) -> io::Result<()> {
    let owned = |fd: BorrowedFd<'_>| -> io::Result<OwnedFd> { fd.try_clone_to_owned() };
    let group = Group::kept(owned(io::stdin().as_fd())?);
    let journal = Journal::kept(owned(io::stdout().as_fd())?).map_err(io::Error::other)?;
    let slot = Arc::new(journal).resume(layer).ok_or(io::ErrorKind::NotFound)?;
    let until = Instant::now() + 2 * PATIENCE;
    while Instant::now() < until {
        let mut polled = [PollFd::new(&group, PollFlags::IN)];
        poll(
            &mut polled,
            Some(&Timespec::try_from(PATIENCE).map_err(io::Error::other)?),
        )?;
        // Never answered. When nobody has killed this process, its end is as good.
        slot.receive(group.as_fd(), 1)?;
        std::thread::sleep(LOOK);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileged_without_a_store_only_complete_layers_are_mounted_natively() {
        let root = tempfile::tempdir().unwrap();
        let report = run(root.path(), false);
        assert_eq!(report.reach(), Reach::Complete, "{report}");
        assert!(
            report.to_string().starts_with("erofs: passed, store: there is none"),
            "{report}"
        );
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_report_tells_each_step_and_what_follows() {
        let steps = |steps: &[(Step, bool)]| Report {
            steps: steps
                .iter()
                .map(|(step, passed)| (*step, if *passed { Ok(()) } else { Err("no".to_owned()) }))
                .collect(),
        };
        assert_eq!(steps(&[(Step::Erofs, false)]).reach(), Reach::Nothing);
        let events = steps(&[(Step::Erofs, true), (Step::Store, true), (Step::Events, false)]);
        assert_eq!(
            (events.reach(), events.to_string().as_str()),
            (Reach::Complete, "erofs: passed, store: passed, events: no")
        );
        let all = [
            Step::Erofs,
            Step::Store,
            Step::Events,
            Step::Fill,
            Step::Deny,
            Step::Kill,
        ];
        assert_eq!(steps(&all.map(|step| (step, true))).reach(), Reach::All);
    }
}
