//! Counts of everything that a pod takes and has to give back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::process::RUN_DIR_VARIABLE;
use crate::run::RunDir;
use crate::sweep;

/// Where libcni keeps what it answered.
const CNI_RESULTS: &str = "/var/lib/cni/results";

/// Counts by what is counted.
pub type Census = BTreeMap<&'static str, u64>;

/// Counts all that the run holds now.
pub fn take(run: &RunDir) -> Result<Census> {
    let cgroups = [&run.names().cgroup, &run.names().hull_cgroup];
    let mounts = sweep::mounts_below(run.path())?;
    let count = |condition: &dyn Fn(&Path) -> bool| as_count(mounts.iter().filter(|path| condition(path)).count());
    let is_netns = |path: &Path| path.components().any(|part| part.as_os_str() == "netns");
    let bridge = &run.names().bridge;
    let shims = processes(run.path(), "containerd-shim");
    Ok(Census::from([
        ("addresses", as_count(addresses(run)?.len())),
        ("network namespaces", count(&is_netns)),
        ("other mounts", count(&|path| !is_netns(path))),
        (
            "bridge ports",
            as_count(children(&Path::new("/sys/class/net").join(bridge).join("brif")).len()),
        ),
        ("CNI results", as_count(results_of(bridge))),
        (
            "cgroups",
            as_count(cgroups.iter().map(|name| cgroup_directories(name)).sum()),
        ),
        ("shims", as_count(shims)),
    ]))
}

/// Addresses that host-local has given away.
pub fn addresses(run: &RunDir) -> Result<Vec<String>> {
    let directory = run.directory("cni/ipam")?.join(&run.names().bridge);
    let names = children(&directory)
        .into_iter()
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_string()));
    Ok(names.filter(|name| name.starts_with("10.")).collect())
}

/// Open descriptors, threads and resident bytes of a process.
pub fn process(pid: u32) -> Result<Census> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let status = fs::read_to_string(directory.join("status")).with_context(|| format!("no process {pid}"))?;
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Ok(Census::from([
        ("descriptors", as_count(children(&directory.join("fd")).len())),
        ("threads", number("Threads:").unwrap_or(0)),
        ("resident KiB", number("VmRSS:").unwrap_or(0)),
    ]))
}

fn as_count(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn results_of(bridge: &str) -> usize {
    let names = children(Path::new(CNI_RESULTS)).into_iter();
    names
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(bridge))
        })
        .count()
}

/// Directories of a top-level cgroup in every hierarchy.
fn cgroup_directories(name: &str) -> usize {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = children(root).into_iter().filter(|path| !path.is_symlink());
    let tops = hierarchies
        .chain([root.to_path_buf()])
        .map(|hierarchy| hierarchy.join(name));
    tops.map(|top| directories(&top)).sum()
}

fn directories(path: &Path) -> usize {
    if !path.is_dir() {
        return 0;
    }
    1 + children(path).iter().map(|child| directories(child)).sum::<usize>()
}

/// Live processes of the run whose program's name begins with `name`.
fn processes(run: &Path, name: &str) -> usize {
    pids(run, name).len()
}

/// The ids of the live processes of the run whose program's name begins with `name`.
#[must_use]
pub fn pids(run: &Path, name: &str) -> Vec<u32> {
    let mark = format!("{RUN_DIR_VARIABLE}={}", run.display()).into_bytes();
    let of_run = |directory: &PathBuf| {
        let environment = fs::read(directory.join("environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == mark)
    };
    let named =
        |directory: &PathBuf| fs::read_to_string(directory.join("comm")).is_ok_and(|comm| comm.starts_with(name));
    let found = children(Path::new("/proc"))
        .into_iter()
        .filter(|path| named(path) && of_run(path));
    found
        .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
        .collect()
}

/// The ids of the processes in hulls: pause processes, which know nothing of the run.
#[must_use]
pub fn hull_processes(run: &RunDir) -> Vec<u32> {
    let tops = children(Path::new("/sys/fs/cgroup"));
    let hulls = tops.iter().map(|hierarchy| hierarchy.join(&run.names().hull_cgroup));
    let groups = hulls.flat_map(|top| children(&top));
    let lists = groups.filter_map(|group| fs::read_to_string(group.join("cgroup.procs")).ok());
    lists
        .flat_map(|list| list.lines().filter_map(|line| line.parse().ok()).collect::<Vec<_>>())
        .collect()
}
