//! What the cache tells of its layers without opening them, and what operators have done to it.

use std::fs;
use std::io;
use std::time::SystemTime;

use estargz::digest::Digest;

use super::layer::RESIDENT;
use super::{CachedLayer, LayerStore, Residency, files};

/// Longest file with a bitmap that is read for a report: that of a layer of 64 million chunks.
const MAX_RESIDENT_BYTES: u64 = 8 << 20;

impl LayerStore {
    /// The layers that are here, in no order.
    pub fn layers(&self) -> Vec<Digest> {
        let root = self.path(&Digest::of([]));
        let Some(Ok(entries)) = root.parent().map(fs::read_dir) else { return Vec::new() };
        let digest = |name: &str| format!("sha256:{name}").parse().ok();
        entries
            .filter_map(|entry| digest(entry.ok()?.file_name().to_str()?))
            .collect()
    }

    /// When a layer was used last.
    pub fn last_used(&self, toc_digest: &Digest) -> Option<SystemTime> {
        fs::symlink_metadata(self.path(toc_digest).join("origin"))
            .and_then(|metadata| metadata.modified())
            .ok()
    }

    /// The number of a layer's chunks, and how many of them are resident, as its last checkpoint has them.
    pub fn peek(&self, toc_digest: &Digest) -> Option<(u32, u32)> {
        let bytes = files::read_bounded(&self.path(toc_digest).join(RESIDENT), MAX_RESIDENT_BYTES);
        Residency::peek(&bytes.ok()??)
    }
}

impl CachedLayer {
    /// Gives up a chunk whose bytes are found to be wrong; false if somebody waits for it just now.
    pub fn disown(&self, _chunk: u32) -> io::Result<bool> {
        Ok(false)
    }
}
