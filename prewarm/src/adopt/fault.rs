//! Points of an adoption at which a test build can be killed: see [`hullspeed_daemon::fault`].

pub use hullspeed_daemon::fault::{VARIABLE, is_set, point};

/// Every point, in the order of an adoption.
pub const POINTS: [&str; 9] = [
    "taken",
    "journalled",
    "hostname",
    "files",
    "sysctls",
    "published",
    "answered",
    "rebranding",
    "rebranded",
];
