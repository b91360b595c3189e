//! The shaped link: connections that share one pace and one count of bytes, and that can be taken away.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};

/// How far a busy link catches up. The timer's tick is 1 ms, 125 kB at 1 Gbit/s, and a busy machine wakes later than
/// that: what the link could have carried meanwhile goes out then, or the rate would never be reached.
const MAX_LAG: Duration = Duration::from_millis(10);

/// A link on which nothing was sent for so long has been idle.
const IDLE_AFTER: Duration = Duration::from_millis(2);

/// What one write may take of the link's time, so that connections share it.
const WRITE_TIME: Duration = Duration::from_micros(500);

/// Bounds of one write: smaller ones cost more than they pace, larger ones than sockets take.
const WRITE_BYTES: std::ops::RangeInclusive<f64> = 16384.0..=131_072.0;

/// How often a port is tried that a link refused connections on and that has to be taken back.
const REBIND_PAUSE: Duration = Duration::from_millis(5);

/// What becomes of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carrier {
    /// They are served.
    #[default]
    Up,
    /// Every one is reset, those that exist included.
    Resetting,
    /// Those that exist are reset, and nobody listens.
    Refusing,
}

/// The pace of all connections together: the time until which the bytes sent so far keep the link busy.
struct Pace {
    rate: f64,
    busy_until: Instant,
    /// When bytes were sent last.
    sent: Instant,
    /// Connections that wait for their turn.
    waiting: usize,
}

impl Pace {
    /// Bytes to send now, or when to look again.
    ///
    /// A link that somebody waits for was never idle, however late the waiting one was woken, and catches up; one that
    /// nobody waits for has nothing to catch up with, so that a pause earns no burst.
    fn turn(&mut self, now: Instant) -> Result<usize, Instant> {
        let idle = self.waiting == 0 && now.duration_since(self.sent) > IDLE_AFTER;
        let lag = if idle { Duration::ZERO } else { MAX_LAG };
        self.busy_until = self.busy_until.max(now.checked_sub(lag).unwrap_or(now));
        if self.busy_until > now {
            return Err(self.busy_until);
        }
        let bytes = (self.rate * WRITE_TIME.as_secs_f64()).clamp(*WRITE_BYTES.start(), *WRITE_BYTES.end());
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to a few KiB"
        )]
        Ok(bytes as usize)
    }
}

/// What all connections of a proxy share.
pub(super) struct Link {
    pace: Option<Mutex<Pace>>,
    down: AtomicU64,
    up: AtomicU64,
    carrier: watch::Sender<Carrier>,
}

impl Link {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        let pace = bytes_per_second.map(|rate| {
            Mutex::new(Pace {
                rate: rate.max(1) as f64,
                busy_until: Instant::now(),
                sent: Instant::now(),
                waiting: 0,
            })
        });
        Self {
            pace,
            down: AtomicU64::new(0),
            up: AtomicU64::new(0),
            carrier: watch::Sender::new(Carrier::Up),
        }
    }

    /// Bytes sent to and received from clients.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.down.load(Ordering::Relaxed), self.up.load(Ordering::Relaxed))
    }

    pub(super) fn reset(&self) {
        self.down.store(0, Ordering::Relaxed);
        self.up.store(0, Ordering::Relaxed);
    }

    pub(super) fn set_carrier(&self, carrier: Carrier) {
        self.carrier.send_replace(carrier);
    }

    fn is_up(&self) -> bool {
        *self.carrier.borrow() == Carrier::Up
    }

    fn pace(&self) -> Option<std::sync::MutexGuard<'_, Pace>> {
        let pace = self.pace.as_ref()?;
        Some(pace.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn turn(&self) -> Result<usize, Instant> {
        self.pace().map_or(Ok(usize::MAX), |mut pace| pace.turn(Instant::now()))
    }

    fn wait(&self, waits: bool) {
        if let Some(mut pace) = self.pace() {
            pace.waiting = if waits {
                pace.waiting + 1
            } else {
                pace.waiting.saturating_sub(1)
            };
        }
    }

    fn sent(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
        if let Some(mut pace) = self.pace() {
            let time = Duration::from_secs_f64(bytes as f64 / pace.rate);
            pace.busy_until += time;
            pace.sent = Instant::now();
        }
    }
}

/// Accepts connections onto the link.
pub(super) struct LinkListener {
    inner: Option<TcpListener>,
    address: SocketAddr,
    link: Arc<Link>,
    carrier: watch::Receiver<Carrier>,
}

impl LinkListener {
    pub(super) fn new(inner: TcpListener, link: Arc<Link>) -> io::Result<Self> {
        Ok(Self {
            address: inner.local_addr()?,
            inner: Some(inner),
            carrier: link.carrier.subscribe(),
            link,
        })
    }

    /// Closes the port while the link refuses connections, and takes it back afterwards.
    async fn listener(&mut self) -> &TcpListener {
        loop {
            let refusing = *self.carrier.borrow_and_update() == Carrier::Refusing;
            if refusing {
                self.inner = None;
                if self.carrier.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            } else if self.inner.is_some() {
                break;
            } else {
                match TcpListener::bind(self.address).await {
                    Ok(listener) => self.inner = Some(listener),
                    // Its last connections are still being reset.
                    Err(_) => tokio::time::sleep(REBIND_PAUSE).await,
                }
            }
        }
        let Some(listener) = &self.inner else {
            unreachable!("bound above")
        };
        listener
    }
}

