//! Points at which a test build can be killed, as `kill -9` would. Release builds have none.
//!
//! [`VARIABLE`] names the point: `name`, or `name:3` for the third time that it is passed. If it begins with a slash it names a file with
//! that in it. Then a process that runs can be told its end, and its successor, with the same environment, lives: the file is taken away
//! first.
//!
//! Which points a program has, its own list says; a test goes through all of them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU32, Ordering};

/// The variable that names the point, or the file with its name.
pub const VARIABLE: &str = "HULLSPEED_FAULT_POINT";

/// How often the point was passed at which this process is to be killed. It is the process that dies, so it is the process's.
static PASSED: AtomicU32 = AtomicU32::new(0);

/// Where this process is to be killed, and at which passing.
struct Armed {
    name: String,
    turn: u32,
    file: Option<OsString>,
}

impl Armed {
    fn from_environment() -> Option<Self> {
        let value = std::env::var_os(VARIABLE)?;
        if !value.as_bytes().starts_with(b"/") {
            return Some(Self::parse(&value.to_string_lossy(), None));
        }
        let text = std::fs::read_to_string(&value).ok()?;
        Some(Self::parse(text.trim(), Some(value)))
    }

    fn parse(text: &str, file: Option<OsString>) -> Self {
        let numbered = text
            .rsplit_once(':')
            .and_then(|(name, turn)| Some((name, turn.parse().ok()?)));
        let (name, turn) = numbered.unwrap_or((text, 1));
        Self {
            name: name.to_owned(),
            turn,
            file,
        }
    }

    /// For whoever comes after.
    fn disarm(&self) {
        if let Some(file) = &self.file {
            // It may be gone: another thread is at the same point.
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Whether this process is to be killed at the point `name`, sometime.
#[must_use]
pub fn is_set(name: &str) -> bool {
    cfg!(debug_assertions) && Armed::from_environment().is_some_and(|armed| armed.name == name)
}

/// Kills the process if it is to be killed here, now.
pub fn point(name: &str) {
    if !cfg!(debug_assertions) {
        return;
    }
    let Some(armed) = Armed::from_environment().filter(|armed| armed.name == name) else {
        return;
    };
    if PASSED.fetch_add(1, Ordering::AcqRel) + 1 >= armed.turn {
        armed.disarm();
        // Nothing of ours runs any more after this, destructors and buffers included.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_has_a_name_and_perhaps_a_turn() {
        let armed = |text: &str| {
            let armed = Armed::parse(text, None);
            (armed.name, armed.turn)
        };
        assert_eq!(armed("taken"), ("taken".to_owned(), 1));
        assert_eq!(armed("taken:7"), ("taken".to_owned(), 7));
        assert_eq!(armed("taken:x"), ("taken:x".to_owned(), 1));
        assert!(!is_set("taken"));
        point("taken");
    }
}
