//! Verification of what is cached: every resident chunk against the digest in its layer's TOC.
//!
//! It gives the machine to everybody else for as long as it has used it, and holds no lock of a layer while it reads. A chunk that is
//! wrong stops being resident, so the next read fetches it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Inspector;
use crate::layer::NotLazy;
use crate::layer::cache::CachedLayer;
use crate::layer::fetch::{LayerFetch, LayerNames, Reading};
use crate::layer::layers::{Shared, Slot, Used};

/// Wrong chunks that are named; the others are counted.
pub const MAX_WRONG_TOLD: usize = 32;
/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// Work between two pauses, each as long as the work before it.
const SLICE: Duration = Duration::from_millis(20);
/// Attempts to give up a wrong chunk that readers wait for.
const DROP_ATTEMPTS: u32 = 50;

/// Why nothing is verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// One at a time.
    #[error("another verification is under way")]
    Busy,
    /// The layer is not here.
    #[error("no layer of the cache has digest {digest}")]
    NotFound {
        /// Digest asked for.
        digest: Digest,
    },
    /// The daemon stops.
    #[error("the daemon is stopping")]
    Stopping,
}

/// A chunk that was not what its layer's TOC promises.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongChunk {
    /// Identity of the layer.
    pub toc_digest: Digest,
    /// Number of the chunk.
    pub chunk: u32,
    /// Path of its file.
    pub file: String,
    /// Where it begins in the file.
    pub offset: u64,
}

/// How far a verification is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Layers to look at.
    pub layers: usize,
    /// Layers looked at.
    pub layers_done: usize,
    /// Chunks looked at.
    pub chunks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Chunks that were wrong.
    pub wrong: u64,
    /// The first of them.
    pub told: Vec<WrongChunk>,
    /// Layers that could not be opened or read.
    pub failed: usize,
    /// The last of these failures.
    pub error: String,
    /// Nothing more will be done.
    pub done: bool,
}

/// A verification under way; dropping it stops the work.
pub struct Verifying {
    reports: watch::Receiver<VerifyReport>,
    told_of_end: bool,
    _stop: DropGuard,
}

impl Verifying {
    /// How far it is, at each change at most twice a second; `None` after the last report.
    pub async fn next(&mut self) -> Option<VerifyReport> {
        if self.told_of_end {
            return None;
        }
        // The first report, and the last one, come without waiting; so does the end of a work that was stopped.
        let over = self.reports.wait_for(|report| report.done);
        let is_gone = matches!(tokio::time::timeout(TELL_EVERY, over).await, Ok(Err(_)));
        let report = self.reports.borrow_and_update().clone();
        self.told_of_end = report.done || is_gone;
        Some(report)
    }
}

impl Inspector {
    /// Starts to verify the layer whose blob or TOC has `digest`, or all layers.
    pub async fn verify(&self, digest: Option<Digest>) -> Result<Verifying, VerifyError> {
        let turn = self.verifying.clone().try_acquire_owned();
        let turn = turn.map_err(|_| VerifyError::Busy)?;
        let mut layers = self.survey().await;
        if let Some(digest) = digest {
            layers.retain(|layer| layer.toc == digest || layer.layer == digest);
            if layers.is_empty() {
                return Err(VerifyError::NotFound { digest });
            }
        }
        let shared = self.shared.clone();
        if shared.stop.is_cancelled() {
            return Err(VerifyError::Stopping);
        }
        let first = VerifyReport {
            layers: layers.len(),
            ..VerifyReport::default()
        };
        let (sender, reports) = watch::channel(first);
        let stop = shared.stop.child_token();
        let guard = stop.clone().drop_guard();
        let work = {
            let shared = shared.clone();
            async move {
                for layer in layers {
                    if stop.is_cancelled() {
                        return;
                    }
                    let names = LayerNames {
                        image: layer.image,
                        layer_digest: layer.layer,
                    };
                    let verified = shared.verify_held(layer.toc, names, &sender, &stop).await;
                    sender.send_modify(|report| {
                        report.layers_done += 1;
                        if let Err(error) = verified {
                            report.failed += 1;
                            report.error = error;
                        }
                    });
                }
                drop(turn);
                sender.send_modify(|report| report.done = true);
            }
        };
        // A task of its own: it gives back what it holds, also when nobody waits for it any more.
        shared.tasks.spawn_on(work, &shared.runtime);
        Ok(Verifying {
            reports,
            told_of_end: false,
            _stop: guard,
        })
    }
}

