//! A keeper with a pupil, in a directory of its own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use crate::pupil;

pub(crate) const KEEPER: &str = env!("CARGO_BIN_EXE_hullspeed-keeper");

/// How long anything may take that has to come.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `what` has come.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A keeper; it and its program are killed at the end.
pub(crate) struct Keeper {
    pub(crate) place: tempfile::TempDir,
    pub(crate) process: Child,
    control: UnixListener,
    children: Vec<Pid>,
}

impl Keeper {
    /// A keeper of a pupil.
    pub(crate) fn start(options: &[&str]) -> Self {
        Self::with(|command, _| {
            command.args(options).arg("--").args(pupil::command());
        })
    }

    /// A keeper that is started as `prepare` says; the program's directory is its second argument.
    pub(crate) fn with(prepare: impl FnOnce(&mut Command, &Path)) -> Self {
        Self::of(Path::new(KEEPER), prepare)
    }

    /// A keeper whose program is at `program`.
    pub(crate) fn of(program: &Path, prepare: impl FnOnce(&mut Command, &Path)) -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("control");
        let control = UnixListener::bind(&path).unwrap();
        let log = File::create(place.path().join("log")).unwrap();
        let mut command = Command::new(program);
        command.env(pupil::SOCKET, &path).env_remove("NOTIFY_SOCKET");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.arg("--runtime-directory").arg(place.path().join("run"));
        prepare(&mut command, place.path());
        Self {
            process: command.spawn().unwrap(),
            place,
            control,
            children: Vec::new(),
        }
    }

    /// The next process of the program that says something.
    pub(crate) fn pupil(&mut self) -> Pupil {
        let limit = Timespec::try_from(LIMIT).unwrap();
        let came = poll(&mut [PollFd::new(&self.control, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(came, 1, "no program came: {}", self.log());
        let stream = self.control.accept().unwrap().0;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut pupil = Pupil {
            reader: BufReader::new(stream.try_clone().unwrap()),
            stream,
            report: Vec::new(),
        };
        let line = pupil.line();
        pupil.report = line.split(' ').map(str::to_owned).collect();
        self.children.push(pupil.process());
        pupil
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Files of notification sockets.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let found = fs::read_dir(self.place.path().join("run")).unwrap();
        found.map(|entry| entry.unwrap().path()).collect()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.place.path().join("log")).unwrap()
    }

    /// Waits for a log line with these words.
    pub(crate) fn until_said(&self, words: &str) {
        until(words, || self.log().contains(words));
    }

    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    /// Resident memory that is the keeper's own, in KiB.
    pub(crate) fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until("the keeper's end", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for child in &self.children {
            let _ = kill_process(*child, Signal::KILL);
        }
        if std::thread::panicking() {
            let log = self.log();
            eprintln!("{}", log.get(..log.floor_char_boundary(4000)).unwrap());
        }
    }
}

/// One process of the program.
pub(crate) struct Pupil {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    report: Vec<String>,
}

impl Pupil {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn process(&self) -> Pid {
        Pid::from_raw(self.report[0].parse().unwrap()).unwrap()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.report[1].parse().unwrap()
    }

    pub(crate) fn socket(&self) -> &str {
        &self.report[2]
    }

    pub(crate) fn listeners(&self) -> &str {
        self.report[3].trim_matches(['[', ']'])
    }

    /// Names and inodes, in order.
    pub(crate) fn kept(&self) -> Vec<String> {
        let kept = self.report[4].trim_matches(['[', ']']);
        kept.split(',')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.kept()
            .iter()
            .map(|kept| kept.split('=').next().unwrap().to_owned())
            .collect()
    }

    pub(crate) fn tell(&mut self, order: &str) {
        writeln!(self.stream, "{order}").unwrap();
    }

    /// Its answer.
    pub(crate) fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        self.line()
    }

    pub(crate) fn kill(self) {
        kill_process(self.process(), Signal::KILL).unwrap();
    }
}

/// A script that becomes a pupil.
pub(crate) fn script(path: &PathBuf, before: &str) {
    use std::os::unix::fs::PermissionsExt as _;

    let words: Vec<_> = pupil::command()
        .into_iter()
        .map(OsString::into_string)
        .map(Result::unwrap)
        .collect();
    // Written aside and moved: a file that is open for writing cannot be executed.
    let aside = path.with_extension("new");
    fs::write(&aside, format!("#!/bin/sh\n{before}\nexec {}\n", words.join(" "))).unwrap();
    fs::set_permissions(&aside, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&aside, path).unwrap();
}
