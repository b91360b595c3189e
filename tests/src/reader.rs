//! A program that reads files in every way that Linux has and compares every byte with [`crate::content`]: its source,
//! `programs/reader.c`, tells how it is spoken to.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags};

use crate::content::ContentFile;

const SOURCE: &str = include_str!("../programs/reader.c");

/// All ways to read.
pub const METHODS: [&str; 18] = [
    "read",
    "pread",
    "readv",
    "nowait",
    "direct",
    "readahead",
    "fadvise",
    "sendfile",
    "sendfile_socket",
    "splice",
    "copy_file_range",
    "mmap_shared",
    "mmap_private",
    "mmap_exec",
    "mmap_write",
    "populate",
    "willneed",
    "io_uring",
];

/// In which order a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// From its beginning to its end, in odd pieces.
    Whole,
    /// Ranges over the ends of chunks and of the file, unaligned, and at last all of it.
    Scattered,
}

/// The compiled program.
#[derive(Debug, Clone)]
pub struct Reader {
    program: PathBuf,
}

impl Reader {
    /// Compiles it, static, into `directory`.
    pub fn compile(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let (source, program) = (directory.join("reader.c"), directory.join("reader"));
        fs::write(&source, SOURCE).with_context(|| format!("cannot write {}", source.display()))?;
        let mut command = Command::new("cc");
        command
            .args(["-static", "-O2", "-pthread", "-o"])
            .arg(&program)
            .arg(&source);
        crate::process::output(&mut command)?;
        Ok(Self { program })
    }

    /// A process that checks files one after the other. Copies go to `copies`.
    pub fn check(&self, chunk: usize, copies: &Path) -> Result<Checking> {
        let mut command = Command::new(&self.program);
        command.arg("check").arg(chunk.to_string()).arg(copies);
        Checking::start(command)
    }

    /// Has every file read by two of `threads` threads at about the same time; the faults that they find, and how often a
    /// file was read. `list` is made for it.
    pub fn crowd(&self, threads: usize, list: &Path, root: &Path, files: &[ContentFile]) -> Result<(Vec<String>, u64)> {
        let lines = files
            .iter()
            .zip(METHODS.iter().filter(|name| goes_everywhere(name)).cycle());
        write_list(list, lines.map(|(file, method)| line(method, Order::Whole, root, file)))?;
        let mut command = Command::new(&self.program);
        command.arg("crowd").arg(threads.to_string()).arg(list);
        let said = crate::process::output(&mut command)?;
        done(&String::from_utf8_lossy(&said))
    }

    /// A process whose threads read random ranges of files until it is ended; a read that takes longer than `limit` is a
    /// fault.
    pub fn hammer(
        &self,
        (threads, seed): (usize, u64),
        limit: Duration,
        list: &Path,
        root: &Path,
        files: &[ContentFile],
    ) -> Result<Hammer> {
        write_list(list, files.iter().map(|file| line("pread", Order::Whole, root, file)))?;
        let mut command = Command::new(&self.program);
        command.args(["hammer", &threads.to_string(), &seed.to_string()]);
        command.arg(limit.as_secs().to_string()).arg(list);
        // Not a pipe: nobody reads before the end.
        let said = list.with_extension("said");
        let output = fs::File::create(&said).with_context(|| format!("cannot create {}", said.display()))?;
        let mut child = start(command, output)?;
        let input = child.stdin.take();
        Ok(Hammer { child, input, said })
    }
}

/// Whether a method needs no place to write to, and is refused by no way of mounting: every file is to be read.
fn goes_everywhere(method: &str) -> bool {
    !["copy_file_range", "direct"].contains(&method)
}

/// What is asked for a file.
fn line(method: &str, order: Order, root: &Path, file: &ContentFile) -> String {
    let order = match order {
        Order::Whole => "whole",
        Order::Scattered => "scattered",
    };
    let path = root.join(&file.path);
    format!("{method} {order} {} {} {}", file.seed, file.size, path.display())
}

fn write_list(path: &Path, lines: impl Iterator<Item = String>) -> Result<()> {
    let text = lines.fold(String::new(), |mut text, line| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{line}");
        text
    });
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The faults of an answer, and the number at its end.
fn done(said: &str) -> Result<(Vec<String>, u64)> {
    let mut faults: Vec<String> = said.lines().map(str::to_owned).collect();
    let last = faults.pop().unwrap_or_default();
    let reads = last.strip_prefix("done ").and_then(|number| number.parse().ok());
    match reads {
        Some(reads) => Ok((faults, reads)),
        None => bail!("the reader did not come to its end; it said:\n{said}"),
    }
}

fn start(mut command: Command, output: impl Into<Stdio>) -> Result<Child> {
    command.stdin(Stdio::piped()).stdout(output).process_group(0);
    command.spawn().context("cannot start the reader")
}

/// A process that checks one file at a time. Dropping it kills it.
#[derive(Debug)]
pub struct Checking {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Checking {
    fn start(command: Command) -> Result<Self> {
        let mut child = start(command, Stdio::piped())?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        Ok(Self { child, input, output })
    }

