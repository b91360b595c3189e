//! What a pod's cgroup has used, read as containerd reads it.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Where cgroups are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Type of a unified hierarchy's file system, as statfs reports it.
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// Most that is read of one of a cgroup's files.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Limits above this are the kernel's way to say that there is none.
const UNLIMITED: u64 = 1 << 62;

/// Why a cgroup cannot be read. The words are containerd's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CgroupError {
    /// The pod has none.
    #[error("failed to get cgroup metrics for sandbox {0} because cgroupPath is empty")]
    NoPath(String),
    /// It does not exist.
    #[error("failed to load sandbox cgroup {0}: cgroup deleted")]
    Deleted(String),
    /// One of its files is not as it should be.
    #[error("failed to get stats for cgroup {0}: {1}")]
    Unreadable(String, String),
}

/// A share of time in which tasks waited.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Waiting {
    pub(crate) total_nanoseconds: u64,
    pub(crate) averages: [f64; 3],
}

/// Pressure: all tasks waited, or some.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Pressure {
    pub(crate) full: Option<Waiting>,
    pub(crate) some: Option<Waiting>,
}

/// Memory, in bytes, and faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) working_set: u64,
    pub(crate) available: u64,
    pub(crate) usage: u64,
    pub(crate) rss: u64,
    pub(crate) page_faults: u64,
    pub(crate) major_page_faults: u64,
}

impl Memory {
    fn of(usage: u64, limit: u64, inactive_file: u64, rss: u64, faults: [u64; 2]) -> Self {
        let working_set = usage.saturating_sub(inactive_file);
        Self {
            working_set,
            available: if limit > UNLIMITED {
                0
            } else {
                // Unsigned in containerd, too: a pod above its limit wraps there as here.
                limit.wrapping_sub(working_set)
            },
            usage,
            rss,
            page_faults: faults[0],
            major_page_faults: faults[1],
        }
    }
}

/// One reading.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reading {
    /// When, in nanoseconds since the epoch.
    pub(crate) at: i64,
    /// CPU time, in nanoseconds.
    pub(crate) cpu: u64,
    /// Memory, if its controller is there.
    pub(crate) memory: Option<Memory>,
    /// Pressure on CPU, memory and I/O; only a unified hierarchy has it.
    pub(crate) pressure: [Option<Pressure>; 3],
}

/// Reads the cgroup `parent` of the sandbox `id`. Blocks.
pub(crate) fn read(id: &str, parent: &str) -> Result<Reading, CgroupError> {
    if parent.is_empty() {
        return Err(CgroupError::NoPath(id.to_owned()));
    }
    let unified = rustix::fs::statfs(ROOT).is_ok_and(|of| u64::try_from(of.f_type) == Ok(CGROUP2_MAGIC));
    read_below(Path::new(ROOT), unified, parent)
}

