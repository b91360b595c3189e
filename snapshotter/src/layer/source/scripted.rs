//! A blob in memory whose source fails as told, and remembers what it was asked for.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use tokio::sync::Semaphore;

use super::{BlobSource, ByteStream, Overload, Priority, SourceError, Tail};

/// What happens to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// No answer but an error that may pass.
    Transient,
    /// No answer but an error that stays.
    Permanent,
    /// Too busy: not before so many milliseconds.
    Busy(u64),
    /// The body breaks with an error after so many bytes.
    CutAfter(usize),
    /// The body ends after so many bytes as if that were all.
    EndAfter(usize),
    /// The body stops after so many bytes and says nothing more.
    StallAfter(usize),
}

pub(crate) struct Scripted {
    blob: Bytes,
    known_size: bool,
    piece: usize,
    faults: Mutex<VecDeque<Fault>>,
    /// Blob offsets whose byte is wrong, and how many more times.
    wrong: Mutex<HashMap<u64, u32>>,
    requests: Mutex<Vec<(Range<u64>, Priority)>>,
    /// Pieces that may be given, if they are counted.
    pieces: Option<Semaphore>,
    host: String,
    /// Below which path of its host it is.
    path: Option<String>,
    /// Whether it has stopped answering for good.
    gone: AtomicBool,
    ignores_ranges: bool,
    /// How long it goes by what lies before a range, a hundredth of it at a time.
    skips_for: Duration,
    /// How often it was told to find another way.
    distrusted: AtomicU32,
}

impl Scripted {
    pub(crate) fn new(blob: Bytes) -> Self {
        Self {
            blob,
            known_size: true,
            piece: 16 << 10,
            faults: Mutex::default(),
            wrong: Mutex::default(),
            requests: Mutex::default(),
            pieces: None,
            host: "registry.test".to_owned(),
            path: None,
            gone: AtomicBool::new(false),
            ignores_ranges: false,
            skips_for: Duration::ZERO,
            distrusted: AtomicU32::new(0),
        }
    }

    /// On another host.
    pub(crate) fn at(mut self, host: &str) -> Self {
        host.clone_into(&mut self.host);
        self
    }

    /// Below a path of its host.
    pub(crate) fn below(mut self, path: &str) -> Self {
        self.path = Some(format!("{}/{path}", self.host));
        self
    }

    /// Says that it sends all that lies before a range.
    pub(crate) fn that_ignores_ranges(mut self) -> Self {
        self.ignores_ranges = true;
        self
    }

    /// It takes so long to go by what lies before a range.
    pub(crate) fn that_skips_for(mut self, time: Duration) -> Self {
        self.skips_for = time;
        self
    }

    /// Refuses everything, or no more.
    pub(crate) fn refuse(&self, everything: bool) {
        self.gone.store(everything, Ordering::Relaxed);
    }

    /// Pieces of another size.
    pub(crate) fn with_pieces_of(mut self, bytes: usize) -> Self {
        self.piece = bytes;
        self
    }

    /// Gives a piece only after [`release`](Self::release).
    pub(crate) fn held(mut self) -> Self {
        self.pieces = Some(Semaphore::new(0));
        self
    }

    /// Does not tell its size before it is asked for bytes.
    pub(crate) fn of_unknown_size(mut self) -> Self {
        self.known_size = false;
        self
    }

