//! What a keeper leaves to the keeper that replaces it in the same process: a list in memory, and the descriptors.
//!
//! Lines of words, a name last, since only names may have blanks in them:
//!
//! ```text
//! hullspeed-keeper 1
//! failures 0
//! oom 0
//! child 4242 1
//! inbox 5 hullspeed-keeper-…
//! listener 6 snapshots
//! kept 7 fanotify
//! ```

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Pid;

use crate::inheritance::take_over;

/// The variable that has the list's descriptor.
pub const VARIABLE: &str = "HULLSPEED_KEEPER_HANDOVER";

/// The format; raised with every change.
pub const FORMAT: &str = "1";

/// Most bytes of a list that are read.
const LIMIT: u64 = 32 << 20;

/// Why what was left cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The list cannot be read.
    #[error("the list of what is handed over cannot be read")]
    List(#[source] io::Error),
    /// A line is not understood.
    #[error("line {number} of what is handed over is not understood: {line:?}")]
    Line {
        /// Its number.
        number: usize,
        /// The line.
        line: String,
    },
    /// A descriptor is not there.
    #[error("the descriptor on line {number} of what is handed over cannot be taken over")]
    Descriptor {
        /// The line's number.
        number: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no socket for messages.
    #[error("what is handed over has no inbox")]
    Inbox,
}

/// What is left.
#[derive(Debug, Default)]
pub struct Handover {
    /// Bad starts in a row.
    pub failures: u32,
    /// The score for the kernel's killer that the keeper was started with.
    pub oom_score: Option<i32>,
    /// The program's process, and whether it said that it is ready.
    pub child: Option<(Pid, bool)>,
    /// The socket for messages, by name.
    pub inbox: Option<(String, OwnedFd)>,
    /// Listeners, by name.
    pub listeners: Vec<(String, OwnedFd)>,
    /// What is kept, by name.
    pub kept: Vec<(String, OwnedFd)>,
}

/// The list, while it is written.
#[derive(Debug)]
pub struct Draft(String);

impl Draft {
    /// A list that begins with numbers.
    #[must_use]
    pub fn new(failures: u32, oom_score: Option<i32>, child: Option<(Pid, bool)>) -> Self {
        let mut text = format!("hullspeed-keeper {FORMAT}\nfailures {failures}\n");
        if let Some(score) = oom_score {
            let _ = writeln!(text, "oom {score}");
        }
        if let Some((process, ready)) = child {
            let _ = writeln!(text, "child {} {}", process.as_raw_pid(), u8::from(ready));
        }
        Self(text)
    }

    /// Adds a descriptor.
    pub fn add(&mut self, kind: &str, (name, descriptor): (&str, BorrowedFd<'_>)) {
        let _ = writeln!(self.0, "{kind} {} {name}", descriptor.as_raw_fd());
    }

    /// The list in memory, open to be read by the next program.
    pub fn finish(self) -> io::Result<File> {
        let mut file = File::from(memfd_create("hullspeed-keeper", MemfdFlags::empty())?);
        file.write_all(self.0.as_bytes())?;
        file.rewind()?;
        Ok(file)
    }
}

impl Handover {
    /// Reads what the variable's value leads to, and takes the descriptors over.
    pub fn take(value: &str) -> Result<Self, HandoverError> {
        let unusable = HandoverError::List;
        let number = value.parse().map_err(|error| unusable(io::Error::other(error)))?;
        let list = File::from(take_over(number).map_err(unusable)?);
        let mut text = String::new();
        list.take(LIMIT).read_to_string(&mut text).map_err(unusable)?;
        let handover = Self::read(&text)?;
        if handover.inbox.is_none() {
            Err(HandoverError::Inbox)
        } else {
            Ok(handover)
        }
    }

    fn read(text: &str) -> Result<Self, HandoverError> {
        let mut handover = Self::default();
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            let unclear = || HandoverError::Line {
                number,
                line: line.to_owned(),
            };
            let (kind, rest) = line.split_once(' ').ok_or_else(unclear)?;
            if (index == 0) != (kind == "hullspeed-keeper") {
                return Err(unclear());
            }
            match kind {
                "hullspeed-keeper" if rest == FORMAT => {}
                "failures" => handover.failures = rest.parse().map_err(|_| unclear())?,
                "oom" => handover.oom_score = Some(rest.parse().map_err(|_| unclear())?),
                "child" => handover.child = Some(child(rest).ok_or_else(unclear)?),
                "inbox" | "listener" | "kept" => {
                    let (descriptor, name) = rest.split_once(' ').ok_or_else(unclear)?;
                    let descriptor: RawFd = descriptor.parse().map_err(|_| unclear())?;
                    let taken = take_over(descriptor);
                    let taken = taken.map_err(|source| HandoverError::Descriptor { number, source })?;
                    let entry = (name.to_owned(), taken);
                    match kind {
                        "inbox" => handover.inbox = Some(entry),
                        "listener" => handover.listeners.push(entry),
                        _ => handover.kept.push(entry),
                    }
                }
                _ => return Err(unclear()),
            }
        }
        Ok(handover)
    }
}

fn child(text: &str) -> Option<(Pid, bool)> {
    let (process, ready) = text.split_once(' ')?;
    Some((
        Pid::from_raw(process.parse().ok().filter(|process| *process > 0)?)?,
        ready == "1",
    ))
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd as _, IntoRawFd as _};

    use proptest::prelude::*;
    use rustix::io::{FdFlags, fcntl_setfd};

    use super::*;

    #[test]
    fn what_is_left_is_found() {
        let files: Vec<_> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        let mut draft = Draft::new(7, Some(-5), Pid::from_raw(42).map(|child| (child, true)));
        for (kind, file) in ["inbox", "listener", "kept"].into_iter().zip(&files) {
            draft.add(kind, ("a name", file.as_fd()));
        }
        let list = draft.finish().unwrap().into_raw_fd();
        let numbers: Vec<_> = files
            .into_iter()
            .map(|file| {
                fcntl_setfd(&file, FdFlags::empty()).unwrap();
                file.into_raw_fd()
            })
            .collect();
        let found = Handover::take(&list.to_string()).unwrap();
        assert_eq!((found.failures, found.oom_score), (7, Some(-5)));
        assert_eq!(found.child, Pid::from_raw(42).map(|child| (child, true)));
        let found = [
            found.inbox.unwrap(),
            found.listeners.into_iter().next().unwrap(),
            found.kept.into_iter().next().unwrap(),
        ];
        for ((name, descriptor), number) in found.iter().zip(numbers) {
            assert_eq!((name.as_str(), descriptor.as_raw_fd()), ("a name", number));
        }
    }

    #[test]
    fn what_is_damaged_is_named() {
        for text in [
            "failures 1",
            "hullspeed-keeper 2",
            "hullspeed-keeper 1\nchild 0 1",
            "hullspeed-keeper 1\nkept x y",
            "hullspeed-keeper 1\nhullspeed-keeper 1",
            "hullspeed-keeper 1\nnews 1",
            "hullspeed-keeper 1\nkept 999999 a",
        ] {
            Handover::read(text).unwrap_err();
        }
        for value in ["", "x", "999999", "-1"] {
            Handover::take(value).unwrap_err();
        }
    }

    proptest! {
        // Numbers above what is open, so that no descriptor of another test is taken over.
        #[test]
        fn arbitrary_lists_are_refused_or_read(text in "(hullspeed-keeper 1\n)?((child|failures|oom|kept|inbox) -?[1-9]{6} .{0,8}\n){0,4}") {
            let _ = Handover::read(&text);
        }
    }
}
