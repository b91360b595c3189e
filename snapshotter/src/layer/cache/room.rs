//! How much room there is, and what is said where there is none for what nobody waits for.

use std::sync::atomic::Ordering;

use hullspeed_daemon::answer::size;

use super::shelf::Shelf;

/// The part of the quota that is made free at once when it is reached, as a divisor.
const SLACK: u64 = 16;
/// Bytes free on the disk below which nothing is fetched ahead, whatever is to stay free: more than is under way at once, which would be
/// fetched for nothing.
const LEAST_FREE: u64 = 16 << 20;

/// How much room there is, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) used: u64,
    pub(super) spare: u64,
    pub(super) quota: u64,
    pub(super) min_free: u64,
    pub(super) free: u64,
}

/// Why nothing is fetched but for readers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoRoom {
    /// The last part of the quota is for readers.
    #[error("the layers in use have {} of the {} of cache.quota", size(*used), size(*quota))]
    Quota {
        /// Bytes of layers that cannot go.
        used: u64,
        /// Bytes of all that may be there.
        quota: u64,
    },
    /// Others are to have what is free on the disk.
    #[error("{} are free on the filesystem, and cache.min_free leaves {} to others", size(*free), size(*min_free))]
    MinFree {
        /// Bytes that are free.
        free: u64,
        /// Bytes that are to stay free.
        min_free: u64,
    },
    /// Readers need the rest.
    #[error("{} are free on the filesystem, and readers may need them", size(*free))]
    Disk {
        /// Bytes that are free.
        free: u64,
    },
}

impl NoRoom {
    /// The limit's name; stable.
    pub fn limit(&self) -> &'static str {
        match self {
            Self::Quota { .. } => "quota",
            Self::MinFree { .. } => "min_free",
            Self::Disk { .. } => "disk",
        }
    }
}

impl Room {
    /// Bytes to give up so that `wanted` more fit into the quota; some more than needed, so that it is not soon again.
    pub(super) fn excess(&self, wanted: u64) -> u64 {
        let needed = self.used.saturating_add(wanted);
        if needed <= self.quota {
            return 0;
        }
        needed - self.quota + self.quota / SLACK
    }

    /// Bytes of layers that may go to give up for the sake of others on the disk.
    pub(super) fn shortage(&self) -> u64 {
        self.min_free.saturating_sub(self.free)
    }

    /// What keeps from being stored what nobody waits for. It may fill what belongs to layers that may go, and never the last part
    /// of the quota: what is given up there for a reader must not be fetched again for nobody.
    pub(super) fn lack(&self) -> Option<NoRoom> {
        let below = self.quota - self.quota / (SLACK / 2);
        let used = self.used.saturating_sub(self.spare);
        let (quota, free, min_free) = (self.quota, self.free, self.min_free);
        if used > below {
            return Some(NoRoom::Quota { used, quota });
        }
        let to_be_had = free.saturating_add(self.spare);
        if to_be_had <= min_free {
            return Some(NoRoom::MinFree { free, min_free });
        }
        (to_be_had < LEAST_FREE).then_some(NoRoom::Disk { free })
    }
}

impl Shelf {
    /// Whether what nobody waits for may be stored. The first time that it may not is logged.
    pub(super) fn has_room(&self) -> bool {
        let lack = self.room().lack();
        if let Some(lack) = lack
            && !self.short.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                limit = lack.limit(),
                reason = %lack,
                "the layer cache has no room to spare: what containers read is fetched, and nothing ahead of them"
            );
        }
        lack.is_none()
    }

    /// Tells when there is room again, and puts it in the metrics. Called every now and then, so that a disk on the brink does not
    /// fill the log.
    pub(super) fn note_room(&self) {
        let has_room = self.has_room();
        if has_room && self.short.swap(false, Ordering::Relaxed) {
            tracing::info!("the layer cache has room again: fetching ahead goes on");
        }
        self.metrics.cache_short_of_room.set(i64::from(!has_room));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn room() -> Room {
        Room {
            used: 0,
            spare: 0,
            quota: u64::MAX,
            min_free: 5 * GIB,
            free: 10 * GIB,
        }
    }

    #[test]
    fn a_disk_with_a_tenth_free_is_no_lack_and_one_that_is_nearly_full_is_named() {
        assert_eq!(room().lack(), None);
        let free = 3 * GIB + GIB / 2;
        let full = Room { free, ..room() };
        let lack = full.lack().unwrap();
        assert_eq!(
            (lack, lack.limit()),
            (
                NoRoom::MinFree {
                    free,
                    min_free: 5 * GIB
                },
                "min_free"
            )
        );
        assert_eq!(
            lack.to_string(),
            "3.5 GiB are free on the filesystem, and cache.min_free leaves 5.0 GiB to others"
        );
        assert_eq!(full.shortage(), 3 * GIB / 2);
        // What unused layers have can be had.
        let spare = Room { spare: 2 * GIB, ..full };
        assert_eq!(spare.lack(), None);
        // No limit at all, and a disk with hardly a byte.
        let unlimited = |free| Room {
            min_free: 0,
            free,
            ..room()
        };
        assert_eq!(unlimited(LEAST_FREE).lack(), None);
        let lack = unlimited(5).lack().unwrap();
        assert_eq!((lack, lack.limit()), (NoRoom::Disk { free: 5 }, "disk"));
    }

    #[test]
    fn the_last_part_of_the_quota_is_for_readers() {
        let at = |used| Room {
            used,
            quota: 8 * GIB,
            ..room()
        };
        assert_eq!(at(7 * GIB).lack(), None);
        let lack = at(7 * GIB + 1).lack().unwrap();
        assert_eq!(lack.limit(), "quota");
        assert_eq!(
            lack.to_string(),
            "the layers in use have 7.0 GiB of the 8.0 GiB of cache.quota"
        );
        assert_eq!(at(8 * GIB).excess(0), 0);
        assert_eq!(at(8 * GIB).excess(1), GIB / 2 + 1);
    }
}