    /// What happens to the next requests.
    pub(crate) fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.faults.lock().unwrap().extend(faults);
    }

    /// Makes the byte at `offset` wrong for the next `times`.
    pub(crate) fn corrupt(&self, offset: u64, times: u32) {
        self.wrong.lock().unwrap().insert(offset, times);
    }

    pub(crate) fn release(&self, pieces: usize) {
        self.pieces.as_ref().unwrap().add_permits(pieces);
    }

    pub(crate) fn requests(&self) -> Vec<(Range<u64>, Priority)> {
        self.requests.lock().unwrap().clone()
    }

    pub(crate) fn distrusted(&self) -> u32 {
        self.distrusted.load(Ordering::Relaxed)
    }

    fn body(&self, range: Range<u64>, fault: Fault) -> Result<Vec<Result<Bytes, SourceError>>, SourceError> {
        let broken = || SourceError::transient("scripted failure");
        let mut bytes =
            BytesMut::from(&self.blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]);
        let end = match fault {
            Fault::Transient => return Err(broken()),
            Fault::Busy(milliseconds) => {
                return Err(SourceError::Transient {
                    what: "scripted overload".to_owned(),
                    load: Some(Overload {
                        retry_after: Some(Duration::from_millis(milliseconds)),
                    }),
                    cause: None,
                });
            }
            Fault::Permanent => {
                return Err(SourceError::Permanent {
                    what: "scripted failure".to_owned(),
                    class: "not_found",
                    cause: None,
                });
            }
            Fault::None => bytes.len(),
            Fault::CutAfter(end) | Fault::EndAfter(end) | Fault::StallAfter(end) => end.min(bytes.len()),
        };
        bytes.truncate(end);
        let mut wrong = self.wrong.lock().unwrap();
        for (&offset, times) in wrong.iter_mut() {
            let at = usize::try_from(offset.wrapping_sub(range.start)).unwrap_or(usize::MAX);
            if *times > 0
                && let Some(byte) = bytes.get_mut(at)
            {
                *byte ^= 0x55;
                *times -= 1;
            }
        }
        let bytes = bytes.freeze();
        let mut pieces: Vec<_> = (0..bytes.len())
            .step_by(self.piece)
            .map(|at| Ok(bytes.slice(at..bytes.len().min(at + self.piece))))
            .collect();
        if matches!(fault, Fault::CutAfter(_)) {
            pieces.push(Err(broken()));
        }
        Ok(pieces)
    }

    async fn take_piece(&self) {
        if let Some(pieces) = &self.pieces {
            pieces.acquire().await.unwrap().forget();
        }
    }
}

/// A source that tests keep a hold of.
#[async_trait]
impl BlobSource for std::sync::Arc<Scripted> {
    fn host(&self) -> &str {
        &self.host
    }

    fn identity(&self) -> &str {
        self.path.as_deref().unwrap_or(&self.host)
    }

    fn distrust(&self) {
        self.distrusted.fetch_add(1, Ordering::Relaxed);
    }

    fn size(&self) -> Option<u64> {
        self.known_size.then_some(self.blob.len() as u64)
    }

    fn ignores_ranges(&self) -> bool {
        self.ignores_ranges
    }

    async fn read(&self, range: Range<u64>, priority: Priority) -> Result<ByteStream, SourceError> {
        assert!(
            range.start < range.end && range.end <= self.blob.len() as u64,
            "asked for {range:?}"
        );
        self.requests.lock().unwrap().push((range.clone(), priority));
        let gone = self.gone.load(Ordering::Relaxed);
        let fault = self.faults.lock().unwrap().pop_front();
        let fault = fault.unwrap_or(if gone { Fault::Transient } else { Fault::None });
        let pieces: VecDeque<_> = self.body(range, fault)?.into();
        let this = self.clone();
        let (skips, pause) = (if self.skips_for.is_zero() { 0 } else { 100 }, self.skips_for / 100);
        let skipped = stream::iter(0..skips).then(move |_| async move {
            tokio::time::sleep(pause).await;
            Ok(Bytes::new())
        });
        Ok(Box::pin(skipped.chain(stream::unfold(
            (this, pieces),
            move |(this, mut pieces)| async move {
                tokio::task::yield_now().await;
                match pieces.pop_front() {
                    Some(piece) => {
                        this.take_piece().await;
                        Some((piece, (this, pieces)))
                    }
                    None if matches!(fault, Fault::StallAfter(_)) => {
                        tokio::time::sleep(Duration::from_secs(3600)).await;
                        None
                    }
                    None => None,
                }
            },
        ))))
    }

    async fn read_tail(&self, length: u64) -> Result<Tail, SourceError> {
        let blob_size = self.blob.len() as u64;
        let start = blob_size.saturating_sub(length);
        Ok(Tail {
            start,
            blob_size,
            body: self.read(start..blob_size, Priority::Demand).await?,
        })
    }
}
