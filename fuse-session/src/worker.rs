//! The session loop: read, decode, poll once in place, answer or hand over.
//!
//! Several workers block in a read on the same descriptor; the kernel wakes exactly one per request. A handler that can
//! answer at once costs no hop between threads. One that cannot goes to the runtime together with its duty to answer.
//!
//! Workers come when others sleep in handlers and go when the session is quiet: see [`crate::roster`].
//!
//! The poll in place uses a no-op waker, which loses nothing: a spawned task is polled at least once, and that poll
//! both sees whatever became ready meanwhile and registers the task's own waker.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use futures_util::FutureExt;
use tokio::runtime::Handle;

use crate::channel::{Channel, Received, Responder};
use crate::dispatch::{self, Shareable};
use crate::lifetime::{End, Lifetime};
use crate::mount::DeviceNumber;
use crate::passthrough::Opener;
use crate::pending::{Pending, Unwanted};
use crate::reply::Reply;
use crate::request::{Caller, Operation, Request};
use crate::roster::{self, Roster};

/// Room for one request. The largest of a read-only mount is a BATCH_FORGET, which the kernel cuts to fit; names are
/// at most a page long. The kernel insists on 8 KiB at least.
pub(crate) const READ_BUFFER_BYTES: usize = 16 * 1024;

/// Failed reads in a row after which the session is given up, so that an error that stays cannot become a busy loop.
const FAILED_READS_MAX: u32 = 64;

type Answer = Pin<Box<dyn Future<Output = std::thread::Result<Reply>> + Send>>;

/// One worker thread's view of the session.
pub(crate) struct Worker<FS> {
    /// Its number, from [`Roster::enlist`].
    pub(crate) index: usize,
    pub(crate) roster: Arc<Roster>,
    pub(crate) fs: Arc<FS>,
    pub(crate) channel: Arc<Channel>,
    pub(crate) pending: Arc<Pending>,
    pub(crate) lifetime: Arc<Lifetime>,
    pub(crate) runtime: Handle,
    pub(crate) device: DeviceNumber,
    /// Whether the kernel can send a request again.
    pub(crate) can_resend: bool,
    /// What answers opens where the kernel reads files by itself.
    pub(crate) opener: Option<Arc<Opener>>,
}

impl<FS: Shareable> Worker<FS> {
    /// Starts the worker's thread. The worker is counted as running already.
    pub(crate) fn start(self) -> std::io::Result<()> {
        let roster = Arc::clone(&self.roster);
        let thread = std::thread::Builder::new().name(format!("fuse-{}", self.index));
        roster.keep(thread.spawn(move || self.run())?);
        Ok(())
    }

    /// A worker of the same session with another number.
    fn fellow(&self, index: usize) -> Self {
        Self {
            index,
            roster: Arc::clone(&self.roster),
            fs: Arc::clone(&self.fs),
            channel: Arc::clone(&self.channel),
            pending: Arc::clone(&self.pending),
            lifetime: Arc::clone(&self.lifetime),
            runtime: self.runtime.clone(),
            device: self.device,
            can_resend: self.can_resend,
            opener: self.opener.clone(),
        }
    }

    /// Looks whether workers sleep in handlers, and starts others in their places, while there are requests.
    async fn look_out(self) {
        let mut quiet = 0;
        let mut needed = Instant::now();
        let mut pause_until = needed;
        let mut ticks = tokio::time::interval(roster::LOOK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !self.lifetime.is_alive() {
                return;
            }
            self.roster.note_look();
            quiet = if self.roster.take_fresh() { 0 } else { quiet + 1 };
            // In the same handler before and after the look: between two requests a worker sleeps as well.
            let sleeping = |&number: &usize| {
                let handled = self.pending.slot(number).current();
                handled.is_some() && self.roster.sleeps(number) && self.pending.slot(number).current() == handled
            };
            let (running, asleep) = (self.lifetime.running(), self.roster.numbers().filter(sleeping).count());
            if asleep > 0 {
                (needed, quiet) = (Instant::now(), 0);
                self.roster.dismiss_some(0);
                let is_needed = running.saturating_sub(asleep) < self.roster.base();
                if is_needed && needed >= pause_until && !self.reinforce() {
                    pause_until = needed + roster::FAILED_START_PAUSE;
                }
            } else if running > self.roster.base() && needed.elapsed() >= roster::AWAKE_PATIENCE {
                self.roster.dismiss_some(running - self.roster.base());
            }
            if quiet >= roster::QUIET_LOOKS && self.roster.stop_looking(running) {
                return;
            }
        }
    }

