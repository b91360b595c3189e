//! Points on the way of a layer at which a test build can be killed: see [`hullspeed_daemon::fault`].
//!
//! Each is between two steps of which a successor may find the first done and the second not. `tests/tests/privileged_reads_fault_points.rs`
//! goes through all of them.

pub use hullspeed_daemon::fault::{VARIABLE, point};

/// On the way of content into the cache, whoever reads it.
pub const CACHE: [&str; 9] = [
    // A layer's directory is whole and has not its name.
    "layer-written",
    // The bytes of a chunk are in `data` and it is not marked.
    "chunk-written",
    // It is marked and in no checkpoint, and nobody was told.
    "chunk-marked",
    // A checkpoint: `data` is synced, the bitmap is not written.
    "checkpoint-synced",
    // A small file that replaces another, as the bitmap does, is written and has not its name.
    "file-written",
    // It has its name, and memory does not know.
    "checkpoint-done",
    // A layer is mounted and nobody was told.
    "layer-mounted",
    // No snapshot refers to a layer any more, and it is mounted.
    "layer-released",
    // It is unmounted, and its cache is open.
    "layer-unmounted",
];

/// On the way of a layer that is mounted natively.
pub const EROFS: [&str; 18] = [
    // `data` has its note that the kernel reads it.
    "native-noted",
    // The store has `data` and not the group.
    "native-half-kept",
    // The descriptors are kept and there is no mark.
    "native-kept",
    // The mark is there and no file system.
    "native-marked",
    // The file system is there and nobody sees it.
    "native-created",
    // An event was read into the journal's inbox.
    "event-read",
    // It is in the table and in the inbox.
    "event-entered",
    // It is in the table alone.
    "event-taken",
    // What it asks for is there, and it is not answered.
    "event-fetched",
    // It is answered and in the table.
    "event-answered",
    // It is in no table, and its descriptor is open.
    "event-forgotten",
    // A successor has occupied the numbers of pending events and answered none.
    "events-reserved",
    // The layer is complete and durable, and has its mark.
    "native-whole",
    // The mark is gone, what was asked before is not answered.
    "native-unmarked",
    // The journal has no slot of the layer, the store has its descriptors.
    "native-voided",
    // Another file system is below the one that is shown.
    "native-beneath",
    // It is shown, and nobody in this process knows.
    "native-replaced",
    // The layer is unmounted, the store has its descriptors.
    "native-unmounted",
];

/// On the way of a layer that is mounted by FUSE.
pub const FUSE: [&str; 7] = [
    // The layer is mounted and the session is not kept.
    "session-mounted",
    // The store has how files are opened in it, and not the session.
    "session-half-kept",
    // It is kept and nobody was told.
    "session-kept",
    // A request was read and nothing done about it.
    "request-read",
    // What it asks for is there, and it is not answered.
    "request-fetched",
    // A successor serves what was kept, and has not told that it is mounted.
    "session-resumed",
    // The layer is unmounted and the session is kept.
    "session-unmounted",
];
