//! Who waits for a layer: processes, and the pods and containers they belong to.
//!
//! Only reads that had to wait are noted. [`Readers::note`] adds to a small map and returns; `/proc` is looked at by one task on the
//! runtime's pool of blocking threads, for all that came meanwhile, and then not again for the same process for a moment: waking a thread
//! costs more than all the rest. A process may have ended before it is looked at, and is unknown: the numbers are right, and most names are.

mod process;
mod table;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::runtime::Handle;

use process::Processes;
use table::Table;

/// Readers of one layer that are told apart; the one that waited longest ago makes room.
pub const MAX_READERS: usize = 64;
/// Processes that are noted between two looks at `/proc`; further ones count as unknown.
const MAX_NOTED: usize = 256;
/// How long a process is taken for what it was when it was looked at. No longer: it may execute another program.
const FRESH: Duration = Duration::from_millis(20);
/// The process that stands for those that nobody knows: of another namespace, or too many at once.
const UNKNOWN: i32 = 0;

/// The UID of a pod, as Kubernetes has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PodUid(String);

/// The id of a container, as its runtime has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContainerId(String);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Who reads. All processes of one container that run the same command are one reader.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Reader {
    /// The pod, where its control groups are the kubelet's.
    pub pod: Option<PodUid>,
    /// The container, where the process is in one.
    pub container: Option<ContainerId>,
    /// The command's name, at most 15 bytes; empty where the process had ended before it was looked at.
    pub command: String,
}

/// What one reader has waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderReport {
    /// Who.
    pub reader: Reader,
    /// The same in numbers.
    pub waits: Waits,
}

/// Reads that waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waits {
    /// How many.
    pub reads: u64,
    /// How much was read by them.
    pub bytes: u64,
    /// How long they waited, all together.
    pub waited: Duration,
    /// When the first of them ended.
    pub first: SystemTime,
    /// When the last of them ended.
    pub last: SystemTime,
}

impl Waits {
    fn add(&mut self, other: &Self) {
        self.reads = self.reads.saturating_add(other.reads);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.waited = self.waited.saturating_add(other.waited);
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
    }
}

/// The readers of one layer.
#[derive(Debug)]
pub struct Readers {
    shared: Arc<Shared>,
    runtime: Handle,
}

#[derive(Debug)]
struct Shared {
    noted: Mutex<Noted>,
    /// Locked before `noted` where both are needed; never by who notes.
    known: Mutex<Known>,
    /// How long a process is taken for what it was.
    fresh: Duration,
}

/// What came since it was settled last.
#[derive(Debug, Default)]
struct Noted {
    /// Of processes that are to be looked at.
    processes: HashMap<i32, Waits>,
    /// Of processes that have just been.
    fresh: HashMap<i32, Fresh>,
    /// Whether somebody is about to look.
    looking: bool,
}

/// A process that has just been looked at.
#[derive(Debug)]
struct Fresh {
    reader: Reader,
    until: Instant,
    waits: Option<Waits>,
}

impl Noted {
    /// Moves what needs no look into the table.
    fn settle(&mut self, table: &mut Table) {
        for fresh in self.fresh.values_mut() {
            if let Some(waits) = fresh.waits.take() {
                table.add(fresh.reader.clone(), &waits);
            }
        }
    }

    /// Knows this process for a moment.
    fn remember(&mut self, pid: i32, fresh: Fresh, table: &mut Table) {
        if self.fresh.len() >= MAX_NOTED {
            self.settle(table);
            self.fresh.clear();
        }
        self.fresh.insert(pid, fresh);
    }
}

#[derive(Debug)]
struct Known {
    table: Table,
    processes: Processes,
}

impl Readers {
    /// Nobody has read yet. `/proc` is looked at on a thread of `runtime`.
    pub fn new(runtime: Handle) -> Self {
        Self::within(PathBuf::from("/proc"), FRESH, runtime)
    }

    fn within(proc: PathBuf, fresh: Duration, runtime: Handle) -> Self {
        let known = Known {
            table: Table::default(),
            processes: Processes::within(proc),
        };
        Self {
            shared: Arc::new(Shared {
                noted: Mutex::default(),
                known: Mutex::new(known),
                fresh,
            }),
            runtime,
        }
    }

    /// Notes that the process waited so long for so many bytes. Returns at once.
    pub fn note(&self, pid: i32, bytes: u64, waited: Duration) {
        let now = SystemTime::now();
        let waits = Waits {
            reads: 1,
            bytes,
            waited,
            first: now,
            last: now,
        };
        let mut noted = lock(&self.shared.noted);
        let fresh = noted.fresh.get_mut(&pid);
        if let Some(fresh) = fresh.filter(|fresh| Instant::now() < fresh.until) {
            match &mut fresh.waits {
                Some(known) => known.add(&waits),
                none => *none = Some(waits),
            }
            return;
        }
        let is_room = noted.processes.len() < MAX_NOTED || noted.processes.contains_key(&pid);
        let process = if is_room && pid > 0 { pid } else { UNKNOWN };
        noted
            .processes
            .entry(process)
            .and_modify(|known| known.add(&waits))
            .or_insert(waits);
        if std::mem::replace(&mut noted.looking, true) {
            return;
        }
        drop(noted);
        let shared = self.shared.clone();
        self.runtime.spawn_blocking(move || shared.look());
    }

    /// The readers that are known, those first that have waited longest.
    pub fn report(&self) -> Vec<ReaderReport> {
        let mut known = lock(&self.shared.known);
        lock(&self.shared.noted).settle(&mut known.table);
        known.table.report()
    }
}

impl Shared {
    /// Finds out who the processes are that were noted, until there are none.
    fn look(&self) {
        loop {
            let mut known = lock(&self.known);
            let noted = {
                let mut noted = lock(&self.noted);
                noted.settle(&mut known.table);
                if noted.processes.is_empty() {
                    noted.looking = false;
                    return;
                }
                std::mem::take(&mut noted.processes)
            };
            let Known { table, processes } = &mut *known;
            for (pid, waits) in noted {
                let until = Instant::now() + self.fresh;
                let reader = processes.reader(pid);
                table.add(reader.clone(), &waits);
                let fresh = Fresh {
                    reader,
                    until,
                    waits: None,
                };
                lock(&self.noted).remember(pid, fresh, table);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // It counts; whatever it holds is of use.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
