//! Making room: layers that nobody uses go first, then what mounted layers hold and nobody has read for longest.
//!
//! Whole layers go for the quota, for a full disk and for what is to be left free on the disk; parts of mounted layers only for the
//! first two, and only for a reader, since they are needed again. One thread makes room at a time; what the others wait for is then there.

use std::io;
use std::sync::PoisonError;
use std::time::Instant;

use super::layer::CachedLayer;
use super::room::Room;
use super::shelf::{FRUITLESS, Shelf};
use super::stale::remove_layer;
use crate::metrics::defs::EvictedLabels;

/// What is made free at least when the disk is full.
const LEAST_ON_DISK: u64 = 16 << 20;
/// Chunks of one layer that are given up with one write of its bitmap.
const BATCH: usize = 16 << 10;

/// Whole layers that were given up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dropped {
    /// How many.
    pub layers: usize,
    /// What they had on disk.
    pub bytes: u64,
    /// Those that could not be removed.
    pub failed: usize,
}

/// For whom room is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nobody waits: only what nobody uses goes.
    Nobody,
    /// A reader waits, or the quota was overrun: parts of mounted layers go too.
    Reader,
}

/// What tells whether room was made.
#[derive(Debug, Clone, Copy)]
enum Gain {
    /// What the layers have is less.
    Counted,
    /// More is free on the disk: blocks that are shared, or in use, come free with the last who has them.
    OnDisk,
}

impl Shelf {
    /// Keeps to the limits: counts, and gives up what is too much. Called every now and then.
    pub(super) fn tidy(&self) {
        self.count();
        let room = self.room();
        if room.excess(0) > 0 {
            self.retry();
            self.make_room(|shelf| shelf.room().excess(0), Need::Reader, Gain::Counted);
        }
        if room.shortage() > 0 {
            self.make_room(|shelf| shelf.room().shortage(), Need::Nobody, Gain::OnDisk);
        }
        self.note_room();
    }

    /// Lets room be made again after there was nothing to give up.
    fn retry(&self) {
        *self.making_room.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Makes room for so many bytes in the quota.
    pub(super) fn make_room_in_quota(&self, bytes: u64, need: Need) {
        self.make_room(|shelf| shelf.room().excess(bytes), need, Gain::Counted);
    }

    /// Makes room on a full disk; whether some was made.
    pub(super) fn make_room_on_disk(&self, bytes: u64, need: Need) -> bool {
        let wanted = bytes.max(LEAST_ON_DISK);
        self.make_room(|_| wanted, need, Gain::OnDisk)
    }

    /// Whether room was made.
    fn make_room(&self, wanted: impl Fn(&Self) -> u64, need: Need, gain: Gain) -> bool {
        let mut fruitless = self.making_room.lock().unwrap_or_else(PoisonError::into_inner);
        let Room { used, free, .. } = self.room();
        if need == Need::Reader && fruitless.is_some_and(|(at, then)| at.elapsed() < FRUITLESS && used == then) {
            return false;
        }
        // Somebody else may have made it meanwhile.
        self.count();
        let wanted = wanted(self);
        if wanted == 0 {
            return false;
        }
        let mut freed = self.drop_layers(wanted).bytes;
        if freed < wanted && need == Need::Reader {
            freed += self.drop_parts(wanted - freed);
        }
        self.count();
        let has_gained = match gain {
            Gain::Counted => freed > 0,
            Gain::OnDisk => self.room().free > free,
        };
        if need == Need::Reader {
            // Until something is stored, which could be given up.
            *fruitless = (!has_gained).then(|| (Instant::now(), self.room().used));
        }
        if freed > 0 {
            tracing::info!(wanted, freed, ?need, has_gained, "made room in the layer cache");
        }
        has_gained
    }

    /// Removes layers that nobody uses, on somebody's demand: all of them, or as many as the limits ask for.
    pub(super) fn prune(&self, all: bool) -> Dropped {
        let _alone = self.making_room.lock().unwrap_or_else(PoisonError::into_inner);
        self.count();
        let room = self.room();
        let wanted = if all {
            u64::MAX
        } else {
            room.excess(0).max(room.shortage())
        };
        let dropped = self.drop_layers(wanted);
        self.count();
        dropped
    }

    /// Removes layers that nobody uses until `wanted` bytes are free.
    fn drop_layers(&self, wanted: u64) -> Dropped {
        let mut dropped = Dropped::default();
        while dropped.bytes < wanted {
            let (layer, path, bytes) = match self.take_least() {
                Ok(Some(taken)) => taken,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot give up a layer of the cache");
                    dropped.failed += 1;
                    break;
                }
            };
            self.digests.forget(&layer);
            if let Err(error) = remove_layer(&path) {
                tracing::warn!(path = %path.display(), %error, "what is left of a layer stays until the next start");
                dropped.failed += 1;
                continue;
            }
            tracing::info!(toc = %layer, bytes, "gave up a layer that nobody uses");
            self.note_evicted("layer", bytes);
            dropped.layers += 1;
            dropped.bytes += bytes;
        }
        dropped
    }

    /// Punches holes into mounted layers until `wanted` bytes are free: first what was not read lately, then anything.
    fn drop_parts(&self, wanted: u64) -> u64 {
        let layers = self.all_open();
        let mut freed = 0;
        for anything in [false, true] {
            if anything && freed < wanted {
                // All that was cold is gone. What is read from here on is warm, and what is not is cold the next time.
                layers.iter().for_each(|layer| layer.heat.cool());
            }
            for layer in &layers {
                if freed >= wanted {
                    break;
                }
                match drop_cold(layer, wanted - freed, anything) {
                    Ok(bytes) => {
                        self.note_evicted("chunks", bytes);
                        freed += bytes;
                    }
                    Err(error) => {
                        tracing::warn!(dir = %layer.dir().display(), %error, "cannot give up chunks of a layer");
                    }
                }
            }
        }
        freed
    }

    fn note_evicted(&self, kind: &'static str, bytes: u64) {
        let evicted = self.metrics.cache_evicted_bytes.get_or_create(&EvictedLabels { kind });
        evicted.inc_by(bytes);
    }
}

/// Gives up chunks of one layer, cold ones or any, until `wanted` bytes are free or nothing is left.
fn drop_cold(layer: &CachedLayer, wanted: u64, anything: bool) -> io::Result<u64> {
    let residency = layer.residency();
    let count = residency.chunks();
    let mut freed = 0;
    let mut next = 0;
    while freed < wanted && next < count {
        let (mut chunks, mut bytes) = (Vec::new(), 0);
        while next < count && bytes < wanted - freed && chunks.len() < BATCH {
            if residency.contains(next) && (anything || !layer.heat.is_warm(next)) {
                bytes += layer.chunk(next).map_or(0, |chunk| u64::from(chunk.size));
                chunks.push(next);
            }
            next += 1;
        }
        if !chunks.is_empty() {
            freed += layer.give_up(&chunks)?;
        }
    }
    Ok(freed)
}

#[cfg(test)]
mod tests;
