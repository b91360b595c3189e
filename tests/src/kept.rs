//! A daemon under the real `hullspeed-keeper`, which keeps its descriptors and starts it again when it ends.
//!
//! Tests stop and kill the daemon, look around, and start it again. The keeper would not wait for that. So what it
//! supervises is a gate before the daemon: a shell that becomes the daemon, in the same process, and that waits while
//! there is a pipe at the gate's path. The keeper itself does what it always does, in time.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::Value;

use crate::process::{Process, STOP_GRACE};
use crate::programs;
use crate::run::RunDir;

/// Name of the keeper's binary.
const PROGRAM: &str = "hullspeed-keeper";

/// Waits at the gate (the first argument), then becomes what the rest says. Nothing is forked, so nobody else ever has a
/// kept descriptor.
const GATE: &str = r#"if [ -p "$0" ]; then read -r line < "$0"; fi; exec "$@""#;

/// What the keeper gives the daemon to stop; less than [`STOP_GRACE`].
const STOP_SECONDS: &str = "8";

/// How long the keeper may take to say how the daemon ended.
const SAID_LIMIT: Duration = Duration::from_secs(10);

/// The longest pause of the keeper before a start, and the start.
const START_LIMIT: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(5);

/// A keeper and its daemon. Dropping it stops both.
pub struct Kept {
    keeper: Process,
    gate: PathBuf,
    /// Name of the daemon's process as the kernel has it.
    comm: String,
    /// The daemon, as far as it was seen.
    pid: u32,
    ended: Option<ExitStatus>,
}

impl Kept {
    /// Starts `daemon` under a keeper; both log as `name`.
    pub fn start(run: &RunDir, name: &str, daemon: &Command) -> Result<Self> {
        let gate = run.path().join(format!("{name}.gate"));
        let mut command = Command::new(programs::find(PROGRAM)?);
        command.args(["--stop-timeout", STOP_SECONDS, "--"]);
        // With the keeper the daemon goes, as the keeper goes with the run.
        command.args(["setpriv", "--pdeathsig", "KILL", "--", "sh", "-c", GATE]);
        command.arg(&gate).arg(daemon.get_program()).args(daemon.get_args());
        command.env_remove("NOTIFY_SOCKET");
        for (name, value) in daemon.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let program = Path::new(daemon.get_program())
            .file_name()
            .context("a daemon without a name")?;
        let mut kept = Self {
            keeper: run.spawn(name, command)?,
            gate,
            comm: program.to_string_lossy().chars().take(15).collect(),
            pid: 0,
            ended: None,
        };
        kept.find()?;
        Ok(kept)
    }

    /// The keeper itself.
    pub fn keeper(&mut self) -> &mut Process {
        &mut self.keeper
    }

    /// As [`Self::keeper`], to look at.
    #[must_use]
    pub fn as_keeper(&self) -> &Process {
        &self.keeper
    }

