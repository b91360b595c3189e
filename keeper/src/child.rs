//! The program's process.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use rustix::process::{Pid, setpgid};

use crate::handover;
use crate::log::Log;
use crate::sys;

/// Number of the first descriptor that is handed over.
const FIRST: RawFd = 3;

/// Exit code of a process that could not become the program, as shells have it.
const NOT_STARTED: i32 = 127;

/// How the kernel's killer looks at this process; the least means never.
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Variables that are the keeper's own affair, or are set anew.
const OWN_VARIABLES: [&str; 8] = [
    "NOTIFY_SOCKET",
    "FDSTORE",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    handover::VARIABLE,
];

/// What a process is started with.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The program and its arguments.
    pub program: &'a [OsString],
    /// The program's file, where it is open already.
    pub opened: Option<BorrowedFd<'a>>,
    /// What `NOTIFY_SOCKET` says.
    pub socket: OsString,
    /// What `FDSTORE` says.
    pub capacity: usize,
    /// What is handed over, with names, the listeners first.
    pub descriptors: Vec<(&'a str, BorrowedFd<'a>)>,
    /// Its score for the kernel's killer, if the keeper has another one.
    pub oom_score: Option<i32>,
}

impl Plan<'_> {
    /// Starts the process, in a group of its own. That the program cannot be executed shows in the process: it says so in
    /// a log line and ends.
    pub fn start(&self) -> io::Result<Pid> {
        let Some(child) = sys::fork()? else {
            let error = self.execute().to_string();
            let program = self
                .program
                .first()
                .map(|name| name.to_string_lossy())
                .unwrap_or_default();
            let fields = [("program", program.as_ref().into()), ("error", error.as_str().into())];
            Log::to_standard_error().error("the program cannot be started", &fields);
            sys::exit_now(NOT_STARTED);
        };
        // The child does so too; whoever is first. An error means that it has been executed, and so has done it.
        let _ = setpgid(Some(child), Some(child));
        Ok(child)
    }

    fn execute(&self) -> io::Error {
        let prepared = self.prepare();
        match prepared {
            Ok((arguments, environment)) => match (self.opened, arguments.first()) {
                (Some(opened), _) => sys::exec_open(opened, &arguments, &environment),
                (None, Some(program)) => sys::exec(program, &arguments, &environment),
                (None, None) => io::ErrorKind::InvalidInput.into(),
            },
            Err(error) => error,
        }
    }

    fn prepare(&self) -> io::Result<(Vec<CString>, Vec<CString>)> {
        setpgid(None, None)?;
        if let Some(score) = self.oom_score {
            fs::write(OOM_SCORE, score.to_string())?;
        }
        let arguments = texts(self.program.iter().cloned())?;
        let environment = texts(self.environment())?;
        let mut numbers: Vec<_> = self
            .descriptors
            .iter()
            .map(|(_, descriptor)| descriptor.as_raw_fd())
            .collect();
        sys::prepare_child(FIRST, &mut numbers)?;
        Ok((arguments, environment))
    }

    fn environment(&self) -> Vec<OsString> {
        let own = |name: &OsStr| OWN_VARIABLES.iter().any(|own| name == *own);
        let mut environment: Vec<_> = std::env::vars_os()
            .filter(|(name, _)| !own(name))
            .map(|(name, value)| variable(&name, &value))
            .collect();
        let mut add = |name: &str, value: &OsStr| environment.push(variable(OsStr::new(name), value));
        add("NOTIFY_SOCKET", &self.socket);
        add("FDSTORE", OsStr::new(&self.capacity.to_string()));
        if !self.descriptors.is_empty() {
            let names: Vec<_> = self.descriptors.iter().map(|(name, _)| *name).collect();
            add("LISTEN_PID", OsStr::new(&std::process::id().to_string()));
            add("LISTEN_FDS", OsStr::new(&names.len().to_string()));
            add("LISTEN_FDNAMES", OsStr::new(&names.join(":")));
        }
        environment
    }
}

fn variable(name: &OsStr, value: &OsStr) -> OsString {
    let parts = [name.as_bytes(), value.as_bytes()];
    OsString::from_vec(parts.join(&b'='))
}

/// Texts as exec wants them.
pub(crate) fn texts(values: impl IntoIterator<Item = OsString>) -> io::Result<Vec<CString>> {
    let texts = values.into_iter().map(|value| CString::new(value.into_vec()));
    Ok(texts.collect::<Result<_, _>>()?)
}

/// The keeper's own environment without what is its own affair, and with `more`.
pub(crate) fn environment_with(more: (&str, &str)) -> Vec<OsString> {
    let rest = std::env::vars_os().filter(|(name, _)| name != more.0);
    rest.map(|(name, value)| variable(&name, &value))
        .chain([variable(OsStr::new(more.0), OsStr::new(more.1))])
        .collect()
}

/// Lowers the keeper's score for the kernel's killer, and says what it was.
pub fn lower_oom_score(score: i32) -> io::Result<i32> {
    let before = fs::read_to_string(OOM_SCORE)?
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    if score < before {
        fs::write(OOM_SCORE, score.to_string())?;
    }
    Ok(before)
}
