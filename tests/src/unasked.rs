//! A layer's `data` looked at from outside, as it is.
//!
//! While a layer is mounted natively, whoever reads its `data` is asked for by the kernel, and would be given what is not
//! there. Only a file that was opened before the mark was set is read without a question: the daemon's own, and its
//! keeper's. So one of those is borrowed.

use std::fs::{self, File};
use std::os::fd::RawFd;
use std::path::Path;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Opens a file, or takes what another process has open of it.
pub fn open(path: &Path) -> Result<File> {
    if let Some(file) = borrowed(path) {
        return Ok(file);
    }
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn borrowed(path: &Path) -> Option<File> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(Pid::from_raw).find_map(|pid| of_process(pid, path))
}

fn of_process(pid: Pid, path: &Path) -> Option<File> {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).ok()?;
    let open = descriptors.flatten().filter(|entry| {
        let target = fs::read_link(entry.path());
        target.is_ok_and(|target| target == path)
    });
    let numbers = open.filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok());
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // It may have been closed meanwhile.
    let mut taken = numbers.filter_map(|number| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).ok());
    taken.next().map(File::from)
}