impl Listener for LinkListener {
    type Io = LinkStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (LinkStream, SocketAddr) {
        loop {
            let link = Arc::clone(&self.link);
            let mut carrier = self.link.carrier.subscribe();
            let listener = self.listener().await;
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = carrier.changed() => continue,
            };
            match accepted {
                Ok((stream, peer)) => {
                    // Without it small answers wait for the peer's delayed acknowledgement.
                    let _ = stream.set_nodelay(true);
                    let stream = LinkStream::new(stream, link);
                    if stream.link.is_up() {
                        return (stream, peer);
                    }
                    stream.abort.reset();
                }
                // Out of descriptors: wait for some to close.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// Ends the connection that a request came over with a reset.
#[derive(Clone)]
pub(super) struct Abort(Arc<AtomicBool>);

impl Abort {
    pub(super) fn reset(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Connected<IncomingStream<'_, LinkListener>> for Abort {
    fn connect_info(stream: IncomingStream<'_, LinkListener>) -> Self {
        stream.io().abort.clone()
    }
}

/// One connection.
pub(super) struct LinkStream {
    inner: TcpStream,
    link: Arc<Link>,
    abort: Abort,
    wait: Option<Pin<Box<Sleep>>>,
}

impl LinkStream {
    fn new(inner: TcpStream, link: Arc<Link>) -> Self {
        Self {
            inner,
            link,
            abort: Abort(Arc::default()),
            wait: None,
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.link.is_up() && !self.abort.is_set() {
            return Ok(());
        }
        self.abort.reset();
        Err(io::ErrorKind::ConnectionReset.into())
    }

    fn end_wait(&mut self) {
        if self.wait.take().is_some() {
            self.link.wait(false);
        }
    }

    /// How much may be written now.
    fn poll_turn(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            self.check()?;
            if let Some(wait) = &mut self.wait {
                std::task::ready!(wait.as_mut().poll(context));
            }
            // While it is still counted as one that waits.
            let turn = self.link.turn();
            self.end_wait();
            match turn {
                Ok(limit) => return Poll::Ready(Ok(limit)),
                Err(until) => {
                    self.wait = Some(Box::pin(tokio::time::sleep_until(until)));
                    self.link.wait(true);
                }
            }
        }
    }
}

impl Drop for LinkStream {
    fn drop(&mut self) {
        self.end_wait();
        if self.abort.is_set() {
            // A reset instead of an orderly end; what is not sent yet is lost, as with a peer that died.
            let _ = rustix::net::sockopt::set_socket_linger(&self.inner, Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for LinkStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check()?;
        let before = buffer.filled().len();
        let done = Pin::new(&mut self.inner).poll_read(context, buffer);
        self.link
            .up
            .fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        done
    }
}

impl AsyncWrite for LinkStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let limit = std::task::ready!(self.poll_turn(context))?;
        let length = limit.min(bytes.len());
        let written = std::task::ready!(Pin::new(&mut self.inner).poll_write(context, &bytes[..length]))?;
        self.link.sent(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let limit = std::task::ready!(self.poll_turn(context))?;
        let (mut left, mut chosen) = (limit, Vec::with_capacity(parts.len()));
        for part in parts {
            let length = left.min(part.len());
            chosen.push(io::IoSlice::new(&part[..length]));
            left -= length;
        }
        let written = std::task::ready!(Pin::new(&mut self.inner).poll_write_vectored(context, &chosen))?;
        self.link.sent(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(rate: f64, start: Instant) -> Pace {
        Pace {
            rate,
            busy_until: start,
            sent: start,
            waiting: 0,
        }
    }

    #[test]
    fn a_pause_earns_no_burst_and_a_late_wake_up_is_made_good() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut pace = pace(125e6, start);
        let later = start + Duration::from_secs(1);
        assert!(pace.turn(later).is_ok());
        // A write of 8 ms keeps the link busy for 8 ms, whatever went before.
        (pace.busy_until, pace.sent) = (pace.busy_until + ms(8), later);
        assert_eq!(pace.turn(later + ms(1)), Err(later + ms(8)));
        // Somebody waits and is woken 3 ms late: the 3 ms are not lost, to all the writes that follow at once.
        pace.waiting = 1;
        let woken = later + ms(11);
        assert!(pace.turn(woken).is_ok());
        assert_eq!(pace.busy_until, later + ms(8));
        (pace.busy_until, pace.sent, pace.waiting) = (pace.busy_until + ms(1), woken, 0);
        assert!(pace.turn(woken).is_ok());
        assert_eq!(pace.busy_until, later + ms(9));
        // No more than a bound is made good, and nothing after a pause.
        pace.waiting = 1;
        assert!(pace.turn(woken + ms(500)).is_ok());
        assert_eq!(pace.busy_until, woken + ms(500) - MAX_LAG);
        pace.waiting = 0;
        assert!(pace.turn(woken + ms(600)).is_ok());
        assert_eq!(pace.busy_until, woken + ms(600));
    }

    #[test]
    fn writes_are_as_long_as_the_rate_makes_useful() {
        let now = Instant::now();
        let write = |rate| pace(rate, now).turn(now).unwrap();
        assert_eq!((write(1.0), write(125e6), write(1e12)), (16384, 62500, 131_072));
    }
}
