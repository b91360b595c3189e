//! A daemon's process for its log and for signals, whoever started it: the test itself, or a keeper.
//!
//! On either way a daemon that was stopped or killed here stays away until it is started again.

use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::Result;
use rustix::process::Signal;

use crate::kept::Kept;
use crate::process::{Process, STOP_GRACE};
use crate::run::RunDir;

/// A daemon's process.
pub enum Daemon {
    /// A child of this process.
    Own(Process),
    /// A child of a keeper.
    Kept(Kept),
}

impl Daemon {
    /// Starts it as a child.
    pub fn start(run: &RunDir, name: &str, command: Command) -> Result<Self> {
        Ok(Self::Own(run.spawn(name, command)?))
    }

    /// Starts it under a keeper.
    pub fn start_kept(run: &RunDir, name: &str, command: &Command) -> Result<Self> {
        Ok(Self::Kept(Kept::start(run, name, command)?))
    }

    /// Starts it again, after it was stopped or killed. A keeper does so with the command that it has.
    pub fn start_again(&mut self, run: &RunDir, name: &str, command: Command) -> Result<()> {
        match self {
            Self::Own(process) => {
                *process = run.spawn(name, command)?;
                Ok(())
            }
            Self::Kept(kept) => kept.start_again(),
        }
    }

    /// Its keeper, if it has one.
    pub fn kept(&mut self) -> Option<&mut Kept> {
        match self {
            Self::Own(_) => None,
            Self::Kept(kept) => Some(kept),
        }
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        match self {
            Self::Own(process) => process.pid(),
            Self::Kept(kept) => kept.pid(),
        }
    }

    /// Where its output goes, and its keeper's.
    #[must_use]
    pub fn log(&self) -> &Path {
        self.logged().log()
    }

    /// The whole log so far.
    pub fn log_text(&self) -> Result<String> {
        self.logged().log_text()
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        self.logged().log_tail()
    }

    /// Fails, quoting the log, if it has ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self {
            Self::Own(process) => process.check_running(),
            Self::Kept(kept) => kept.check_running(),
        }
    }

    /// Sends a signal to it. A keeper starts it again if it ends by that.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match self {
            Self::Own(process) => process.signal(signal),
            Self::Kept(kept) => kept.signal(signal),
        }
    }

    /// SIGTERM, a bounded wait, then SIGKILL. Returns how it ended.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        match self {
            Self::Own(process) => process.stop(),
            Self::Kept(kept) => kept.end(Signal::TERM, STOP_GRACE),
        }
    }

    /// SIGKILL at once, as a crash would be.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        match self {
            Self::Own(process) => process.kill(),
            Self::Kept(kept) => kept.end(Signal::KILL, STOP_GRACE),
        }
    }

    fn logged(&self) -> &Process {
        match self {
            Self::Own(process) => process,
            Self::Kept(kept) => kept.as_keeper(),
        }
    }
}
