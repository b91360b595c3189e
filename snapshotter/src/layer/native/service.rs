//! Answers the kernel's questions about the layers that it serves itself.
//!
//! One thread reads the events of all groups. What is resident it allows at once; what is not is fetched on the runtime, and answered
//! there. Whatever is not understood is denied. A layer whose table in the journal is full is not read from until there is room, and all
//! layers together take no more than a part of the descriptors that there are: readers wait in the kernel's queue, and get no error for it.
//! (When there is no descriptor for an event, the kernel itself denies it.)

mod member;

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use tokio::runtime::Handle;

pub use self::member::Member;
use self::member::{MAX_NUMBER, Ownership, Question, reserve};
use super::event::{Asked, Event};
use super::group::{Answer, Group};
use super::journal::{Entry, Journal, Received, Slot};
use crate::layer::fault;
use crate::layer::fetch::{LayerFetch, Reading};
use crate::metrics::Metrics;
use crate::metrics::defs::{NativeEventLabels, NativeOutcome};

/// Groups that the thread hears of with one call.
const READY: usize = 64;
/// The token of what wakes the thread.
const WAKE: u64 = u64::MAX;
/// How long a group rests that cannot be read from.
const REST: Duration = Duration::from_millis(20);
/// The share of the descriptors that this process may have which events may take.
const SHARE: u64 = 4;
/// Events of all layers together that are worked on at once.
const MAX_EVENTS: u64 = 8192;
/// A read of a file's beginning that is as long as this is one of many: headers are shorter.
const FRONT: u64 = 128 << 10;

/// The service: one for all layers of the daemon.
#[derive(Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

struct Inner {
    journal: Arc<Journal>,
    epoll: OwnedFd,
    wake: OwnedFd,
    runtime: Handle,
    metrics: Metrics,
    members: Mutex<HashMap<u64, Arc<Member>>>,
    next: AtomicU64,
    /// Events that are worked on.
    pending: AtomicUsize,
    most: usize,
    /// Groups that are not read from before an event was answered.
    starved: Mutex<Vec<u64>>,
    /// Set when a successor is to go on with what is pending.
    leaving: AtomicBool,
    ended: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Service {
    /// Starts the service; events of layers that join are noted in `journal`.
    pub fn start(journal: Arc<Journal>, metrics: Metrics, runtime: Handle) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let most = descriptors.map_or(MAX_EVENTS, |most| (most / SHARE).clamp(1, MAX_EVENTS));
        let inner = Arc::new(Inner {
            journal,
            epoll,
            wake,
            runtime,
            metrics,
            members: Mutex::default(),
            next: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            most: usize::try_from(most).unwrap_or(usize::MAX),
            starved: Mutex::default(),
            leaving: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            thread: Mutex::default(),
        });
        let thread = {
            let inner = inner.clone();
            std::thread::Builder::new()
                .name("native-events".to_owned())
                .spawn(move || {
                    if catch_unwind(AssertUnwindSafe(|| inner.run())).is_err() {
                        // Nobody would answer any more. The next process goes on where this one was.
                        tracing::error!("a panic while events were read; the process ends");
                        std::process::abort();
                    }
                })?
        };
        *inner.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(Self { inner })
    }

    /// The journal.
    pub fn journal(&self) -> &Arc<Journal> {
        &self.inner.journal
    }

    /// Answers for a layer from now on. The group has its mark.
    pub fn join(&self, group: Group, slot: Slot, toc: Digest, fetch: Arc<LayerFetch>) -> io::Result<Arc<Member>> {
        let member = self.inner.member(group, slot, toc);
        member.fetch_by(fetch);
        self.inner.admit(&member)?;
        Ok(member)
    }

    /// Goes on for a layer that a predecessor served: answers first what it left. Without a `fetch`, until there is one, whatever is
    /// asked is denied.
    pub fn resume(&self, group: Group, toc: Digest, fetch: Option<Arc<LayerFetch>>) -> io::Result<Arc<Member>> {
        let (slot, left) = match self.inner.journal.resume(&toc) {
            Some(slot) => {
                let left = slot.left();
                (slot, left)
            }
            None => (self.resume_blind(&group, &toc)?, Vec::new()),
        };
        let member = self.inner.member(group, slot, toc);
        if let Some(fetch) = fetch {
            member.fetch_by(fetch);
        }
        let ownership = |entry: &Entry| {
            if reserve(entry.number) {
                Ownership::Ours
            } else {
                Ownership::Foreign
            }
        };
        // All of them first: what is opened for one must not take another's number.
        let left: Vec<_> = left.into_iter().map(|entry| (entry, ownership(&entry))).collect();
        let foreign = left.iter().filter(|(_, whose)| *whose == Ownership::Foreign).count();
        member.blocking.store(foreign, Ordering::Release);
        if !left.is_empty() {
            fault::point("events-reserved");
            tracing::info!(%toc, events = left.len(), foreign, "going on with what an earlier process was asked");
        }
        for (entry, ownership) in left {
            let question = Question::new(&member, entry.number, ownership, 0);
            self.inner.handle(&member, question, entry.asked);
        }
        self.inner.admit(&member)?;
        Ok(member)
    }

