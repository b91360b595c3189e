//! Child processes that never outlive the run: each leads its own process group, dies with us by `PR_SET_PDEATHSIG`, logs
//! to a file of its own and carries the run directory in its environment, by which a later run finds leftovers.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};

/// Environment variable that marks every process of a run; its value is the run directory.
pub const RUN_DIR_VARIABLE: &str = "HULLSPEED_RUN_DIR";

/// How long a process may take to end after SIGTERM before SIGKILL follows.
pub const STOP_GRACE: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(5);

/// How much of a log an error message quotes.
const LOG_TAIL_BYTES: u64 = 2048;

type Request = (Command, mpsc::Sender<io::Result<Child>>);

/// The thread that spawns all children.
///
/// `PR_SET_PDEATHSIG` fires when the spawning *thread* ends, and threads of an async runtime come and go; this one lives
/// as long as the run.
pub struct Spawner {
    requests: Mutex<Option<mpsc::Sender<Request>>>,
    thread: Option<JoinHandle<()>>,
}

impl Spawner {
    /// Starts the thread.
    pub fn start() -> Result<Self> {
        let (requests, queue) = mpsc::channel::<Request>();
        let thread = thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, reply) in queue {
                    // The receiver waits for the answer, so sending fails only when it panicked.
                    let _ = reply.send(command.spawn());
                }
            })
            .context("cannot start the spawner thread")?;
        Ok(Self {
            requests: Mutex::new(Some(requests)),
            thread: Some(thread),
        })
    }

    /// From now on nothing is spawned.
    pub fn close(&self) {
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn spawn(&self, command: Command) -> io::Result<Child> {
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (reply, answer) = mpsc::channel();
        let gone = || io::Error::other("the run is ending");
        requests.ok_or_else(gone)?.send((command, reply)).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

impl Drop for Spawner {
    fn drop(&mut self) {
        self.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A running child. Dropping it stops it.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Spawns `command` for the run at `run_dir`; its output goes to `log`, appended.
    pub(crate) fn spawn(
        spawner: &Spawner,
        run_dir: &Path,
        name: &str,
        log: &Path,
        mut command: Command,
    ) -> Result<Self> {
        let open = || OpenOptions::new().create(true).append(true).open(log);
        let output: File = open().with_context(|| format!("cannot open {}", log.display()))?;
        let errors = output.try_clone().context("cannot duplicate a log descriptor")?;
        command.env(RUN_DIR_VARIABLE, run_dir).process_group(0);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        crate::sys::die_with_parent(&mut command);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = spawner
            .spawn(command)
            .with_context(|| format!("cannot start {name} ({program})"))?;
        Ok(Self {
            name: name.into(),
            child,
            log: log.into(),
        })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The whole log so far.
    pub fn log_text(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| format!("cannot read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The exit status, if it has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Fails, quoting the log, if the process has ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self.try_wait()? {
            None => Ok(()),
            Some(status) => bail!(
                "{} ended early ({status}); its log ends:\n{}",
                self.name,
                self.log_tail()
            ),
        }
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > end {
                bail!(
                    "{} still runs after {limit:?}; its log ends:\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            thread::sleep(POLL);
        }
    }

    /// Sends a signal to the process alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        rustix::process::kill_process(self.raw_pid()?, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// SIGTERM, a bounded wait, then SIGKILL to the whole group. Returns how it ended.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.stop_within(STOP_GRACE)
    }

    /// As [`Self::stop`], with another limit.
    pub fn stop_within(&mut self, grace: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::TERM)?;
        let ended = self.wait(grace);
        // Also after a clean end: helpers of the process may still be in its group.
        self.kill_group();
        match ended {
            Ok(status) => Ok(status),
            Err(_) => self.wait(STOP_GRACE),
        }
    }

    /// SIGKILL at once, as a crash would be.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait(STOP_GRACE)
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log).unwrap_or_else(|error| format!("({}: {error})", self.log.display()))
    }

    fn raw_pid(&self) -> Result<Pid> {
        let pid = i32::try_from(self.child.id()).context("a pid beyond i32")?;
        Pid::from_raw(pid).ok_or_else(|| anyhow!("{} has no pid", self.name))
    }

    fn kill_group(&self) {
        if let Ok(pid) = self.raw_pid() {
            // ESRCH: the group is empty, which is the aim.
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("warning: {} was not stopped: {error:#}", self.name);
        }
    }
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Kills a process that is not ours with SIGKILL and waits until all of it has ended: of a process with threads, the
/// first may be a zombie while others still run.
pub fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process has the number 0")?;
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    rustix::process::pidfd_send_signal(&process, Signal::KILL)?;
    ensure!(has_ended(&process, STOP_GRACE)?, "process {pid:?} does not end");
    Ok(())
}

/// Whether a process (a pidfd, of anybody's child) ends within `limit`.
pub(crate) fn has_ended(process: impl AsFd, limit: Duration) -> Result<bool> {
    let limit = Timespec::try_from(limit)?;
    Ok(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit))? == 1)
}

/// Runs a short command to its end and returns its standard output; a failure quotes its standard error.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !done.status.success() {
        let arguments: Vec<_> = command
            .get_args()
            .map(|argument| argument.to_string_lossy().into_owned())
            .collect();
        let said = String::from_utf8_lossy(&done.stderr);
        bail!(
            "{program} {} failed ({}): {}",
            arguments.join(" "),
            done.status,
            said.trim()
        );
    }
    Ok(done.stdout)
}
