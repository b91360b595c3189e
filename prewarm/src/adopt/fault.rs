//! Points at which a test build can be killed, named by `HULLSPEED_FAULT_POINT`. Release builds have none.

/// The variable that names the point.
pub const VARIABLE: &str = "HULLSPEED_FAULT_POINT";

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

/// Whether this process is to be killed at the point `name`.
#[must_use]
pub fn is_set(name: &str) -> bool {
    debug_assert!(POINTS.contains(&name), "{name} is no fault point");
    cfg!(debug_assertions) && std::env::var_os(VARIABLE).is_some_and(|point| point == name)
}

/// Kills the process, as `kill -9` would, if it is to be killed here.
pub fn point(name: &str) {
    if is_set(name) {
        // Nothing of ours runs any more after this, destructors and buffers included.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