    /// Starts another worker, if there may be one; `false` if it cannot be started.
    fn reinforce(&self) -> bool {
        let Some(index) = self.roster.enlist() else { return true };
        if !self.lifetime.join() {
            self.roster.dismiss(index);
            return true;
        }
        if let Err(error) = self.fellow(index).start() {
            tracing::warn!(%error, "cannot start another worker");
            self.roster.dismiss(index);
            // All others may have left meanwhile.
            if self.lifetime.miss().is_some_and(|end| end != End::Left) {
                self.destroy();
            }
            return false;
        }
        if self.roster.must_watch() {
            let (roster, lifetime) = (Arc::clone(&self.roster), Arc::clone(&self.lifetime));
            let watch = roster::send_home(roster, lifetime, Arc::clone(&self.channel));
            self.runtime.spawn(watch);
        }
        true
    }

    /// Serves until the session ends, or until the worker is not needed any more; the first worker to leave gives up what is pending, the last tells the file
    /// system. A session given up on a living connection cuts that off: callers get an error instead of silence.
    pub(crate) fn run(mut self) {
        let runtime = self.runtime.clone();
        let _context = runtime.enter();
        self.roster.introduce(self.index);
        let Some(end) = self.serve_until_end() else { return };
        self.roster.dismiss(self.index);
        self.pending.end();
        if let End::Failed(_) = end
            && let Err(errno) = self.channel.abort(self.device)
        {
            tracing::debug!(%errno, "cannot cut the connection off");
        }
        if self.lifetime.leave(end) && end != End::Left {
            self.destroy();
        }
    }

    /// Leaves if it may; `false` if it serves on, maybe under another number.
    fn leave_if_idle(&mut self) -> bool {
        if !self.roster.may_leave() || !self.lifetime.retire() {
            return false;
        }
        let Some(number) = self.roster.stand_down(self.index) else {
            return true;
        };
        self.index = number;
        self.roster.introduce(number);
        let serves = self.lifetime.join();
        if !serves {
            // The session is over, and others say so.
            self.roster.dismiss(number);
        }
        !serves
    }

    /// Why the session ended; `None` if only the worker does, which has no number any more.
    fn serve_until_end(&mut self) -> Option<End> {
        // Written once: the kernel cannot fault a page in for a thread that is being killed, and fails the request with EIO then.
        let mut buffer = vec![u8::MAX; READ_BUFFER_BYTES];
        let mut failures = 0;
        loop {
            if self.channel.is_silent() {
                return Some(End::Left);
            }
            self.roster.wait();
            let received = self.channel.receive(&mut buffer);
            let others = self.roster.wake();
            match received {
                Received::Message(_) if self.channel.is_silent() => {
                    self.give_back();
                    return Some(End::Left);
                }
                Received::Message(len) => {
                    failures = 0;
                    self.roster.note_request();
                    if self.roster.must_look() {
                        self.runtime.spawn(self.fellow(self.index).look_out());
                    }
                    if others == 0 && (self.roster.is_below_base() || !self.roster.is_looked_after()) {
                        self.reinforce();
                    }
                    // Handlers' panics are caught where they are polled; this is for their destructors.
                    if catch_unwind(AssertUnwindSafe(|| self.serve(&buffer[..len]))).is_err() {
                        tracing::error!("panic while a request was served");
                        self.pending.slot(self.index).end();
                    }
                    if self.leave_if_idle() {
                        return None;
                    }
                }
                Received::Retry => {}
                Received::Ended => return Some(End::Unmounted),
                Received::Failed(errno) => {
                    failures += 1;
                    tracing::warn!(%errno, failures, "reading a request failed");
                    if failures >= FAILED_READS_MAX {
                        tracing::error!(%errno, "giving the session up");
                        return Some(End::Failed(errno.raw_os_error()));
                    }
                }
            }
        }
    }