    /// Without a journal it is not known who waits: whoever does gets an error, once; the kernel asks again for most of them.
    fn resume_blind(&self, group: &Group, toc: &Digest) -> io::Result<Slot> {
        let slot = self.inner.journal.claim(toc);
        let slot = slot.ok_or_else(|| io::Error::other("no slot in the journal of events is free"))?;
        let numbers = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        let numbers = numbers.and_then(|most| i32::try_from(most).ok()).unwrap_or(MAX_NUMBER);
        let denied =
            (0..numbers.min(MAX_NUMBER)).filter(|number| matches!(group.answer(*number, Answer::Deny), Ok(true)));
        let denied = denied.count();
        tracing::warn!(%toc, denied, "the journal of events has no slot of this layer; what it left unanswered was denied");
        Ok(slot)
    }

    /// Stops answering, and leaves what is pending to a successor; the groups must be kept elsewhere.
    pub fn leave(&self) {
        self.inner.leaving.store(true, Ordering::Release);
        self.end();
    }

    /// Ends the thread. Layers that have not gone are not answered for any more.
    pub fn end(&self) {
        self.inner.ended.store(true, Ordering::Release);
        self.inner.wake();
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // Its panic has been reported.
            let _ = thread.join();
        }
    }
}

/// Whether reading from a group failed for a reason that passes.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EINTR)
    )
}

