//! What a keeper leaves to the keeper that replaces it in the same process: a list in memory, and the descriptors.
//!
//! Lines of words, a name last, since only names may have blanks in them:
//!
//! ```text
//! hullspeed-keeper 2
//! failures 0
//! oom 0
//! child 4242 1
//! program /usr/local/bin/hullspeed-keeper
//! inbox 5 /run/hullspeed-keeper/notify-…
//! listener 6 snapshots
//! kept 7 fanotify
//! end
//! ```
//!
//! To give up here would be to lose everything that is kept. So only a list of another format is refused; a line that cannot be
//! used is passed over and told, and so is a list without its end.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Pid;

use crate::inheritance::take_over;

/// The variable that has the list's descriptor.
pub const VARIABLE: &str = "HULLSPEED_KEEPER_HANDOVER";

/// The format; raised with every change.
pub const FORMAT: &str = "2";

/// Most bytes of a list that are read.
const LIMIT: u64 = 32 << 20;

/// Most lines that are told when they cannot be used; the others are counted.
const TOLD_LIMIT: usize = 16;

/// The last line.
const END: &str = "end";

/// Why what was left cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The list cannot be read.
    #[error("the list of what is handed over cannot be read")]
    List(#[source] io::Error),
    /// It is no list, or one of another format.
    #[error("what is handed over does not begin as a list of format {FORMAT}: {0:?}")]
    Format(String),
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
    /// The keeper's own program.
    pub program: Option<PathBuf>,
    /// What of it cannot be used.
    pub faults: Faults,
}

/// What of a list cannot be used.
#[derive(Debug, Default)]
pub struct Faults {
    /// How many lines; one that has no end counts as one.
    pub count: usize,
    /// The first of them, and what is wrong with them.
    pub told: Vec<String>,
}

impl Faults {
    fn add(&mut self, what: impl FnOnce() -> String) {
        self.count += 1;
        if self.told.len() < TOLD_LIMIT {
            self.told.push(what());
        }
    }
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

    /// Adds the keeper's own program, if its path is one line of text.
    pub fn add_program(&mut self, program: &Path) {
        if let Some(program) = program.to_str().filter(|program| !program.contains(char::is_control)) {
            let _ = writeln!(self.0, "program {program}");
        }
    }

    /// Adds a descriptor.
    pub fn add(&mut self, kind: &str, (name, descriptor): (&str, BorrowedFd<'_>)) {
        let _ = writeln!(self.0, "{kind} {} {name}", descriptor.as_raw_fd());
    }

    /// The list in memory, open to be read by the next program.
    pub fn finish(self) -> io::Result<File> {
        let mut file = File::from(memfd_create("hullspeed-keeper", MemfdFlags::empty())?);
        file.write_all(self.0.as_bytes())?;
        writeln!(file, "{END}")?;
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
        let mut bytes = Vec::new();
        list.take(LIMIT).read_to_end(&mut bytes).map_err(unusable)?;
        Self::read(&String::from_utf8_lossy(&bytes))
    }

    fn read(text: &str) -> Result<Self, HandoverError> {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        if first.split_once(' ') != Some(("hullspeed-keeper", FORMAT)) {
            return Err(HandoverError::Format(first.chars().take(80).collect()));
        }
        let mut handover = Self::default();
        let mut ended = false;
        for (index, line) in lines.enumerate() {
            if line == END {
                ended = true;
                break;
            }
            if let Err(error) = handover.take_line(line) {
                handover.faults.add(|| format!("line {}, {line:?}: {error}", index + 2));
            }
        }
        if !ended {
            handover.faults.add(|| "the list has no end".to_owned());
        }
        Ok(handover)
    }

    fn take_line(&mut self, line: &str) -> io::Result<()> {
        let unclear = || io::Error::new(io::ErrorKind::InvalidData, "it is not understood");
        let (kind, rest) = line.split_once(' ').ok_or_else(unclear)?;
        match kind {
            "failures" => self.failures = rest.parse().map_err(|_| unclear())?,
            "oom" => self.oom_score = Some(rest.parse().map_err(|_| unclear())?),
            "child" => self.child = Some(child(rest).ok_or_else(unclear)?),
            "program" => self.program = Some(rest.into()),
            "inbox" | "listener" | "kept" => {
                let (descriptor, name) = rest.split_once(' ').ok_or_else(unclear)?;
                let descriptor: RawFd = descriptor.parse().map_err(|_| unclear())?;
                let entry = (name.to_owned(), take_over(descriptor)?);
                match kind {
                    "inbox" => self.inbox = Some(entry),
                    "listener" => self.listeners.push(entry),
                    _ => self.kept.push(entry),
                }
            }
            _ => return Err(unclear()),
        }
        Ok(())
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
        draft.add_program(Path::new("/a keeper"));
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
        assert_eq!(
            (found.program.as_deref(), found.faults.count),
            (Some(Path::new("/a keeper")), 0)
        );
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
    fn what_is_no_list_of_this_format_is_refused() {
        for text in [
            "",
            "failures 1",
            "hullspeed-keeper 1\nend",
            "hullspeed-keeper 2x\nend",
            "hullspeed-keeper",
        ] {
            Handover::read(text).unwrap_err();
        }
        for value in ["", "x", "999999", "-1"] {
            Handover::take(value).unwrap_err();
        }
    }

    #[test]
    fn a_line_that_cannot_be_used_is_passed_over_and_told() {
        let file = tempfile::tempfile().unwrap();
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        let number = file.into_raw_fd();
        for line in [
            "child 0 1",
            "kept x y",
            "hullspeed-keeper 2",
            "news 1",
            "nothing",
            "kept 999999 a",
            "inbox 999998 b",
            "failures -1",
        ] {
            let found = Handover::read(&format!("hullspeed-keeper 2\noom -7\n{line}\nfailures 3\nend\n")).unwrap();
            assert_eq!(
                (found.faults.count, found.failures, found.oom_score),
                (1, 3, Some(-7)),
                "{line}"
            );
            assert!(
                found.faults.told[0].contains(line) && found.faults.told[0].starts_with("line 3"),
                "{line}"
            );
        }
        let text = format!("hullspeed-keeper 2\nkept 999999 gone\nkept {number} there\nend\n");
        let found = Handover::read(&text).unwrap();
        assert_eq!(
            (found.kept.len(), found.kept[0].0.as_str(), found.faults.count),
            (1, "there", 1)
        );
        let many = "kept x y\n".repeat(1000);
        let found = Handover::read(&format!("hullspeed-keeper 2\n{many}end\n")).unwrap();
        assert_eq!((found.faults.count, found.faults.told.len()), (1000, TOLD_LIMIT));
    }

    #[test]
    fn a_list_that_is_torn_is_noticed_wherever() {
        let whole = "hullspeed-keeper 2\nfailures 12\nend\n";
        assert_eq!(Handover::read(whole).unwrap().faults.count, 0);
        for length in "hullspeed-keeper 2".len()..whole.len() - "\n".len() {
            assert!(Handover::read(&whole[..length]).unwrap().faults.count > 0, "{length}");
        }
    }

    proptest! {
        // Numbers above what is open, so that no descriptor of another test is taken over.
        #[test]
        fn arbitrary_lists_are_refused_or_read(text in "(hullspeed-keeper 2\n)?((child|failures|oom|kept|inbox|end) -?[1-9]{6} .{0,8}\n){0,4}") {
            let _ = Handover::read(&text);
        }
    }
}
