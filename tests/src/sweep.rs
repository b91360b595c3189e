//! Takes away what a run made outside plain files: processes, mounts, network interfaces, cgroups, shim sockets, CNI
//! results. Works from the run directory alone, so it serves a run that ends as well as the leftovers of one that was
//! killed. Every step is repeated until nothing is left, within bounds, and nothing outside the run is touched.

use std::collections::HashSet;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal};

use crate::process::RUN_DIR_VARIABLE;

/// How long processes may take to disappear after SIGKILL, and mounts to come off.
const LIMIT: Duration = Duration::from_secs(20);

const POLL: Duration = Duration::from_millis(20);

/// Mounts may be stacked; more layers than this on one path are a bug.
const MAX_UNMOUNT_ROUNDS: usize = 64;

/// Where libcni keeps what it answered, with no way to move it.
const CNI_RESULTS: &str = "/var/lib/cni/results";

/// Names that a run derives from its directory, so that a later run finds the same ones.
#[derive(Debug, Clone)]
pub struct RunNames {
    /// Short id: the directory's digest.
    pub id: String,
    /// The bridge's name (at most 15 bytes, the kernel's limit).
    pub bridge: String,
    /// The cgroup that all pods of the run are under.
    pub cgroup: String,
    /// The cgroup that all hulls of the run are under; the relay wants letters, digits and underscores.
    pub hull_cgroup: String,
}

impl RunNames {
    /// Names for the run in `directory`.
    #[must_use]
    pub fn new(directory: &Path) -> Self {
        use sha2::Digest as _;
        let digest = sha2::Sha256::digest(directory.as_os_str().as_bytes());
        let id = hex::encode(&digest[..4]);
        Self {
            bridge: format!("hs{id}"),
            cgroup: format!("hullspeed-{id}"),
            hull_cgroup: format!("hullspeed_{id}"),
            id,
        }
    }
}

/// Sweeps everything of the run in `directory`, apart from its plain files.
pub fn sweep(directory: &Path) -> Result<()> {
    let names = RunNames::new(directory);
    kill_all(directory, &names)?;
    remove_shim_sockets(directory);
    unmount_below(directory)?;
    remove_interfaces(&names)?;
    remove_cgroups(&names)?;
    remove_cni_results(directory, &names);
    Ok(())
}

fn kill_all(directory: &Path, names: &RunNames) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let pids = processes(directory, names);
        if pids.is_empty() {
            return Ok(());
        }
        for pid in &pids {
            // ESRCH: it ended meanwhile.
            let _ = rustix::process::kill_process(*pid, Signal::KILL);
        }
        if Instant::now() > end {
            bail!(
                "{} processes of the run in {} do not end",
                pids.len(),
                directory.display()
            );
        }
        thread::sleep(POLL);
    }
}

/// Live processes that carry the run's mark, or are in its cgroup.
fn processes(directory: &Path, names: &RunNames) -> HashSet<Pid> {
    let mut mark = format!("{RUN_DIR_VARIABLE}=").into_bytes();
    mark.extend_from_slice(directory.as_os_str().as_bytes());
    let me = rustix::process::getpid();
    let mut found: HashSet<Pid> = entries(Path::new("/proc"))
        .filter_map(|path| parse_pid(path.file_name()?.to_str()?))
        .filter(|pid| {
            // A zombie's environment is empty, so it does not count; its parent reaps it.
            let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
            environment.split(|&byte| byte == 0).any(|variable| variable == mark)
        })
        .collect();
    for group in cgroups(names) {
        let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        found.extend(members.lines().filter_map(parse_pid));
    }
    found.remove(&me);
    found
}

fn parse_pid(text: &str) -> Option<Pid> {
    text.parse().ok().and_then(Pid::from_raw)
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

/// The run's cgroup directories in every hierarchy, children before parents.
fn cgroups(names: &RunNames) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let mut found = Vec::new();
    for hierarchy in entries(root).chain([root.to_path_buf()]) {
        for name in [&names.cgroup, &names.hull_cgroup] {
            collect_directories(&hierarchy.join(name), &mut found);
        }
    }
    found
}

fn collect_directories(directory: &Path, found: &mut Vec<PathBuf>) {
    // A cgroup v1 mount may be reachable through a symlink of another name (cpu,cpuacct): the same groups again.
    if !directory.is_dir() {
        return;
    }
    for child in entries(directory).filter(|path| path.is_dir()) {
        collect_directories(&child, found);
    }
    found.push(directory.into());
}