/// The path below a hierarchy's root, as a join that never leaves it.
fn below(root: &Path, parent: &str) -> PathBuf {
    let mut path = root.to_owned();
    let mut depth = 0_usize;
    for component in Path::new(parent).components() {
        match component {
            Component::Normal(name) => {
                path.push(name);
                depth += 1;
            }
            Component::ParentDir if depth > 0 => {
                path.pop();
                depth -= 1;
            }
            Component::ParentDir | Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    path
}

fn read_below(root: &Path, unified: bool, parent: &str) -> Result<Reading, CgroupError> {
    if unified {
        read_unified(&below(root, parent), parent)
    } else {
        read_classic(root, parent)
    }
}

fn read_classic(root: &Path, parent: &str) -> Result<Reading, CgroupError> {
    let (cpu, memory) = (
        below(&root.join("cpuacct"), parent),
        below(&root.join("memory"), parent),
    );
    if !cpu.exists() && !memory.exists() {
        return Err(CgroupError::Deleted(parent.to_owned()));
    }
    let file = File { parent };
    let used = if cpu.exists() {
        file.number(&cpu.join("cpuacct.usage"))?
    } else {
        0
    };
    let memory = if memory.exists() {
        let of = file.pairs(&memory.join("memory.stat"))?;
        let of = |key: &str| of.get(key).copied().unwrap_or_default();
        Some(Memory::of(
            file.number(&memory.join("memory.usage_in_bytes"))?,
            file.number(&memory.join("memory.limit_in_bytes"))?,
            of("total_inactive_file"),
            of("total_rss"),
            [of("total_pgfault"), of("total_pgmajfault")],
        ))
    } else {
        None
    };
    Ok(Reading {
        at: now(),
        cpu: used,
        memory,
        pressure: [None; 3],
    })
}

fn read_unified(path: &Path, parent: &str) -> Result<Reading, CgroupError> {
    if !path.exists() {
        return Err(CgroupError::Deleted(parent.to_owned()));
    }
    let file = File { parent };
    let mut of = HashMap::new();
    for name in ["cpu.stat", "memory.stat"] {
        if path.join(name).exists() {
            of.extend(file.pairs(&path.join(name))?);
        }
    }
    let of = |key: &str| of.get(key).copied().unwrap_or_default();
    // A file that is missing counts as 0 there.
    let number = |name: &str| file.number(&path.join(name)).unwrap_or_default();
    let pressure = |name: &str| file.text(&path.join(name)).ok().and_then(|text| pressure(&text));
    Ok(Reading {
        at: now(),
        cpu: of("usage_usec").wrapping_mul(1000),
        memory: Some(Memory::of(
            number("memory.current"),
            number("memory.max"),
            of("inactive_file"),
            of("anon"),
            [of("pgfault"), of("pgmajfault")],
        )),
        pressure: [
            pressure("cpu.pressure"),
            pressure("memory.pressure"),
            pressure("io.pressure"),
        ],
    })
}

/// Nanoseconds since the epoch.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Reads files of the cgroup `parent`.
struct File<'a> {
    parent: &'a str,
}

impl File<'_> {
    fn wrong(&self, path: &Path, what: &str) -> CgroupError {
        CgroupError::Unreadable(self.parent.to_owned(), format!("{}: {what}", path.display()))
    }

    fn text(&self, path: &Path) -> Result<String, CgroupError> {
        let mut text = String::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text));
        match read {
            Ok(_) => Ok(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(CgroupError::Deleted(self.parent.to_owned()))
            }
            Err(error) => Err(self.wrong(path, &error.to_string())),
        }
    }

    fn number(&self, path: &Path) -> Result<u64, CgroupError> {
        match self.text(path)?.trim() {
            "max" => Ok(u64::MAX),
            number => number.parse().map_err(|_| self.wrong(path, "not a number")),
        }
    }

    fn pairs(&self, path: &Path) -> Result<HashMap<String, u64>, CgroupError> {
        let text = self.text(path)?;
        let pair = |line: &str| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        };
        text.lines()
            .map(|line| pair(line).ok_or_else(|| self.wrong(path, "not a list of numbers")))
            .collect()
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
fn pressure(text: &str) -> Option<Pressure> {
    let mut found = Pressure::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let kind = words.next()?;
        let mut waiting = Waiting::default();
        for word in words {
            let (key, value) = word.split_once('=')?;
            match key {
                "avg10" => waiting.averages[0] = value.parse().ok()?,
                "avg60" => waiting.averages[1] = value.parse().ok()?,
                "avg300" => waiting.averages[2] = value.parse().ok()?,
                // Microseconds in the kernel, nanoseconds in CRI.
                "total" => waiting.total_nanoseconds = value.parse::<u64>().ok()?.wrapping_mul(1000),
                _ => {}
            }
        }
        match kind {
            "full" => found.full = Some(waiting),
            "some" => found.some = Some(waiting),
            _ => {}
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[(&str, &str)]) {
        for (name, content) in files {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
    }

    #[test]
    fn a_classic_hierarchy() {
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            &[
                ("cpuacct/pods/a/cpuacct.usage", "123456\n"),
                ("memory/pods/a/memory.usage_in_bytes", "1000\n"),
                ("memory/pods/a/memory.limit_in_bytes", "9223372036854771712\n"),
                (
                    "memory/pods/a/memory.stat",
                    "cache 5\nrss 1\ntotal_rss 300\ntotal_inactive_file 400\ntotal_pgfault 7\ntotal_pgmajfault 2\n",
                ),
            ],
        );
        let reading = read_below(root.path(), false, "/pods/a").unwrap();
        assert_eq!(reading.cpu, 123_456);
        let memory = Memory {
            working_set: 600,
            available: 0,
            usage: 1000,
            rss: 300,
            page_faults: 7,
            major_page_faults: 2,
        };
        assert_eq!(reading.memory, Some(memory));
        write(root.path(), &[("memory/pods/a/memory.limit_in_bytes", "5000")]);
        let limited = read_below(root.path(), false, "/pods/../../pods/a/").unwrap();
        assert_eq!(limited.memory.unwrap().available, 4400);
        let gone = read_below(root.path(), false, "/pods/b");
        assert_eq!(gone, Err(CgroupError::Deleted("/pods/b".into())));
        write(root.path(), &[("memory/pods/a/memory.stat", "total_rss many")]);
        assert!(matches!(
            read_below(root.path(), false, "/pods/a"),
            Err(CgroupError::Unreadable(..))
        ));
    }

    #[test]
    fn a_unified_hierarchy() {
        let root = tempfile::tempdir().unwrap();
        write(
            root.path(),
            &[
                ("pods/a/cpu.stat", "usage_usec 12\nuser_usec 5\n"),
                (
                    "pods/a/memory.stat",
                    "anon 300\ninactive_file 2000\npgfault 7\npgmajfault 2\n",
                ),
                ("pods/a/memory.current", "1000\n"),
                ("pods/a/memory.max", "max\n"),
                (
                    "pods/a/cpu.pressure",
                    "some avg10=1.50 avg60=0.25 avg300=0.00 total=9\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
                ),
            ],
        );
        let reading = read_below(root.path(), true, "pods/a").unwrap();
        assert_eq!(reading.cpu, 12_000);
        let memory = reading.memory.unwrap();
        assert_eq!((memory.working_set, memory.available, memory.rss), (0, 0, 300));
        let some = reading.pressure[0].unwrap().some.unwrap();
        assert_eq!((some.total_nanoseconds, some.averages), (9000, [1.5, 0.25, 0.0]));
        assert_eq!(reading.pressure[2], None);
        assert!(matches!(
            read_below(root.path(), true, "pods/b"),
            Err(CgroupError::Deleted(_))
        ));
    }

    #[test]
    fn a_pod_without_a_cgroup() {
        let error = read("abc", "").unwrap_err();
        assert_eq!(
            error.to_string(),
            "failed to get cgroup metrics for sandbox abc because cgroupPath is empty"
        );
    }
}
