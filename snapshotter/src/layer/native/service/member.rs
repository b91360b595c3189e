//! A layer whose readers ask, and the answers they get.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use estargz::digest::Digest;
use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};

use super::{Inner, REST, is_passing};
use crate::layer::cache::CachedLayer;
use crate::layer::fault;
use crate::layer::fetch::LayerFetch;
use crate::layer::native::group::{Answer, Group};
use crate::layer::native::journal::{Received, Slot};
use crate::layer::native::sys;

/// Beyond any number of descriptors that a process may have.
pub(super) const MAX_NUMBER: i32 = 1 << 20;

/// A layer whose readers ask. There is at most one of a layer.
pub struct Member {
    pub(super) token: u64,
    pub(super) toc: Digest,
    pub(super) group: Group,
    pub(super) slot: Option<Slot>,
    fetch: Mutex<Option<Arc<LayerFetch>>>,
    pub(super) inner: Arc<Inner>,
    /// Events of a predecessor whose numbers this process uses otherwise: new ones could get the same.
    pub(super) blocking: AtomicUsize,
    /// Held while events are read and taken: the inbox is one reader's.
    pub(super) reading: Mutex<()>,
    retired: AtomicBool,
}

impl Member {
    pub(super) fn new(inner: &Arc<Inner>, token: u64, toc: Digest, group: Group, slot: Slot) -> Self {
        Self {
            token,
            toc,
            group,
            slot: Some(slot),
            fetch: Mutex::default(),
            inner: inner.clone(),
            blocking: AtomicUsize::new(0),
            reading: Mutex::default(),
            retired: AtomicBool::new(false),
        }
    }

    /// Who fetches what readers ask for; none where all that is asked is denied.
    pub(super) fn fetch(&self) -> Option<Arc<LayerFetch>> {
        self.fetch.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on `fetch` fetches what readers ask for.
    pub fn fetch_by(&self, fetch: Arc<LayerFetch>) {
        *self.fetch.lock().unwrap_or_else(PoisonError::into_inner) = Some(fetch);
    }

    /// Sees to it that whoever opens `data` from now on asks. A mark that is there already stays.
    pub fn mark(&self, data: &File) -> io::Result<()> {
        self.group.mark(data)
    }

    /// Notes for a successor how many file systems there are of the layer.
    pub fn note_systems(&self, count: usize) {
        if let Some(slot) = &self.slot {
            slot.note_systems(count);
        }
    }

    /// How many file systems a predecessor noted.
    pub fn noted_systems(&self) -> usize {
        self.slot.as_ref().map_or(0, Slot::noted_systems)
    }

    /// Takes the mark away, answers what came before, and forgets the layer. Only for a layer that is complete, or that nobody has
    /// mounted: whoever asks now is allowed.
    pub fn retire(self: &Arc<Self>, layer: &CachedLayer) -> io::Result<()> {
        fault::point("native-whole");
        self.group.unmark(layer.content())?;
        fault::point("native-unmarked");
        if let Some(slot) = &self.slot {
            self.drain(slot)?;
        }
        self.quit();
        Ok(())
    }

    /// Forgets the layer, of which nobody can ask anything any more.
    pub fn quit(&self) {
        if let Some(slot) = &self.slot {
            // What still waits for an answer may take its time, and the layer may be mounted anew before.
            slot.void();
        }
        self.inner.members().remove(&self.token);
        // Gone with the last who has the group open, at the latest.
        let _ = epoll::delete(&self.inner.epoll, &self.group);
        self.retired.store(true, Ordering::Release);
    }

    /// Takes all events that there are.
    fn drain(self: &Arc<Self>, slot: &Slot) -> io::Result<()> {
        loop {
            let received = {
                let _alone = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
                let received = slot.receive(self.group.as_fd(), usize::MAX);
                match received {
                    Ok(Received::Events(events)) if !events.is_empty() => {
                        events.into_iter().for_each(|event| self.inner.take(self, event));
                        continue;
                    }
                    other => other,
                }
            };
            match received {
                Ok(Received::Full) => std::thread::sleep(REST),
                Ok(Received::Events(_) | Received::Nothing) => return Ok(()),
                Err(error) if is_passing(&error) => std::thread::sleep(REST),
                Err(error) => return Err(error),
            }
        }
    }

    fn answer(&self, number: i32, ownership: Ownership, answer: Answer) {
        if let Err(error) = self.group.answer(number, answer) {
            tracing::error!(toc = %self.toc, number, ?answer, %error, "the kernel refused an answer");
        }
        fault::point("event-answered");
        if let Some(slot) = &self.slot {
            slot.forget(number);
        }
        fault::point("event-forgotten");
        // Not before: its number must not come up again while the journal has it.
        match ownership {
            Ownership::Ours => sys::close_event(number),
            Ownership::Foreign => {
                if self.blocking.fetch_sub(1, Ordering::AcqRel) == 1 {
                    self.inner.listen(self);
                }
            }
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if self.inner.leaving.load(Ordering::Acquire) && !self.retired.load(Ordering::Acquire) {
            // A successor needs it.
            return;
        }
        if let Some(slot) = self.slot.take() {
            slot.release();
        }
    }
}

/// Whose descriptor has the number of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ownership {
    /// The event's: it is closed when the event has been answered.
    Ours,
    /// Something else's, since a predecessor read the event.
    Foreign,
}

/// The duty to answer an event. What is dropped without an answer is denied; or left to a successor, if one is to come.
pub(super) struct Question {
    member: Arc<Member>,
    number: i32,
    ownership: Ownership,
    /// Who waits, in our namespace of processes.
    pub(super) pid: i32,
    answered: bool,
    counted: bool,
}

impl Question {
    pub(super) fn new(member: &Arc<Member>, number: i32, ownership: Ownership, pid: i32) -> Self {
        Self {
            member: member.clone(),
            number,
            ownership,
            pid,
            answered: false,
            counted: false,
        }
    }

    /// Counts among those that are worked on, until it is answered.
    pub(super) fn count(&mut self) {
        if !std::mem::replace(&mut self.counted, true) {
            self.member.inner.pending.fetch_add(1, Ordering::AcqRel);
        }
    }

    pub(super) fn answer(mut self, answer: Answer) {
        self.give(answer);
    }

    fn give(&mut self, answer: Answer) {
        self.answered = true;
        self.member.answer(self.number, self.ownership, answer);
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if !self.answered && !self.member.inner.leaving.load(Ordering::Acquire) {
            self.give(Answer::Deny);
        }
        if self.counted {
            self.member.inner.pending.fetch_sub(1, Ordering::AcqRel);
            self.member.inner.feed();
        }
    }
}

/// Occupies a number, so that no event gets it; whether it was free.
pub(super) fn reserve(number: i32) -> bool {
    let place = rustix::fs::open(c"/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let reserved = place.and_then(|place| rustix::io::fcntl_dupfd_cloexec(place, number));
    match reserved {
        Ok(fd) => {
            let is_it = fd.as_raw_fd() == number;
            if is_it {
                // Closed with the event.
                let _ = fd.into_raw_fd();
            }
            is_it
        }
        Err(_) => false,
    }
}
