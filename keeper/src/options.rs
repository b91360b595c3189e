//! The command line.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::time::Duration;

use crate::inbox::DIRECTORY_LIMIT;
use crate::notification::is_name;

/// What `--help` shows.
pub const HELP: &str = "\
Supervises one program and keeps its file descriptors while it is away

Usage: hullspeed-keeper [OPTIONS] -- PROGRAM [ARGUMENTS]...

Options:
      --max-descriptors N   The most descriptors that are kept [default: 4096]
      --listen NAME=PATH    A Unix socket to make for the program; may be given several times
      --stop-timeout SECS   How long the program may take to end before it is killed [default: 30]
      --runtime-directory DIR
                            Where the socket for the program's messages is, with mode 0700
                            [default: /run/hullspeed-keeper]
  -h, --help                Shows this
  -V, --version             Shows the version

Signals: SIGTERM and SIGINT stop the program and the keeper, SIGHUP starts the program anew,
SIGUSR1 replaces the keeper by what is in its file now, without a word to the program.
";

/// Where the socket for messages is.
const RUNTIME_DIRECTORY: &str = "/run/hullspeed-keeper";

/// The most that `--max-descriptors` may be; as many as the client takes over.
const DESCRIPTORS_LIMIT: usize = 1 << 16;

/// The most sockets: their names share the environment with those of what is kept.
const LISTENERS_LIMIT: usize = 8;

/// The longest name of a socket.
const LISTENER_NAME_LIMIT: usize = 64;

/// Why the command line is not understood.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// There is no such flag.
    #[error("there is no flag {0:?}")]
    Unknown(OsString),
    /// A flag came without its value.
    #[error("{0} needs a value")]
    Value(&'static str),
    /// A number is none, or out of its bounds.
    #[error("{flag} needs a number from {least} to {most}, not {found:?}")]
    Number {
        /// The flag.
        flag: &'static str,
        /// The least that it takes.
        least: usize,
        /// The most that it takes.
        most: usize,
        /// What it was given.
        found: OsString,
    },
    /// A socket is not given as it has to be.
    #[error(
        "--listen needs NAME=PATH with an absolute path and a name of at most {LISTENER_NAME_LIMIT} printable ASCII \
        characters without a colon, each name once and at most {LISTENERS_LIMIT} of them, not {0:?}"
    )]
    Listen(OsString),
    /// A directory is not given as it has to be.
    #[error(
        "--runtime-directory needs an absolute path of at most {DIRECTORY_LIMIT} bytes of text without control \
        characters, not {0:?}"
    )]
    Directory(OsString),
    /// There is no program.
    #[error("the program to run is missing; it follows --")]
    Program,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Show the help.
    Help,
    /// Show the version.
    Version,
    /// Say by the exit code whether a handover of this format can be read, and this command line; asked by the keeper that is
    /// to be replaced.
    Accepts(OsString, Options),
    /// Run a program.
    Run(Options),
}

/// How a program is to be run.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// The most descriptors that are kept.
    pub max_descriptors: usize,
    /// Sockets, by name.
    pub listen: Vec<(String, PathBuf)>,
    /// How long the program may take to end.
    pub stop_timeout: Duration,
    /// Where the socket for messages is.
    pub runtime_directory: PathBuf,
    /// The program and its arguments.
    pub program: Vec<OsString>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_descriptors: 4096,
            listen: Vec::new(),
            stop_timeout: Duration::from_secs(30),
            runtime_directory: RUNTIME_DIRECTORY.into(),
            program: Vec::new(),
        }
    }
}

impl Command {
    /// Reads arguments, without the program's own name.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, OptionsError> {
        let mut arguments = arguments.into_iter();
        let mut options = Options::default();
        while let Some(argument) = arguments.next() {
            match argument.as_bytes() {
                b"-h" | b"--help" => return Ok(Self::Help),
                b"-V" | b"--version" => return Ok(Self::Version),
                b"--accepts-handover" => {
                    return accepts(arguments);
                }
                b"--" => {
                    options.program = arguments.collect();
                    break;
                }
                b"--max-descriptors" => {
                    options.max_descriptors = number("--max-descriptors", (1, DESCRIPTORS_LIMIT), arguments.next())?;
                }
                b"--stop-timeout" => {
                    let seconds = number("--stop-timeout", (1, 3600), arguments.next())?;
                    options.stop_timeout = Duration::from_secs(seconds as u64);
                }
                b"--runtime-directory" => {
                    let value = arguments.next().ok_or(OptionsError::Value("--runtime-directory"))?;
                    options.runtime_directory = directory(value)?;
                }
                b"--listen" => options.add_listener(arguments.next().ok_or(OptionsError::Value("--listen"))?)?,
                _ => return Err(OptionsError::Unknown(argument)),
            }
        }
        if options.program.is_empty() {
            return Err(OptionsError::Program);
        }
        Ok(Self::Run(options))
    }
}