fn remove_cgroups(names: &RunNames) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let left: Vec<_> = cgroups(names)
            .into_iter()
            .filter(|group| fs::remove_dir(group).is_err())
            .collect();
        let Some(first) = left.iter().find(|group| group.exists()) else {
            return Ok(());
        };
        if Instant::now() > end {
            bail!("cannot remove the cgroup {}", first.display());
        }
        thread::sleep(POLL);
    }
}

/// Detaches every mount below `directory`, the last one first.
pub fn unmount_below(directory: &Path) -> Result<()> {
    for _ in 0..MAX_UNMOUNT_ROUNDS {
        let mounts = mounts_below(directory)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in mounts.iter().rev() {
            rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH)
                .with_context(|| format!("cannot unmount {}", mount.display()))?;
        }
    }
    bail!("mounts keep appearing below {}", directory.display())
}

/// Mount points below `directory`, in mount order.
pub fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mounts = mounts_of_kind(directory)?;
    Ok(mounts.into_iter().map(|(target, _)| target).collect())
}

/// Mount points below `directory`, in mount order, each with the kind of file system that is mounted there.
pub fn mounts_of_kind(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let text = fs::read("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let lines = text.split(|&byte| byte == b'\n');
    let mounts = lines.filter_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let target = unescape(fields.nth(4)?);
        // Optional fields end with a dash.
        let kind = fields.skip_while(|field| *field != b"-").nth(1).unwrap_or_default();
        Some((target, String::from_utf8_lossy(kind).into_owned()))
    });
    Ok(mounts.filter(|(target, _)| target.starts_with(directory)).collect())
}

/// Undoes the octal escapes of mountinfo (`\040` for a space).
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

fn remove_interfaces(names: &RunNames) -> Result<()> {
    let bridge = Path::new("/sys/class/net").join(&names.bridge);
    let ports = entries(&bridge.join("brif")).filter_map(|path| path.file_name().map(ToOwned::to_owned));
    for port in ports {
        // A veth goes with its namespace, maybe at this very moment.
        let _ = Command::new("ip").args(["link", "delete"]).arg(port).output();
    }
    if bridge.exists() {
        crate::process::output(Command::new("ip").args(["link", "delete", &names.bridge]))?;
    }
    Ok(())
}

/// containerd's shims listen below /run/containerd whatever the configured state directory is; their bundles say where,
/// those of containerd 2 in JSON.
fn remove_shim_sockets(directory: &Path) {
    const SOCKETS: &str = "/run/containerd/s/";
    for state in entries(directory).flat_map(|child| entries(&child.join("state/io.containerd.runtime.v2.task"))) {
        for file in entries(&state).flat_map(|bundle| ["address", "bootstrap.json"].map(|name| bundle.join(name))) {
            let text = fs::read_to_string(file).unwrap_or_default();
            let after = text.split_once(SOCKETS).map_or("", |(_, rest)| rest);
            let name: String = after.chars().take_while(char::is_ascii_hexdigit).collect();
            if !name.is_empty() {
                let _ = fs::remove_file(Path::new(SOCKETS).join(name));
            }
        }
    }
}

/// CNI results that a killed run left. Their names hold our network's name, or, those of the loopback, the sandbox's id,
/// which containerd's own directories in the run tell.
fn remove_cni_results(directory: &Path, names: &RunNames) {
    let sandboxes =
        entries(directory).flat_map(|child| entries(&child.join("root/io.containerd.grpc.v1.cri/sandboxes")));
    let ids: Vec<_> = sandboxes
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_string()))
        .collect();
    for result in entries(Path::new(CNI_RESULTS)) {
        let name = result.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(&names.bridge) || ids.iter().any(|id| name.contains(id)) {
            // Another sweep may be as fast.
            let _ = fs::remove_file(result);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernels_limits_and_depend_on_the_directory() {
        let one = RunNames::new(Path::new("/tmp/one"));
        assert!(one.bridge.len() <= 15);
        assert_eq!(one.bridge, RunNames::new(Path::new("/tmp/one")).bridge);
        assert_ne!(one.bridge, RunNames::new(Path::new("/tmp/two")).bridge);
    }

    #[test]
    fn mountinfo_escapes_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c"), Path::new(r"/a b\c"));
        assert_eq!(unescape(br"/plain\"), Path::new(r"/plain\"));
    }
}
