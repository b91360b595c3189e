//! The journal of events: shared memory in which a successor finds what was read from a group and not answered.
//!
//! The kernel forgets an event's question once it has been read, and remembers only that somebody waits for an answer with its number.
//! So events are read *into* the journal: there is no moment at which one is known to a process alone. Each layer has a slot with an
//! inbox, which the kernel fills, and a table of those that are being worked on. An event moves from the one to the other, and leaves the
//! table when it has been answered:
//!
//! 1. a read fills the inbox;
//! 2. each event in it is entered into the table, unless it is there;
//! 3. the inbox is cleared;
//! 4. when an event was answered, its entry goes; only then its descriptor is closed.
//!
//! Whoever dies between two steps leaves what a successor can repeat: an event in both places is entered once, and one that was answered
//! already is answered again, which the kernel refuses without harm, because its number cannot have come up again before step 4.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use estargz::digest::Digest;
use rustix::fs::{MemfdFlags, SealFlags};

use super::event::{Asked, EVENT_BYTES, Event, events};
use super::sys::SharedWords;
use crate::layer::fault;

/// Most layers with a slot.
pub const SLOTS: usize = 2048;
/// Words of a slot.
const SLOT: usize = 1024;
/// Its first word in a slot that is in use: a form of the slot that is known.
const FORM: u64 = u64::from_be_bytes(*b"HULLJNL\x01");
/// Where the layer's digest is.
const NAME: std::ops::Range<usize> = 1..5;
/// Where it is noted how many file systems there are of the layer.
const SYSTEMS: usize = 5;
/// Where the kernel puts events.
const INBOX: std::ops::Range<usize> = 16..256;
/// Where events are that are worked on: two words each.
const TABLE: std::ops::Range<usize> = 256..SLOT;
/// Events of one layer that are worked on at once; the others wait in the kernel's queue.
pub const MAX_PENDING: usize = (TABLE.end - TABLE.start) / 2;
/// More file systems of one layer than are believed.
const MAX_SYSTEMS: usize = 1024;
/// Words of one event in the inbox.
const EVENT_WORDS: usize = EVENT_BYTES / size_of::<u64>();

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The memory cannot be had.
    #[error("the memory for the journal of events cannot be had")]
    Memory(#[source] io::Error),
    /// What a predecessor left has another length.
    #[error("the journal of events has {found} bytes instead of {expected}")]
    Length {
        /// Bytes of a journal.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
}

/// The journal of all layers.
#[derive(Debug)]
pub struct Journal {
    file: OwnedFd,
    words: SharedWords,
    /// Slots that this process uses.
    claimed: Mutex<Vec<bool>>,
}

impl Journal {
    /// An empty one.
    pub fn new() -> Result<Self, JournalError> {
        let bytes = Self::bytes();
        let file = rustix::fs::memfd_create("hullspeed-journal", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .and_then(|file| {
                rustix::fs::ftruncate(&file, bytes)?;
                rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
                Ok(file)
            })
            .map_err(|errno| JournalError::Memory(errno.into()))?;
        Self::over(file)
    }

    /// The one that a predecessor left.
    pub fn kept(file: OwnedFd) -> Result<Self, JournalError> {
        let stat = rustix::fs::fstat(&file).map_err(|errno| JournalError::Memory(errno.into()))?;
        let found = u64::try_from(stat.st_size).unwrap_or(0);
        // Whoever could cut it short under the mapping would kill us.
        let sealed = rustix::fs::fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if found != Self::bytes() || !sealed {
            return Err(JournalError::Length {
                expected: Self::bytes(),
                found,
            });
        }
        Self::over(file)
    }

    fn over(file: OwnedFd) -> Result<Self, JournalError> {
        let words = SharedWords::map(file.as_fd(), SLOTS * SLOT).map_err(JournalError::Memory)?;
        Ok(Self {
            file,
            words,
            claimed: Mutex::new(vec![false; SLOTS]),
        })
    }

    fn bytes() -> u64 {
        (SLOTS * SLOT * size_of::<u64>()) as u64
    }

    fn words(&self, slot: usize) -> &[AtomicU64] {
        self.words
            .words()
            .get(slot * SLOT..(slot + 1) * SLOT)
            .unwrap_or_default()
    }

    fn is_of(&self, slot: usize, layer: &Digest) -> bool {
        let words = self.words(slot);
        let name = || words[NAME].iter().map(|word| word.load(Ordering::Acquire));
        words[0].load(Ordering::Acquire) == FORM && name().eq(name_of(layer))
    }

    /// The layers of which there are slots that nobody has taken.
    pub fn layers(&self) -> Vec<Digest> {
        let claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = (0..SLOTS).filter(|&slot| !claimed[slot] && self.words(slot)[0].load(Ordering::Acquire) == FORM);
        let name = |slot: usize| {
            let mut name = [0; 32];
            for (bytes, word) in name.chunks_exact_mut(8).zip(&self.words(slot)[NAME]) {
                bytes.copy_from_slice(&word.load(Ordering::Acquire).to_be_bytes());
            }
            Digest::from_bytes(name)
        };
        slots.map(name).collect()
    }

    /// The slot of a layer that a predecessor served, with what it left.
    pub fn resume(self: &Arc<Self>, layer: &Digest) -> Option<Slot> {
        let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        let found = (0..SLOTS).find(|&slot| !claimed[slot] && self.is_of(slot, layer))?;
        claimed[found] = true;
        let slot = Slot {
            journal: self.clone(),
            index: found,
            used: AtomicUsize::new(0),
        };
        slot.used.store(slot.occupied(), Ordering::Release);
        Some(slot)
    }

    /// A slot for a layer whose group is new; `None` if all are in use.
    pub fn claim(self: &Arc<Self>, layer: &Digest) -> Option<Slot> {
        let free = {
            let mut claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
            // What was noted for another group of the layer must not be taken for this one's.
            let others = (0..SLOTS).filter(|&slot| !claimed[slot] && self.is_of(slot, layer));
            others.for_each(|slot| self.words(slot)[0].store(0, Ordering::Release));
            // Those that a predecessor left are not free before it is known that nobody waits in them.
            let free = (0..SLOTS).find(|&slot| !claimed[slot] && self.words(slot)[0].load(Ordering::Acquire) == 0)?;
            claimed[free] = true;
            free
        };
        let words = self.words(free);
        words[1..].iter().for_each(|word| word.store(0, Ordering::Relaxed));
        for (word, part) in words[NAME].iter().zip(name_of(layer)) {
            word.store(part, Ordering::Relaxed);
        }
        words[0].store(FORM, Ordering::Release);
        Some(Slot {
            journal: self.clone(),
            index: free,
            used: AtomicUsize::new(0),
        })
    }

    /// Frees the slots that a predecessor left and nobody has resumed: their groups are gone.
    pub fn sweep(&self) {
        let claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in (0..SLOTS).filter(|&slot| !claimed[slot]) {
            // A page that nobody has touched stays untouched.
            if self.words(slot)[0].load(Ordering::Acquire) != 0 {
                self.words(slot)[0].store(0, Ordering::Release);
            }
        }
    }
}

fn clear(words: &[AtomicU64]) {
    words.iter().for_each(|word| word.store(0, Ordering::Release));
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn name_of(layer: &Digest) -> [u64; 4] {
    let mut name = [0; 4];
    for (word, bytes) in name.iter_mut().zip(layer.as_bytes().chunks_exact(8)) {
        *word = bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    }
    name
}

/// An event that somebody works on, or did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The number that names it in its answer.
    pub number: i32,
    /// What is asked.
    pub asked: Asked,
}

impl Entry {
    /// Table form. The first word is not 0 in an entry that is in use: numbers count from one there, and a length that does not fit
    /// (no kernel asks for so much) is the longest.
    fn words(self) -> Option<[u64; 2]> {
        let number = u64::try_from(self.number).ok()?.checked_add(1)? << 32;
        Some(match self.asked {
            Asked::Range { offset, count } => [number | count.min(u64::from(u32::MAX)), offset],
            Asked::Unknown { .. } => [number, 0],
        })
    }

    fn from_words([first, second]: [u64; 2]) -> Option<Self> {
        let number = i32::try_from((first >> 32).checked_sub(1)?).ok()?;
        let asked = match first & u64::from(u32::MAX) {
            0 => Asked::Unknown { mask: 0 },
            count => Asked::Range { offset: second, count },
        };
        Some(Self { number, asked })
    }
}

/// What a read from the group brought.
#[derive(Debug)]
pub enum Received {
    /// Events, all of them in the table now.
    Events(Vec<Event>),
    /// There are none.
    Nothing,
    /// There is no room for more before some are answered.
    Full,
}

/// One layer's part of the journal.
#[derive(Debug)]
pub struct Slot {
    journal: Arc<Journal>,
    index: usize,
    /// Entries of the table that are in use, as far as this process knows: counting them takes as long as everything else.
    used: AtomicUsize,
}

impl Slot {
    fn words(&self) -> &[AtomicU64] {
        self.journal.words(self.index)
    }

    fn table(&self) -> impl Iterator<Item = &[AtomicU64]> {
        self.words().get(TABLE).unwrap_or_default().chunks_exact(2)
    }

    /// The table from where an event of this number is put if there is room, so that it is mostly found at once.
    fn table_from(&self, number: i32) -> impl Iterator<Item = &[AtomicU64]> {
        let first = usize::try_from(number).unwrap_or(0) % MAX_PENDING;
        self.table().skip(first).chain(self.table().take(first))
    }

    fn occupied(&self) -> usize {
        self.table()
            .filter(|entry| entry[0].load(Ordering::Acquire) != 0)
            .count()
    }

    fn entries(&self) -> impl Iterator<Item = Entry> {
        let words = |entry: &[AtomicU64]| [entry[0].load(Ordering::Acquire), entry[1].load(Ordering::Acquire)];
        self.table().filter_map(move |entry| Entry::from_words(words(entry)))
    }

    /// Reads at most `most` events from the group and enters them. Only one thread at a time may call this.
    pub fn receive(&self, group: BorrowedFd<'_>, most: usize) -> io::Result<Received> {
        let free = MAX_PENDING.saturating_sub(self.used.load(Ordering::Acquire));
        let inbox = self.words().get(INBOX).unwrap_or_default();
        // Never more than the table has room for, so that the inbox is always emptied.
        let room = free.min(most).min(inbox.len() / EVENT_WORDS);
        if room == 0 {
            return Ok(Received::Full);
        }
        let read = match SharedWords::read_into(&inbox[..room * EVENT_WORDS], group) {
            Ok(read) => read.div_ceil(size_of::<u64>()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
            Err(error) => return Err(error),
        };
        fault::point("event-read");
        let found = Self::events_in(&inbox[..read.min(inbox.len())]);
        // Their numbers are open in this process, and none that is in the table is.
        found.iter().for_each(|event| self.enter(event));
        fault::point("event-entered");
        // What the read did not fill is empty.
        clear(&inbox[..read.min(inbox.len())]);
        fault::point("event-taken");
        Ok(Received::Events(found))
    }

    /// What a predecessor read and did not answer, as far as it noted.
    pub fn left(&self) -> Vec<Entry> {
        let inbox = self.words().get(INBOX).unwrap_or_default();
        for event in Self::events_in(inbox) {
            // It died before it cleared the inbox.
            if self.entries().all(|entry| entry.number != event.fd) {
                self.enter(&event);
            }
        }
        clear(inbox);
        self.used.store(self.occupied(), Ordering::Release);
        self.entries().collect()
    }

    fn events_in(inbox: &[AtomicU64]) -> Vec<Event> {
        let mut bytes = [0; (INBOX.end - INBOX.start) * size_of::<u64>()];
        for (bytes, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(inbox) {
            bytes.copy_from_slice(&word.load(Ordering::Acquire).to_ne_bytes());
        }
        let length = size_of_val(inbox).min(bytes.len());
        events(&bytes[..length]).collect()
    }

    fn enter(&self, event: &Event) {
        let entry = Entry {
            number: event.fd,
            asked: event.asked,
        };
        let Some([first, second]) = entry.words() else { return };
        let mut places = self.table_from(event.fd);
        let Some(free) = places.find(|entry| entry[0].load(Ordering::Acquire) == 0) else {
            // Only in what another version left, which read more than there is room for.
            tracing::error!(
                number = event.fd,
                "the journal of events is full; a reader may wait until it is killed"
            );
            return;
        };
        free[1].store(second, Ordering::Relaxed);
        free[0].store(first, Ordering::Release);
        self.used.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether an event is in the table, whichever process entered it.
    pub fn is_occupied(&self) -> bool {
        self.entries().next().is_some()
    }

    /// The event of this number was answered.
    pub fn forget(&self, number: i32) {
        let Some([first, _]) = (Entry {
            number,
            asked: Asked::Unknown { mask: 0 },
        })
        .words() else {
            return;
        };
        let mut places = self.table_from(number);
        let is_it = |entry: &&[AtomicU64]| entry[0].load(Ordering::Acquire) >> 32 == first >> 32;
        if let Some(entry) = places.find(is_it) {
            entry[0].store(0, Ordering::Release);
            self.used.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Notes for a successor how many file systems there are of the layer.
    pub fn note_systems(&self, count: usize) {
        self.words()[SYSTEMS].store(count as u64, Ordering::Release);
    }

    /// How many a predecessor noted.
    pub fn noted_systems(&self) -> usize {
        let noted = usize::try_from(self.words()[SYSTEMS].load(Ordering::Acquire));
        noted.unwrap_or(MAX_SYSTEMS).min(MAX_SYSTEMS)
    }

    /// No successor is to go on with it: the layer's group is about to go.
    pub fn void(&self) {
        self.words()[0].store(0, Ordering::Release);
    }

    /// Gives the slot back: the layer's group is gone.
    pub fn release(self) {
        self.words()[0].store(0, Ordering::Release);
        let mut claimed = self.journal.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        claimed[self.index] = false;
    }
}

#[cfg(test)]
mod tests;