impl Shared {
    /// Verifies one layer, which nobody closes meanwhile.
    async fn verify_held(
        self: &Arc<Self>,
        toc: Digest,
        names: LayerNames,
        sender: &watch::Sender<VerifyReport>,
        stop: &CancellationToken,
    ) -> Result<(), String> {
        let used = Used::new(self, toc);
        let fetch = match self.hold(&used.slot, toc, names).await {
            Ok(fetch) => fetch,
            // Removed since it was listed.
            Err(NotLazy::NotCached { .. }) => return Ok(()),
            Err(error) => return Err(hullspeed_daemon::error::chain(&error)),
        };
        let (layer, sender, stop) = (fetch.layer().clone(), sender.clone(), stop.clone());
        let slot = used.slot.clone();
        let (mending, runtime) = (fetch.clone(), self.runtime.clone());
        let metrics = self.metrics.clone();
        let verified = tokio::task::spawn_blocking(move || {
            verify_layer(&layer, &stop, |chunk, wrong| {
                if let Some(wrong) = &wrong {
                    metrics.verify_failures.inc();
                    if layer.is_read_by_kernel() {
                        runtime.block_on(mend(&mending, wrong));
                    }
                    forget_pages(&slot, &layer, wrong);
                }
                sender.send_modify(|report| note(report, chunk, wrong));
            })
        })
        .await;
        self.let_go(&used.slot, fetch).await;
        match verified {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("layer with TOC {toc}: {error}")),
            Err(panic) => Err(panic.to_string()),
        }
    }
}

fn note(report: &mut VerifyReport, bytes: u64, wrong: Option<WrongChunk>) {
    report.chunks += 1;
    report.bytes += bytes;
    if let Some(wrong) = wrong {
        report.wrong += 1;
        if report.told.len() < MAX_WRONG_TOLD {
            report.told.push(wrong);
        }
    }
}

/// Makes sure that nobody reads a wrong chunk any more. Who waits for it meanwhile waits for its neighbours only.
fn drop_wrong(layer: &CachedLayer, chunk: u32) -> std::io::Result<()> {
    for _ in 0..DROP_ATTEMPTS {
        if layer.disown(chunk)? {
            return Ok(());
        }
        std::thread::sleep(SLICE);
    }
    Err(std::io::Error::other(format!(
        "chunk {chunk} is wrong and is being read all the time; it stays for now"
    )))
}

/// Fetches a wrong chunk at once, where the kernel may read it without asking.
async fn mend(fetch: &Arc<LayerFetch>, wrong: &WrongChunk) {
    if let Err(error) = fetch.ensure(wrong.chunk..wrong.chunk + 1, Reading::Part).await {
        tracing::error!(toc = %wrong.toc_digest, chunk = wrong.chunk, file = wrong.file, error = &*error as &dyn std::error::Error,
            "wrong bytes stay readable, since the right ones cannot be had now");
    }
}

/// Makes the kernel forget what it read of a wrong chunk before that was dropped.
fn forget_pages(slot: &Slot, layer: &CachedLayer, wrong: &WrongChunk) {
    let forgotten = layer.index().chunk(wrong.chunk).map(|chunk| slot.forget_pages(&chunk));
    if let Some(Err(error)) = forgotten {
        tracing::error!(toc = %wrong.toc_digest, chunk = wrong.chunk, file = wrong.file, %error,
            "wrong bytes that were read already stay in the kernel's page cache; drop it, or start the containers of this image anew");
    }
}

/// Looks at every resident chunk, and tells the length of each and whether it was wrong. Blocks.
fn verify_layer(
    layer: &CachedLayer,
    stop: &CancellationToken,
    mut tell: impl FnMut(u64, Option<WrongChunk>),
) -> std::io::Result<()> {
    let index = layer.index();
    let mut began = Instant::now();
    for number in 0..index.chunk_count() {
        if stop.is_cancelled() {
            return Ok(());
        }
        let Some(chunk) = index.chunk(number).filter(|_| layer.residency().contains(number)) else {
            continue;
        };
        let range = chunk.data_offset..chunk.data_offset.saturating_add(u64::from(chunk.size));
        let is_right = || layer.read(range.clone()).map(|bytes| Digest::of(bytes) == chunk.digest);
        // A chunk that was given up and fetched again while it was read is looked at once more.
        let is_wrong = !is_right()? && layer.residency().contains(number) && !is_right()?;
        let wrong = (is_wrong && layer.residency().contains(number)).then(|| {
            let file = index.path_of(chunk.ino);
            WrongChunk {
                toc_digest: layer.toc_digest(),
                chunk: number,
                file: String::from_utf8_lossy(&file).into_owned(),
                offset: chunk.file_offset,
            }
        });
        if let Some(wrong) = &wrong {
            tracing::error!(toc = %wrong.toc_digest, chunk = wrong.chunk, file = wrong.file, offset = wrong.offset,
                "the cache holds wrong bytes; they will be fetched again");
            drop_wrong(layer, number)?;
        }
        tell(u64::from(chunk.size), wrong);
        let busy = began.elapsed();
        if busy >= SLICE {
            std::thread::sleep(busy);
            began = Instant::now();
        }
    }
    Ok(())
}
