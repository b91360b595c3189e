//! From the number of a process to the pod and the container it belongs to, by what `/proc` tells.
//!
//! Whoever waits in a page fault may hold the lock of its memory map. None of the files that are read here waits for that lock, as `cmdline`
//! and `environ` do.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::{ContainerId, PodUid, Reader};

/// Processes whose control groups are remembered.
const MAX_PROCESSES: usize = 256;
/// Of longer files only the beginning is read: a dozen hierarchies with long paths are less.
const MAX_FILE_BYTES: u64 = 16 << 10;
/// Digits of a container's id where CRI makes it.
const ID_DIGITS: usize = 64;
/// Longest name of a command, as the kernel cuts it.
const MAX_COMMAND: usize = 15;
/// Longest UID that is believed; the API server's have 36 characters, those of static pods 32.
const MAX_UID: usize = 64;
/// Shortest UID that is believed.
const MIN_UID: usize = 8;
/// Longest name of a container, by containerd's rules.
const MAX_NAME: usize = 76;
/// Namespaces of containerd whose name alone tells that the next part of a path is a container.
const NAMESPACES: [&str; 3] = ["k8s.io", "default", "moby"];
/// Suffixes of systemd's units, which are no containers.
const UNITS: [&str; 4] = [".slice", ".service", ".scope", ".mount"];

/// What is known of processes; those that were looked at before cost two small reads.
#[derive(Debug)]
pub(super) struct Processes {
    proc: PathBuf,
    known: HashMap<i32, Known>,
}

/// A process, or one of its threads: FUSE tells the latter.
#[derive(Debug, Clone)]
struct Known {
    /// When it was started, in the kernel's ticks: another one under the same number started at another time.
    started: u64,
    /// The process of the thread.
    process: i32,
    pod: Option<PodUid>,
    container: Option<ContainerId>,
}

impl Processes {
    pub(super) fn within(proc: PathBuf) -> Self {
        Self {
            proc,
            known: HashMap::new(),
        }
    }

    /// Who the process is; nobody where it has ended, or is not of this machine.
    pub(super) fn reader(&mut self, pid: i32) -> Reader {
        let Some(found) = self.find(pid) else {
            return Reader::default();
        };
        // A process gets another name when it executes a program, and stays the same process.
        let command = read(&self.proc.join(found.process.to_string()).join("comm"));
        Reader {
            pod: found.pod,
            container: found.container,
            command: command.map(|text| command_of(&text)).unwrap_or_default(),
        }
    }

    fn find(&mut self, pid: i32) -> Option<Known> {
        if pid <= 0 {
            return None;
        }
        let directory = self.proc.join(pid.to_string());
        let started = start_of(&read(&directory.join("stat"))?)?;
        if let Some(known) = self.known.get(&pid).filter(|known| known.started == started) {
            return Some(known.clone());
        }
        let (pod, container) = owner(&read(&directory.join("cgroup")).unwrap_or_default());
        let found = Known {
            started,
            process: read(&directory.join("status"))
                .and_then(|text| process_of(&text))
                .unwrap_or(pid),
            pod,
            container,
        };
        if self.known.len() >= MAX_PROCESSES {
            // Numbers of processes that have ended fill it up; those that live are found again.
            self.known.clear();
        }
        self.known.insert(pid, found.clone());
        Some(found)
    }
}

/// The beginning of a file.
fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// When a process was started, by its `stat`: the 22nd field. The second is its name in parentheses, which may hold any.
pub(super) fn start_of(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The process that a thread belongs to, by its `status`.
fn process_of(status: &str) -> Option<i32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok().filter(|process| *process > 0)
}

/// A command's name, as a process may have chosen it: nothing in it that a terminal would obey.
fn command_of(text: &str) -> String {
    let text = text.strip_suffix('\n').unwrap_or(text);
    let shown = text.chars().map(|c| if c.is_control() { '?' } else { c });
    shown.take(MAX_COMMAND).collect()
}

/// The pod and the container of a process, by its `cgroup`: one line per hierarchy, `number:controllers:path`. The first line that
/// tells a container is believed, else the first that tells a pod; of nested ones the outermost.
pub(super) fn owner(cgroup: &str) -> (Option<PodUid>, Option<ContainerId>) {
    let paths = cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut pod = None;
    for (found, container) in paths.map(owner_in) {
        if container.is_some() {
            return (found, container);
        }
        pod = pod.or(found);
    }
    (pod, None)
}

fn owner_in(path: &str) -> (Option<PodUid>, Option<ContainerId>) {
    // Where the kubelet's driver is systemd's and the runtime's is not, systemd's "slice:prefix:id" is one directory.
    let parts: Vec<&str> = path.split(['/', ':']).filter(|part| !part.is_empty()).collect();
    let pods = parts.iter().position(|part| part.contains("kubepods"));
    let pod = pods.and_then(|pods| parts[pods..].iter().find_map(|part| pod_of(part)));
    let container = parts.iter().find_map(|part| container_of(part));
    let container = container.or_else(|| match parts.as_slice() {
        [namespace, name, ..] if NAMESPACES.contains(namespace) && is_name(name) => Some(*name),
        _ => None,
    });
    (pod, container.map(|id| ContainerId(id.to_owned())))
}

/// The UID in `pod<uid>`, or in systemd's form of it, `kubepods-burstable-pod<uid>.slice`, where a `_` stands for each `-`.
fn pod_of(part: &str) -> Option<PodUid> {
    let uid = match part.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => part.strip_prefix("pod")?.to_owned(),
    };
    let is_uid = (MIN_UID..=MAX_UID).contains(&uid.len()) && uid.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
    is_uid.then_some(PodUid(uid))
}

/// The id in `<id>`, or in systemd's form of it, `cri-containerd-<id>.scope`.
fn container_of(part: &str) -> Option<&str> {
    let id = match part.strip_suffix(".scope") {
        Some(scope) => scope.rsplit_once('-')?.1,
        None => part,
    };
    let is_id = id.len() == ID_DIGITS && id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    is_id.then_some(id)
}

/// Whether containerd would take this as a container's name, and systemd would not as a unit's.
fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c))
        && !UNITS.iter().any(|unit| name.ends_with(unit))
}