    /// Reads a file below `root`; `ok`, or what is wrong with it. The same question again is read through the same open
    /// file. A reader that hangs longer than `limit` is killed, which is an error.
    pub fn ask(
        &mut self,
        (method, order): (&str, Order),
        root: &Path,
        file: &ContentFile,
        limit: Duration,
    ) -> Result<String> {
        let question = line(method, order, root, file);
        writeln!(self.input, "{question}").context("the reader is gone")?;
        self.input.flush()?;
        let end = rustix::event::Timespec::try_from(limit)?;
        let answered = {
            use rustix::event::{PollFd, PollFlags, poll};
            poll(&mut [PollFd::new(self.output.get_ref(), PollFlags::IN)], Some(&end))?
        };
        if answered == 0 {
            let stacks = stacks(self.child.id());
            // Whoever waits in the kernel for an answer of the daemon can be killed.
            let _ = self.child.kill();
            bail!("a reader hangs: {question}: no answer within {limit:?}:\n{stacks}");
        }
        let mut answer = String::new();
        self.output.read_line(&mut answer)?;
        ensure!(answer.ends_with('\n'), "the reader ended at {question}");
        Ok(answer.trim_end().to_owned())
    }
}

impl Drop for Checking {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Threads at work. Dropping it kills them.
#[derive(Debug)]
pub struct Hammer {
    child: Child,
    input: Option<ChildStdin>,
    said: PathBuf,
}

impl Hammer {
    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it; the faults that it found, and the number of its reads. `limit` is for the reads that are under way.
    pub fn finish(mut self, limit: Duration) -> Result<(Vec<String>, u64)> {
        drop(self.input.take());
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("no pid")?;
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        ensure!(
            crate::process::has_ended(&process, limit)?,
            "a reader hangs: it does not end within {limit:?}:\n{}",
            stacks(self.child.id())
        );
        done(&fs::read_to_string(&self.said)?)
    }
}

impl Drop for Hammer {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Where the threads of a process are in the kernel.
fn stacks(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let stack = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("stack")).unwrap_or_default();
        let calls = text.lines().filter_map(|line| line.split_whitespace().nth(1));
        let calls: Vec<_> = calls.map(|call| call.split('+').next().unwrap_or(call)).collect();
        format!("  {}: {}\n", task.file_name().display(), calls.join(" < "))
    };
    tasks.map(stack).collect()
}

fn end(child: &mut Child) {
    // It may have ended, and then there is nothing to do.
    let _ = child.kill();
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(directory: &Path) -> Vec<ContentFile> {
        let sizes = [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 300_001];
        let files: Vec<_> = sizes
            .into_iter()
            .map(|size| ContentFile::new(format!("file-{size}"), size))
            .collect();
        for file in &files {
            fs::write(directory.join(&file.path), file.content()).unwrap();
        }
        files
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[test]
    fn every_method_reads_what_the_file_has_and_sees_what_it_has_not() {
        let directory = tempfile::tempdir().unwrap();
        let files = sample(directory.path());
        let reader = Reader::compile(directory.path()).unwrap();
        let mut checking = reader.check(65536, directory.path()).unwrap();
        let mut ask = |method: &str, file: &ContentFile| {
            [Order::Whole, Order::Scattered]
                .map(|order| checking.ask((method, order), directory.path(), file, LIMIT).unwrap())
        };
        for (file, method) in files.iter().flat_map(|file| METHODS.map(|method| (file, method))) {
            assert_eq!(ask(method, file), ["ok", "ok"], "{method} of {}", file.path);
        }
        // Zeros at the end of a chunk, other bytes in a file's last page, a file that is too short.
        let large = files.last().unwrap();
        let path = directory.path().join(&large.path);
        let mut content = large.content();
        content[65530..65540].fill(0);
        fs::write(&path, &content).unwrap();
        for method in METHODS {
            let found = ask(method, large);
            assert!(
                found
                    .iter()
                    .all(|found| found.starts_with("wrong 655") && found.ends_with("zeros")),
                "{method}: {found:?}"
            );
        }
        let mut content = large.content();
        content[300_000] ^= 1;
        fs::write(&path, &content).unwrap();
        for method in METHODS {
            assert_eq!(
                ask(method, large),
                ["wrong 300000 bytes", "wrong 300000 bytes"],
                "{method}"
            );
        }
        fs::write(&path, &content[..150_000]).unwrap();
        for method in METHODS {
            let found = ask(method, large);
            assert!(found.iter().all(|found| found != "ok"), "{method}: {found:?}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(ask("pread", large), ["errno 2 at open", "errno 2 at open"]);
    }

    #[test]
    fn crowds_and_hammers_tell_of_wrong_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let files = sample(directory.path());
        let reader = Reader::compile(directory.path()).unwrap();
        let list = directory.path().join("list");
        let crowd = || reader.crowd(8, &list, directory.path(), &files).unwrap();
        let hammer = || {
            let hammer = reader.hammer((2, 7), LIMIT, &list, directory.path(), &files).unwrap();
            std::thread::sleep(Duration::from_millis(500));
            hammer.finish(LIMIT).unwrap()
        };
        assert_eq!(crowd(), (vec![], 2 * files.len() as u64));
        let (faults, reads) = hammer();
        assert!(faults.is_empty() && reads > 10, "{reads}: {faults:?}");
        fs::write(directory.path().join("file-300001"), vec![0; 300_001]).unwrap();
        let found = |faults: Vec<String>| {
            faults
                .iter()
                .any(|fault| fault.contains("file-300001: wrong") && fault.ends_with("zeros"))
        };
        assert!(found(crowd().0) && found(hammer().0));
    }
}
