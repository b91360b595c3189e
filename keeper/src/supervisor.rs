//! The keeper's loop: messages, signals, the program's ends and starts.

mod exchange;
mod limits;
mod upgrade;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, kill_process, wait, waitid};

use self::limits::{capacity, lower};
use self::upgrade::Probe;
use crate::backoff::Backoff;
use crate::child::Plan;
use crate::handover::{Faults, Handover, HandoverError};
use crate::inbox::{Inbox, InboxError};
use crate::listener::{Listener, ListenerError};
use crate::log::{Log, Value};
use crate::notification::{Address, Sender};
use crate::options::Options;
use crate::store::Store;
use crate::sys;

/// Pause after a call that failed for no reason that is known to pass.
const PAUSE: Duration = Duration::from_millis(100);

/// Messages that are read before signals are looked at again.
const TURN: usize = 256;

/// Messages that are read before the next process is started: more than a queue can have. Those that the last process
/// sent come before any that were sent after its end.
const LAST_TURN: usize = 1 << 16;

/// How long a killed process is waited for.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// How often it is said that a killed process is still there, and it is killed again.
const KILL_AGAIN: Duration = Duration::from_secs(3);

/// Why the keeper cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// A part of it cannot be made.
    #[error("cannot make the {part}")]
    Part {
        /// The part.
        part: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket for messages cannot be made.
    #[error("there is no notification socket")]
    Inbox(#[from] InboxError),
    /// A socket cannot be made.
    #[error("a socket for the program is missing")]
    Listener(#[from] ListenerError),
    /// What the keeper before left cannot be used.
    #[error("the keeper before this one cannot be followed")]
    Handover(#[from] HandoverError),
}

/// What the keeper is waiting for, besides messages and signals.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// That the program ends, which nobody asked for.
    Running,
    /// That it is time for the next start.
    Waiting { until: Instant },
    /// That the program ends, to be started anew; it is killed if it takes too long, again and again.
    Restarting { kill_at: Instant, kills: u32 },
    /// That the program ends, and then the keeper does.
    Stopping { kill_at: Option<Instant>, end_at: Instant },
}

#[derive(Debug)]
struct Child {
    process: Pid,
    since: Instant,
    ready: bool,
}

/// Supervises one program.
#[derive(Debug)]
pub struct Supervisor {
    options: Options,
    /// The keeper's own program, as long as it was not replaced.
    own_program: PathBuf,
    log: Log,
    signals: std::os::fd::OwnedFd,
    inbox: Inbox,
    listeners: Vec<Listener>,
    store: Store,
    outer: Option<Sender>,
    oom_score: Option<i32>,
    child: Option<Child>,
    phase: Phase,
    backoff: Backoff,
    probe: Option<Probe>,
    strangers: u64,
    refused: u64,
    /// Messages of which descriptors could not be opened.
    lost: u64,
}

impl Supervisor {
    /// Makes everything that is needed, or takes over what the keeper before this one left under `handover`.
    pub fn new(options: Options, handover: Option<&str>, mut log: Log) -> Result<Self, KeeperError> {
        let failed = |part| move |source| KeeperError::Part { part, source };
        let signals = sys::signals().map_err(failed("signal descriptor"))?;
        let capacity = capacity(&options, &mut log);
        let outer = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty());
        let outer = outer.and_then(|socket| Address::parse(&socket).and_then(Sender::new).ok());
        let left = handover.map(Handover::take).transpose()?;
        let is_new = left.is_none();
        let left = left.unwrap_or_default();
        told(&left.faults, &mut log);
        let own_program = left.program.map_or_else(std::env::current_exe, Ok);
        let own_program = own_program.map_err(failed("path of the keeper itself"))?;
        let inbox = match left.inbox {
            Some((path, socket)) => Inbox::resume(path, socket),
            // Of a list that was torn, too: what is kept counts more than what the program says until its next start.
            None => Inbox::bind(&options.runtime_directory)?,
        };
        let listeners = if is_new {
            let listen = options.listen.iter().map(|(name, path)| Listener::bind(name, path));
            listen.collect::<Result<_, _>>()?
        } else {
            left.listeners
                .into_iter()
                .map(|(name, socket)| Listener::resume(name, socket))
                .collect()
        };
        let mut store = Store::new(capacity);
        for (name, descriptor) in left.kept {
            store.restore(&name, descriptor);
        }
        let oom_score = if is_new { lower(&mut log) } else { left.oom_score };
        Ok(Self {
            options,
            own_program,
            log,
            signals,
            inbox,
            listeners,
            store,
            outer,
            oom_score,
            child: left.child.map(|(process, ready)| Child {
                process,
                since: Instant::now(),
                ready,
            }),
            phase: if left.child.is_some() {
                Phase::Running
            } else {
                Phase::Waiting { until: Instant::now() }
            },
            backoff: Backoff::after(left.failures),
            probe: None,
            strangers: 0,
            refused: 0,
            lost: 0,
        })
    }

    /// Keeps until it is told to stop.
    pub fn run(mut self) {
        let (kept, capacity) = (self.store.len(), self.store.capacity());
        let fields = [
            ("version", env!("CARGO_PKG_VERSION").into()),
            ("kept", kept.into()),
            ("capacity", capacity.into()),
        ];
        self.log.info("keeping", &fields);
        loop {
            while let Some(signal) = sys::next_signal(&self.signals) {
                self.signal(signal);
            }
            self.receive(TURN);
            if self.reap() || self.is_time() {
                break;
            }
            self.wait();
        }
        let kept = self.store.len();
        self.log
            .info("stopped; what was kept is closed", &[("kept", kept.into())]);
    }

    fn wait(&mut self) {
        let next = match self.phase {
            Phase::Running => None,
            Phase::Waiting { until } => Some(until),
            Phase::Restarting { kill_at, .. } => Some(kill_at),
            Phase::Stopping { kill_at, end_at } => Some(kill_at.unwrap_or(end_at)),
        };
        let next = next.into_iter().chain(self.probe.as_ref().map(Probe::end)).min();
        let left = next.map(|next| next.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let (_, inbox) = self.inbox.handed();
        let mut sources = [
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::from_borrowed_fd(inbox, PollFlags::IN),
        ];
        if let Err(error) = poll(&mut sources, left.as_ref())
            && error != rustix::io::Errno::INTR
        {
            // It cannot be, and it must not become a loop without a pause.
            self.log.error(
                "cannot wait for events",
                &[("error", error.to_string().as_str().into())],
            );
            std::thread::sleep(PAUSE);
        }
    }

    fn signal(&mut self, signal: libc::c_int) {
        match signal {
            libc::SIGTERM | libc::SIGINT => self.stop(),
            libc::SIGHUP => self.restart(),
            libc::SIGUSR1 => self.probe(),
            // The end of a process is looked for in each turn.
            _ => {}
        }
    }

    fn stop(&mut self) {
        if matches!(self.phase, Phase::Stopping { .. }) {
            return;
        }
        self.log.info("stopping", &[]);
        self.tell("STOPPING=1");
        self.terminate();
        let kill_at = Instant::now() + self.options.stop_timeout;
        self.phase = Phase::Stopping {
            kill_at: Some(kill_at),
            end_at: kill_at + KILL_LIMIT,
        };
    }

    fn restart(&mut self) {
        match self.phase {
            Phase::Running => {
                self.log.info("the program is started anew, as asked", &[]);
                self.terminate();
                self.phase = Phase::Restarting {
                    kill_at: Instant::now() + self.options.stop_timeout,
                    kills: 0,
                };
            }
            Phase::Waiting { .. } => self.phase = Phase::Waiting { until: Instant::now() },
            Phase::Restarting { .. } | Phase::Stopping { .. } => {}
        }
    }

    fn terminate(&mut self) {
        self.send_signal(Signal::TERM);
    }

    fn send_signal(&mut self, signal: Signal) {
        // It is not reaped yet, so the number is nobody else's.
        if let Some(child) = &self.child
            && let Err(error) = kill_process(child.process, signal)
        {
            self.log.error(
                "the program gets no signal",
                &[("error", error.to_string().as_str().into())],
            );
        }
    }

    /// Does what is due. `true` when the keeper has to end.
    fn is_time(&mut self) -> bool {
        let now = Instant::now();
        let is_due = |kill_at: Option<Instant>| kill_at.is_some_and(|kill_at| kill_at <= now);
        self.end_probe(now);
        match self.phase {
            Phase::Waiting { until } if until <= now => self.launch(),
            Phase::Restarting { kill_at, kills } if kill_at <= now => {
                self.kill(kills);
                self.phase = Phase::Restarting {
                    kill_at: now + KILL_AGAIN,
                    kills: kills.saturating_add(1),
                };
            }
            Phase::Stopping { .. } if self.child.is_none() => return true,
            Phase::Stopping { kill_at, end_at } if is_due(kill_at) => {
                self.kill(0);
                self.phase = Phase::Stopping { kill_at: None, end_at };
            }
            Phase::Stopping { end_at, .. } if end_at <= now => {
                let process = self.child_number();
                self.log.error(
                    "the program does not end even when killed, and is left behind",
                    &[("process", process)],
                );
                return true;
            }
            _ => {}
        }
        false
    }

    fn kill(&mut self, kills: u32) {
        let process = ("process", self.child_number());
        if kills == 0 {
            let limit = Value::Number(self.options.stop_timeout.as_secs());
            let fields = [process, ("seconds", limit)];
            self.log.warn("the program did not end in time and is killed", &fields);
        } else {
            // It waits in the kernel for something that only its successor could give it, or for a disk.
            let fields = [process, ("kills", Value::Number(kills.into()))];
            self.log.error("the program was killed and is still there", &fields);
        }
        self.send_signal(Signal::KILL);
    }

    fn child_number(&self) -> Value<'static> {
        let number = self.child.as_ref().map_or(0, |child| child.process.as_raw_pid());
        Value::Number(u64::try_from(number).unwrap_or_default())
    }

    fn launch(&mut self) {
        let listeners = self.listeners.iter().map(Listener::handed);
        let plan = Plan {
            program: &self.options.program,
            opened: None,
            socket: self.inbox.variable(),
            capacity: self.store.capacity(),
            descriptors: listeners.chain(self.store.iter()).collect(),
            oom_score: self.oom_score,
        };
        match plan.start() {
            Ok(process) => {
                let number = u64::try_from(process.as_raw_pid()).unwrap_or_default();
                let fields = [("process", Value::Number(number)), ("kept", self.store.len().into())];
                self.log.info("the program is started", &fields);
                self.child = Some(Child {
                    process,
                    since: Instant::now(),
                    ready: false,
                });
                self.phase = Phase::Running;
            }
            Err(error) => {
                let pause = self.backoff.pause(Duration::ZERO, false);
                let fields = [("error", error.to_string()), ("next_start_in", format!("{pause:?}"))];
                let fields = fields.each_ref().map(|(name, text)| (*name, text.as_str().into()));
                self.log.error("no process can be made for the program", &fields);
                self.phase = Phase::Waiting {
                    until: Instant::now() + pause,
                };
            }
        }
    }

    /// Looks for processes that ended. `true` when the keeper has to end.
    fn reap(&mut self) -> bool {
        let mut over = false;
        if let Some(process) = self.child.as_ref().map(|child| child.process) {
            // It stays a zombie until everything that it sent is read: what it left to be kept must not be lost.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            match waitid(WaitId::Pid(process), options) {
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => {
                    self.receive(LAST_TURN);
                    let status = rustix::process::waitpid(Some(process), WaitOptions::NOHANG);
                    over |= self.ended(status.ok().flatten().map(|(_, status)| status));
                }
            }
        }
        // Others are the probe, and orphans where the keeper is the first process of a container.
        while let Ok(Some((process, status))) = wait(WaitOptions::NOHANG) {
            if self.child.as_ref().is_some_and(|child| child.process == process) {
                self.receive(LAST_TURN);
                over |= self.ended(Some(status));
            } else {
                self.probe_ended(process, status);
            }
        }
        over
    }

    fn ended(&mut self, status: Option<WaitStatus>) -> bool {
        let Some(child) = self.child.take() else {
            return false;
        };
        let how = match status.map(|status| (status.exit_status(), status.terminating_signal())) {
            Some((Some(code), _)) => format!("exit code {code}"),
            Some((_, Some(signal))) => format!("signal {signal}"),
            _ => "unknown".to_owned(),
        };
        let now = Instant::now();
        let pause = match self.phase {
            Phase::Stopping { .. } => {
                self.log.info("the program ended", &[("by", how.as_str().into())]);
                return true;
            }
            Phase::Restarting { .. } => Duration::ZERO,
            Phase::Running | Phase::Waiting { .. } => self.backoff.pause(now - child.since, child.ready),
        };
        let fields = [
            ("by", how),
            ("ran", format!("{:?}", now - child.since)),
            ("next_start_in", format!("{pause:?}")),
        ];
        let fields = fields.each_ref().map(|(name, text)| (*name, text.as_str().into()));
        if matches!(self.phase, Phase::Restarting { .. }) {
            self.log.info("the program ended, as asked", &fields);
        } else {
            self.log.warn("the program ended, and is started again", &fields);
        }
        self.phase = Phase::Waiting { until: now + pause };
        false
    }
}

/// Says what of a handover could not be used.
fn told(faults: &Faults, log: &mut Log) {
    let count = faults.count;
    for fault in &faults.told {
        let fields = [("fault", fault.as_str().into()), ("faults", count.into())];
        log.error("something that the keeper before this one left is lost", &fields);
    }
}