/// What follows `--accepts-handover`: a format, dashes, and the command line to go on with.
fn accepts(mut arguments: impl Iterator<Item = OsString>) -> Result<Command, OptionsError> {
    let format = arguments.next().ok_or(OptionsError::Value("--accepts-handover"))?;
    match arguments.next() {
        Some(dashes) if dashes == "--" => {}
        Some(other) => return Err(OptionsError::Unknown(other)),
        None => return Err(OptionsError::Program),
    }
    // Collected, or its type would contain itself.
    match Command::parse(arguments.collect::<Vec<_>>())? {
        Command::Run(options) => Ok(Command::Accepts(format, options)),
        _ => Err(OptionsError::Program),
    }
}

impl Options {
    fn add_listener(&mut self, value: OsString) -> Result<(), OptionsError> {
        let bytes = value.as_bytes();
        let split = bytes
            .iter()
            .position(|byte| *byte == b'=')
            .and_then(|at| bytes.split_at_checked(at));
        let read = split.and_then(|(name, path)| {
            let path = path.strip_prefix(b"=").filter(|path| path.starts_with(b"/"))?;
            let name = str::from_utf8(name).ok().filter(|name| is_name(name.as_bytes()))?;
            let free = name.len() <= LISTENER_NAME_LIMIT && self.listen.iter().all(|(taken, _)| taken != name);
            (free && self.listen.len() < LISTENERS_LIMIT)
                .then(|| (name.to_owned(), PathBuf::from(OsString::from_vec(path.to_vec()))))
        });
        self.listen.push(read.ok_or(OptionsError::Listen(value))?);
        Ok(())
    }
}

fn directory(value: OsString) -> Result<PathBuf, OptionsError> {
    let text = value
        .to_str()
        .filter(|text| text.starts_with('/') && text.len() <= DIRECTORY_LIMIT && !text.contains(char::is_control));
    let path = text.map(PathBuf::from);
    path.ok_or(OptionsError::Directory(value))
}

fn number(flag: &'static str, (least, most): (usize, usize), value: Option<OsString>) -> Result<usize, OptionsError> {
    let found = value.ok_or(OptionsError::Value(flag))?;
    let number = found.to_str().and_then(|text| text.parse().ok());
    number
        .filter(|number| (least..=most).contains(number))
        .ok_or(OptionsError::Number {
            flag,
            least,
            most,
            found,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, OptionsError> {
        Command::parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn everything_after_the_dashes_is_the_programs() {
        let line = "--max-descriptors 9 --listen a=/run/a --listen b=/run/b=c --stop-timeout 2 --runtime-directory /run/k -- p --help -- x";
        let expected = Options {
            max_descriptors: 9,
            listen: vec![("a".to_owned(), "/run/a".into()), ("b".to_owned(), "/run/b=c".into())],
            stop_timeout: Duration::from_secs(2),
            runtime_directory: "/run/k".into(),
            program: ["p", "--help", "--", "x"].map(OsString::from).into(),
        };
        assert_eq!(parse(line).unwrap(), Command::Run(expected));
        assert_eq!(parse("--help").unwrap(), Command::Help);
        let Command::Accepts(format, options) = parse("--accepts-handover 7 -- --stop-timeout 2 -- p --none").unwrap()
        else {
            panic!("that is a question");
        };
        assert_eq!((format, options.program.len()), ("7".into(), 2));
        assert_eq!(parse("--max-descriptors 1 -V").unwrap(), Command::Version);
    }

    #[test]
    fn mistakes_are_named() {
        for (line, word) in [
            ("--none -- p", "--none"),
            ("p", "\"p\""),
            ("--max-descriptors 1", "--"),
            ("--max-descriptors", "--max-descriptors"),
            ("--max-descriptors 0 -- p", "65536"),
            ("--max-descriptors 65537 -- p", "65537"),
            ("--stop-timeout x -- p", "3600"),
            ("--listen a -- p", "NAME=PATH"),
            ("--listen a=b -- p", "a=b"),
            ("--listen a:b=/c -- p", "a:b=/c"),
            ("--listen a=/b --listen a=/c -- p", "a=/c"),
            ("--", "missing"),
            ("--runtime-directory run -- p", "\"run\""),
            ("--runtime-directory", "--runtime-directory"),
            ("--accepts-handover", "--accepts-handover"),
            ("--accepts-handover 2", "missing"),
            ("--accepts-handover 2 --", "missing"),
            ("--accepts-handover 2 -- --help", "missing"),
            ("--accepts-handover 2 -- --none -- p", "--none"),
            ("--accepts-handover 2 --none -- p", "--none"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(word), "{line}: {error}");
        }
        let many = (0..9)
            .map(|number| format!("--listen {number}=/x "))
            .collect::<String>();
        assert!(parse(&format!("{many}-- p")).is_err());
    }
}
