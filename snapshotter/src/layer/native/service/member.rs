//! A layer whose readers ask, and the answers they get.

use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};

use super::{Inner, REST, is_passing};
use crate::layer::fetch::LayerFetch;
use crate::layer::native::group::{Answer, Group};
use crate::layer::native::journal::{Received, Slot};
use crate::layer::native::sys;

/// A layer whose readers ask.
pub struct Member {
    pub(super) token: u64,
    pub(super) group: Group,
    pub(super) slot: Option<Slot>,
    pub(super) fetch: Arc<LayerFetch>,
    pub(super) inner: Arc<Inner>,
    /// Events of a predecessor whose numbers this process uses otherwise: new ones could get the same.
    pub(super) blocking: AtomicUsize,
}

/// Beyond any number of descriptors that a process may have.
pub(super) const MAX_NUMBER: i32 = 1 << 20;

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

/// Whose descriptor has the number of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ownership {
    /// The event's: it is closed when the event has been answered.
    Ours,
    /// Something else's, since a predecessor read the event.
    Foreign,
}

/// An event that waits for its answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    pub(super) number: i32,
    pub(super) pid: i32,
    pub(super) ownership: Ownership,
}

impl Member {
    /// The layer.
    pub fn fetch(&self) -> &Arc<LayerFetch> {
        &self.fetch
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Takes the mark away, answers what came before, and forgets the layer. Only for a layer that is complete, or that nobody has
    /// mounted: whoever asks now is allowed.
    pub fn retire(self: Arc<Self>) -> io::Result<()> {
        self.group.unmark(self.fetch.layer().content())?;
        self.inner.members().remove(&self.token);
        // Gone with the last who has the group open, at the latest.
        let _ = epoll::delete(&self.inner.epoll, &self.group);
        let Some(slot) = &self.slot else { return Ok(()) };
        loop {
            match slot.receive(self.group.as_fd(), usize::MAX) {
                Ok(Received::Events(events)) if !events.is_empty() => {
                    events.into_iter().for_each(|event| self.inner.take(&self, event));
                }
                Ok(Received::Full) => std::thread::sleep(REST),
                Ok(Received::Events(_) | Received::Nothing) => return Ok(()),
                Err(error) if is_passing(&error) => std::thread::sleep(REST),
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn answer(&self, question: Question, answer: Answer) {
        if let Err(error) = self.group.answer(question.number, answer) {
            tracing::error!(toc = %self.fetch.layer().toc_digest(), number = question.number, ?answer, %error,
                "the kernel refused an answer");
        }
        if let Some(slot) = &self.slot {
            slot.forget(question.number);
        }
        // Not before: its number must not come up again while the journal has it.
        match question.ownership {
            Ownership::Ours => sys::close_event(question.number),
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
        if self.inner.leaving.load(Ordering::Acquire) {
            // A successor needs it.
            return;
        }
        if let Some(slot) = self.slot.take() {
            slot.release();
        }
    }
}