impl Inner {
    fn members(&self) -> MutexGuard<'_, HashMap<u64, Arc<Member>>> {
        // Every change is one insert or remove.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn member(self: &Arc<Self>, group: Group, slot: Slot, toc: Digest) -> Arc<Member> {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        Arc::new(Member::new(self, token, toc, group, slot))
    }

    /// Begins to read the member's events, once no number of its predecessor's stands in the way.
    fn admit(&self, member: &Arc<Member>) -> io::Result<()> {
        self.members().insert(member.token, member.clone());
        let flags = if member.blocking.load(Ordering::Acquire) == 0 {
            epoll::EventFlags::IN
        } else {
            epoll::EventFlags::empty()
        };
        let added = epoll::add(
            &self.epoll,
            &member.group,
            epoll::EventData::new_u64(member.token),
            flags,
        );
        if added.is_err() {
            self.members().remove(&member.token);
        } else if flags.is_empty() && member.blocking.load(Ordering::Acquire) == 0 {
            self.listen(member);
        }
        Ok(added?)
    }

    fn wake(&self) {
        // A full counter has woken it already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Hears of the member's events.
    fn listen(&self, member: &Member) {
        self.hear(member, epoll::EventFlags::IN);
    }

    fn hear(&self, member: &Member, flags: epoll::EventFlags) {
        let data = epoll::EventData::new_u64(member.token);
        match epoll::modify(&self.epoll, &member.group, data, flags) {
            // It is not there yet, or has gone.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => {
                tracing::error!(toc = %member.toc, %errno, "the events of a layer are not heard any more");
            }
        }
    }

    fn run(self: Arc<Self>) {
        let _context = self.runtime.enter();
        let mut ready = Vec::with_capacity(READY);
        while !self.ended.load(Ordering::Acquire) {
            ready.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut ready), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "waiting for events failed");
                    std::thread::sleep(REST);
                }
            }
            for event in &ready {
                let token = event.data.u64();
                if token == WAKE {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                    continue;
                }
                let member = self.members().get(&token).cloned();
                if let Some(member) = member {
                    self.serve(&member);
                }
            }
        }
    }

    /// Reads from a group once. It is told of again as long as it has more, after others that have something too.
    fn serve(self: &Arc<Self>, member: &Arc<Member>) {
        let Some(slot) = &member.slot else { return };
        let room = self.most.saturating_sub(self.pending.load(Ordering::Acquire));
        let _alone = member.reading.lock().unwrap_or_else(PoisonError::into_inner);
        match slot.receive(member.group.as_fd(), room) {
            Ok(Received::Events(events)) if !events.is_empty() => {
                for event in events {
                    self.take(member, event);
                }
            }
            Ok(Received::Nothing) => {}
            Ok(Received::Full) => self.starve(member),
            Ok(Received::Events(_)) => {
                tracing::error!(toc = %member.toc, "the kernel's events are of a version that is not known");
                std::thread::sleep(REST);
            }
            Err(error) => {
                tracing::warn!(toc = %member.toc, %error, "events cannot be read now; their readers wait");
                self.metrics.native_event_read_failures.inc();
                std::thread::sleep(REST);
            }
        }
    }

    /// Reads from the group again when something was answered.
    fn starve(&self, member: &Arc<Member>) {
        self.hear(member, epoll::EventFlags::empty());
        self.starved
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(member.token);
        if self.pending.load(Ordering::Acquire) == 0 {
            self.feed();
        }
    }

    fn feed(&self) {
        let starved = std::mem::take(&mut *self.starved.lock().unwrap_or_else(PoisonError::into_inner));
        for token in starved {
            let member = self.members().get(&token).cloned();
            if let Some(member) = member {
                self.listen(&member);
            }
        }
    }

    fn take(self: &Arc<Self>, member: &Arc<Member>, event: Event) {
        if event.fd < 0 {
            tracing::error!(toc = %member.toc, asked = ?event.asked, "the kernel told of an event without a number");
            self.count(NativeOutcome::Unknown);
            return;
        }
        let question = Question::new(member, event.fd, Ownership::Ours, event.pid);
        // The question is denied by being dropped; the next one is another reader's.
        if catch_unwind(AssertUnwindSafe(|| self.handle(member, question, event.asked))).is_err() {
            tracing::error!(toc = %member.toc, asked = ?event.asked, "a panic while an event was looked at; it is denied");
        }
    }

    fn handle(self: &Arc<Self>, member: &Arc<Member>, mut question: Question, asked: Asked) {
        let Asked::Range { offset, count } = asked else {
            tracing::error!(toc = %member.toc, ?asked, "an event that is not understood is denied");
            self.count(NativeOutcome::Unknown);
            return question.answer(Answer::Deny);
        };
        let Some(fetch) = member.fetch() else {
            self.count(NativeOutcome::Denied);
            return question.answer(Answer::Deny);
        };
        let range = offset..offset.saturating_add(count);
        let chunks = fetch.layer().index().chunks_at(range);
        fetch.note_read(&chunks);
        if fetch.layer().residency().contains_all(chunks.clone()) {
            fetch.layer().touch();
            self.count(NativeOutcome::Resident);
            return question.answer(Answer::Allow);
        }
        question.count();
        let mut work = Box::pin(
            self.clone()
                .fetch(fetch, question, chunks, offset..offset.saturating_add(count)),
        );
        // What is there after all costs no hop. The no-op waker loses nothing: a task is always polled once more.
        if work.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
            self.runtime.spawn(work);
        }
    }

    async fn fetch(self: Arc<Self>, fetch: Arc<LayerFetch>, question: Question, chunks: Range<u32>, range: Range<u64>) {
        let began = Instant::now();
        let count = range.end - range.start;
        let first = fetch.layer().index().chunk(chunks.start);
        let is_front =
            count >= FRONT && first.is_some_and(|chunk| chunk.file_offset == 0 && chunk.data_offset == range.start);
        let reading = if is_front { Reading::Front } else { Reading::Part };
        let result = {
            // Nothing of it is given up between its coming and its being read.
            let _held = fetch.layer().hold(chunks.clone());
            fetch.ensure(chunks, reading).await
        };
        // While it waits, so that it is there to be looked at.
        let brought = if result.is_ok() { count } else { 0 };
        fetch.readers().note(question.pid, brought, began.elapsed());
        match result {
            Ok(()) => {
                fetch.count_read(false, usize::try_from(count).unwrap_or(usize::MAX));
                self.count(NativeOutcome::Fetched);
                fault::point("event-fetched");
                question.answer(Answer::Allow);
            }
            // A successor goes on with it.
            Err(_) if self.leaving.load(Ordering::Acquire) => {}
            Err(_) => {
                self.count(NativeOutcome::Denied);
                question.answer(Answer::Deny);
            }
        }
    }

    fn count(&self, outcome: NativeOutcome) {
        self.metrics
            .native_events
            .get_or_create(&NativeEventLabels { outcome })
            .inc();
    }
}