    /// The daemon's process id: that of now, or the last one.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.running().unwrap_or(self.pid)
    }

    /// Fails unless the keeper runs, and the daemon that was seen last: one that ended by itself has been replaced since.
    pub fn check_running(&mut self) -> Result<()> {
        self.keeper.check_running()?;
        if self.ended.is_none() && self.running() == Some(self.pid) {
            return Ok(());
        }
        let status = match self.ended {
            Some(status) => Some(status),
            None => self.endings()?.last().copied(),
        };
        let status = status.map_or_else(
            || "as the keeper has not said yet".to_owned(),
            |status| status.to_string(),
        );
        bail!(
            "the daemon ended early ({status}); its log ends:\n{}",
            self.keeper.log_tail()
        )
    }

    /// Sends a signal to the daemon. If it ends by that, the keeper starts it again.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        rustix::process::kill_process(raw(self.pid())?, signal).context("cannot signal the daemon")
    }

    /// Ends the daemon with a signal, and with SIGKILL after `grace`; it stays away until [`Self::start_again`].
    pub fn end(&mut self, signal: Signal, grace: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        self.shut()?;
        self.pid = self.running().context("the daemon does not run")?;
        let said = self.endings()?;
        let process = rustix::process::pidfd_open(raw(self.pid)?, PidfdFlags::empty())?;
        rustix::process::pidfd_send_signal(&process, signal).context("cannot signal the daemon")?;
        if !crate::process::has_ended(&process, grace)? {
            rustix::process::pidfd_send_signal(&process, Signal::KILL).context("cannot signal the daemon")?;
            ensure!(
                crate::process::has_ended(&process, STOP_GRACE)?,
                "the daemon does not end"
            );
        }
        let end = Instant::now() + SAID_LIMIT;
        loop {
            if let Some(status) = self.endings()?.get(said.len()) {
                self.ended = Some(*status);
                return Ok(*status);
            }
            ensure!(Instant::now() < end, "the keeper does not say how the daemon ended");
            thread::sleep(POLL);
        }
    }

    /// Opens the gate.
    pub fn start_again(&mut self) -> Result<()> {
        self.ended = None;
        let gate = match OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(&self.gate)
        {
            Ok(gate) => Some(gate),
            // It was never shut.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("cannot open {}", self.gate.display())),
        };
        let found = gate.as_ref().map_or(Ok(()), let_through).and_then(|()| self.find());
        if gate.is_some() {
            fs::remove_file(&self.gate)?;
        }
        found
    }

    /// Puts the pipe at the gate.
    fn shut(&self) -> Result<()> {
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &self.gate,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
        .with_context(|| format!("cannot make {}", self.gate.display()))
    }

    /// Waits until a daemon runs, which may be another one than before.
    pub fn find(&mut self) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        loop {
            if let Some(pid) = self.running() {
                self.pid = pid;
                return Ok(());
            }
            self.keeper.check_running()?;
            ensure!(
                Instant::now() < end,
                "the keeper starts no daemon; its log ends:\n{}",
                self.keeper.log_tail()
            );
            thread::sleep(POLL);
        }
    }

    /// The daemon's process, past the gate and alive.
    #[must_use]
    pub fn running(&self) -> Option<u32> {
        let keeper = self.keeper.pid();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).ok()?;
        let mut pids = children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok());
        pids.find(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            field("Name:") == Some(&self.comm) && field("State:").is_some_and(|state| !state.starts_with(['Z', 'X']))
        })
    }

    /// How often the daemon has ended by SIGKILL so far, as the keeper has it.
    pub fn kills(&self) -> Result<usize> {
        let is_kill = |status: &ExitStatus| status.signal() == Some(Signal::KILL.as_raw());
        Ok(self.endings()?.iter().filter(|status| is_kill(status)).count())
    }

    /// How the daemon has ended so far, each time.
    fn endings(&self) -> Result<Vec<ExitStatus>> {
        let text = self.keeper.log_text()?;
        Ok(text.lines().filter_map(ending).collect())
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // A stopped daemon does not hear the keeper's SIGTERM.
        let _ = self.signal(Signal::CONT);
    }
}

/// A line for whoever waits at the gate, and for who comes while this file is open.
fn let_through(mut gate: &File) -> Result<()> {
    use std::io::Write as _;
    gate.write_all(b"\n").context("cannot open the gate")
}

fn raw(pid: u32) -> Result<Pid> {
    Pid::from_raw(i32::try_from(pid)?).context("the daemon was never seen")
}

/// What a line of the keeper's log says about the end of its program.
fn ending(line: &str) -> Option<ExitStatus> {
    let record: Value = serde_json::from_str(line).ok()?;
    let message = record["message"].as_str()?;
    if record["target"] != "hullspeed_keeper" || !message.starts_with("the program ended") {
        return None;
    }
    let (what, number) = record["by"].as_str()?.rsplit_once(' ')?;
    let number: i32 = number.parse().ok()?;
    match what {
        "exit code" => Some(ExitStatus::from_raw(number << 8)),
        "signal" => Some(ExitStatus::from_raw(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keepers_lines_are_understood() {
        let line = |by: &str| {
            format!(
                r#"{{"level":"WARN","message":"the program ended, and is started again","by":"{by}","target":"hullspeed_keeper"}}"#
            )
        };
        assert_eq!(ending(&line("exit code 69")).unwrap().code(), Some(69));
        assert_eq!(ending(&line("signal 9")).unwrap().signal(), Some(9));
        assert!(ending(&line("exit code 0")).unwrap().success());
        assert!(ending(&line("unknown")).is_none() && ending("panicked").is_none());
    }
}
