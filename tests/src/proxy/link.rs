//! The shaped link: connections that share one token bucket and one count of bytes.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};

/// What may go out at once after a pause. The timer's tick is 1 ms, 25 kB at 200 Mbit/s: the bucket has to hold a few.
const BURST_BYTES: u64 = 96 * 1024;

/// The most that one connection sends in one go, so that connections share the link.
const MAX_WRITE: u64 = 16 * 1024;

/// A bucket of tokens, one a byte.
struct Bucket {
    rate: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// Tokens to spend now, or how long to wait for a useful number of them.
    fn available(&mut self) -> Result<u64, Duration> {
        let now = Instant::now();
        let gained = now.duration_since(self.filled).as_secs_f64() * self.rate;
        self.tokens = (self.tokens + gained).min(BURST_BYTES as f64);
        self.filled = now;
        let wanted = MAX_WRITE as f64;
        if self.tokens >= wanted {
            Ok(MAX_WRITE)
        } else {
            Err(Duration::from_secs_f64((wanted - self.tokens) / self.rate))
        }
    }
}

/// What all connections of a proxy share.
pub(super) struct Link {
    bucket: Option<Mutex<Bucket>>,
    down: AtomicU64,
    up: AtomicU64,
    dead: AtomicBool,
}

impl Link {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        let full = |rate: u64| Bucket {
            rate: rate.max(1) as f64,
            tokens: BURST_BYTES as f64,
            filled: Instant::now(),
        };
        let bucket = bytes_per_second.map(|rate| Mutex::new(full(rate)));
        Self {
            bucket,
            down: AtomicU64::new(0),
            up: AtomicU64::new(0),
            dead: AtomicBool::new(false),
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

    pub(super) fn set_dead(&self, dead: bool) {
        self.dead.store(dead, Ordering::Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        if self.dead.load(Ordering::Relaxed) {
            Err(io::ErrorKind::ConnectionReset.into())
        } else {
            Ok(())
        }
    }

    fn available(&self) -> Result<u64, Duration> {
        match &self.bucket {
            Some(bucket) => bucket.lock().unwrap_or_else(PoisonError::into_inner).available(),
            None => Ok(u64::MAX),
        }
    }

    fn spend(&self, bytes: u64) {
        self.down.fetch_add(bytes, Ordering::Relaxed);
        if let Some(bucket) = &self.bucket {
            bucket.lock().unwrap_or_else(PoisonError::into_inner).tokens -= bytes as f64;
        }
    }
}

/// Accepts connections onto the link.
pub(super) struct LinkListener {
    inner: TcpListener,
    link: Arc<Link>,
}

impl LinkListener {
    pub(super) fn new(inner: TcpListener, link: Arc<Link>) -> Self {
        Self { inner, link }
    }
}

impl Listener for LinkListener {
    type Io = LinkStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (LinkStream, SocketAddr) {
        loop {
            match self.inner.accept().await {
                Ok((stream, peer)) if self.link.check().is_ok() => {
                    // Without it small answers wait for the peer's delayed acknowledgement.
                    let _ = stream.set_nodelay(true);
                    return (
                        LinkStream {
                            inner: stream,
                            link: Arc::clone(&self.link),
                            wait: None,
                        },
                        peer,
                    );
                }
                // A dead link drops the connection at once.
                Ok(_) => {}
                // Out of descriptors: wait for some to close.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

/// One connection.
pub(super) struct LinkStream {
    inner: TcpStream,
    link: Arc<Link>,
    wait: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for LinkStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.link.check()?;
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
        loop {
            self.link.check()?;
            if let Some(wait) = &mut self.wait {
                std::task::ready!(wait.as_mut().poll(context));
                self.wait = None;
            }
            match self.link.available() {
                Ok(limit) => {
                    let length = usize::try_from(limit).unwrap_or(usize::MAX).min(bytes.len());
                    let written = std::task::ready!(Pin::new(&mut self.inner).poll_write(context, &bytes[..length]))?;
                    self.link.spend(written as u64);
                    return Poll::Ready(Ok(written));
                }
                Err(pause) => self.wait = Some(Box::pin(tokio::time::sleep(pause))),
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}