    /// What this worker took is a successor's, who may have asked for all that was in flight already. What others have in work comes
    /// a second time; that costs time only.
    fn give_back(&self) {
        if self.can_resend
            && let Err(errno) = self.channel.resend()
        {
            tracing::debug!(%errno, "a request that came too late is not sent again");
        }
    }

    fn serve(&self, message: &[u8]) {
        let Request { caller, operation } = match Request::decode(message) {
            Ok(request) => request,
            Err(error) => {
                tracing::error!(%error, "request not understood");
                if let Some(unique) = error.unique() {
                    self.channel.send(unique, &Reply::Error(libc::EIO));
                }
                return;
            }
        };
        match operation {
            Operation::Interrupt { unique } => self.interrupt(caller, unique),
            Operation::Refused { opcode, errno } => {
                tracing::debug!(opcode, errno, "operation refused");
                self.channel.send(caller.unique, &Reply::Error(errno));
            }
            Operation::Destroy => self.channel.send(caller.unique, &Reply::Empty),
            Operation::Ignored => {}
            operation => self.work(caller, operation),
        }
    }

    /// An interrupt whose request is not found is answered EAGAIN: the kernel drops it if the request has been
    /// answered, and sends it again if not.
    fn interrupt(&self, caller: Caller, unique: u64) {
        if !self.pending.interrupt(unique) {
            self.channel.send(caller.unique, &Reply::Error(libc::EAGAIN));
        }
    }

    fn work(&self, caller: Caller, operation: Operation) {
        let responder = match &operation {
            Operation::Forget { .. } => Responder::silent(Arc::clone(&self.channel)),
            _ => Responder::new(Arc::clone(&self.channel), caller.unique),
        };
        let opener = if let Operation::Open { .. } = operation {
            self.roster.note_file(caller.node);
            self.opener.clone()
        } else {
            None
        };
        let slot = self.pending.slot(self.index);
        slot.begin(caller.unique);
        let handler = dispatch::answer(Arc::clone(&self.fs), caller, operation, opener);
        let mut answer: Answer = Box::pin(AssertUnwindSafe(handler).catch_unwind());
        match answer.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => responder.send(&settled(outcome, caller)),
            Poll::Pending => self.hand_over(caller, answer, responder),
        }
        slot.end();
    }

    fn hand_over(&self, caller: Caller, answer: Answer, responder: Responder) {
        let Ok(mut permit) = self.pending.admit(self.pending.slot(self.index), caller.unique) else {
            if self.channel.is_silent() {
                return;
            }
            tracing::error!(
                unique = caller.unique,
                node = caller.node,
                "too many requests pending, request failed"
            );
            return responder.send(&Reply::Error(libc::EIO));
        };
        // Not detached without a bound: the permit is the bound, and the session's end makes the task return.
        self.runtime.spawn(async move {
            let reply = tokio::select! {
                biased;
                outcome = answer => settled(outcome, caller),
                unwanted = permit.unwanted(caller.pid) => {
                    tracing::debug!(unique = caller.unique, node = caller.node, pid = caller.pid, ?unwanted, "request given up");
                    if unwanted == Unwanted::Repeated {
                        return responder.yield_to_other();
                    }
                    Reply::Error(libc::EINTR)
                }
            };
            // Room is made before the answer is seen: whoever has it finds the request gone.
            drop(permit);
            responder.send(&reply);
        });
    }

    fn destroy(&self) {
        let fs = Arc::clone(&self.fs);
        let asker = fuse3::raw::Request::default();
        let mut farewell = Box::pin(AssertUnwindSafe(async move { fs.destroy(asker).await }).catch_unwind());
        if farewell
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
        {
            self.runtime.spawn(farewell);
        }
    }
}

/// A handler that panicked answers EIO; the panic's message went to the panic hook.
fn settled(outcome: std::thread::Result<Reply>, caller: Caller) -> Reply {
    outcome.unwrap_or_else(|_| {
        tracing::error!(unique = caller.unique, node = caller.node, "handler panicked");
        Reply::Error(libc::EIO)
    })
}

#[cfg(test)]
mod tests;
