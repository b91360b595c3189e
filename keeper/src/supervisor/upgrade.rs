//! The keeper replaced by what is in its file now, in the same process: with its child, and with everything it has.
//!
//! A keeper that cannot go on would be the end of everything that is kept. So the new program is asked first, in a process
//! of its own, whether it would read the list that this one writes, and its command line. What was asked is what is executed:
//! the file is opened once, whatever is at its path later.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, WaitStatus, kill_process};

use super::{Phase, Supervisor};
use crate::child::{Plan, environment_with, texts};
use crate::handover::{Draft, FORMAT, VARIABLE};
use crate::listener::Listener;
use crate::sys;

/// How long the new program may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

/// The new program, while it is asked.
#[derive(Debug)]
pub(super) struct Probe {
    process: Pid,
    end: Instant,
    /// Its file.
    program: OwnedFd,
}

impl Probe {
    /// When it is given up.
    pub(super) fn end(&self) -> Instant {
        self.end
    }
}

impl Supervisor {
    /// Asks the new program.
    pub(super) fn probe(&mut self) {
        if self.probe.is_some() || !matches!(self.phase, Phase::Running | Phase::Waiting { .. }) {
            self.log.warn(
                "the keeper is not replaced while it is stopping or starting something anew",
                &[],
            );
            return;
        }
        match self.start_probe() {
            Ok(probe) => self.probe = Some(probe),
            Err(error) => self.not_replaced(&error.to_string()),
        }
    }

    fn start_probe(&self) -> io::Result<Probe> {
        // Nothing is read or waited for: what is there may be anything.
        let program = open(&self.own_program, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let question = ["--accepts-handover", FORMAT, "--"].map(OsString::from);
        let own = std::iter::once(self.own_program.clone().into());
        let arguments: Vec<_> = own.chain(question).chain(std::env::args_os().skip(1)).collect();
        let plan = Plan {
            program: &arguments,
            opened: Some(program.as_fd()),
            socket: OsString::new(),
            capacity: 0,
            descriptors: Vec::new(),
            oom_score: self.oom_score,
        };
        let process = plan.start()?;
        Ok(Probe {
            process,
            end: Instant::now() + LIMIT,
            program,
        })
    }

    /// Gives a program up that does not answer.
    pub(super) fn end_probe(&mut self, now: Instant) {
        if let Some(probe) = self.probe.take_if(|probe| probe.end <= now) {
            // It is reaped as any orphan is.
            let _ = kill_process(probe.process, Signal::KILL);
            self.not_replaced("the new program does not answer");
        }
    }

    /// Takes note of a process that ended, and becomes the new program if that was it and it can go on.
    pub(super) fn probe_ended(&mut self, process: Pid, status: WaitStatus) {
        let Some(probe) = self.probe.take_if(|probe| probe.process == process) else {
            return;
        };
        if !matches!(self.phase, Phase::Running | Phase::Waiting { .. }) {
            self.not_replaced("the keeper is stopping or starting something anew");
        } else if status.exit_status() == Some(0) {
            let error = self.replace(probe.program.as_fd());
            self.not_replaced(&error.to_string());
        } else {
            self.not_replaced("the new program does not read this one's command line, or what it would hand over");
        }
    }

    fn not_replaced(&mut self, error: &str) {
        self.log
            .error("the keeper is not replaced and goes on", &[("error", error.into())]);
    }

    /// Becomes the new program; returns only if that fails, with everything as it was.
    fn replace(&mut self, program: BorrowedFd<'_>) -> io::Error {
        self.log
            .info("the keeper is replaced", &[("kept", self.store.len().into())]);
        let failed = match self.try_replace(program) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if let Err(error) = self.let_through(FdFlags::CLOEXEC) {
            return error;
        }
        failed
    }

    fn try_replace(&mut self, program: BorrowedFd<'_>) -> io::Result<std::convert::Infallible> {
        let child = self.child.as_ref().map(|child| (child.process, child.ready));
        let mut draft = Draft::new(self.backoff.failures(), self.oom_score, child);
        draft.add_program(&self.own_program);
        draft.add("inbox", self.inbox.handed());
        self.listeners
            .iter()
            .for_each(|listener| draft.add("listener", listener.handed()));
        self.store.iter().for_each(|kept| draft.add("kept", kept));
        let list = draft.finish()?;
        let arguments = texts(std::env::args_os())?;
        let environment = texts(environment_with((VARIABLE, &list.as_raw_fd().to_string())))?;
        self.let_through(FdFlags::empty())?;
        Err(sys::exec_open(program, &arguments, &environment))
    }

    /// Whether the next program gets what this one has.
    fn let_through(&self, flags: FdFlags) -> io::Result<()> {
        let listeners = self.listeners.iter().map(Listener::handed);
        for (_, descriptor) in listeners.chain(self.store.iter()).chain([self.inbox.handed()]) {
            fcntl_setfd(descriptor, flags)?;
        }
        Ok(())
    }
}
