//! Which files a program reads as it starts, measured by access times.
//!
//! The tree's access times are set to zero, the program runs in it until it answers, and what has a time now was read,
//! in that order. It needs no tracing and works on any file system that keeps access times (`relatime` does for this).

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::layer_tar;
use crate::layout::ImageConfig;
use crate::run::RunDir;

const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What containerd itself reads from an image to find the user of a container.
const READ_BY_RUNTIME: [&str; 2] = ["etc/passwd", "etc/group"];

/// Runs the image's command in `root` until it answers; returns the regular files it read, in order of first access,
/// relative to `root`. Fails on a file system that keeps no access times.
pub async fn measure(run: &RunDir, root: &Path, config: &ImageConfig) -> Result<Vec<String>> {
    layer_tar::clamp_times(root, i64::MAX, 0)?;
    let port = crate::registry::free_port()?;
    let mut command = Command::new("/usr/sbin/chroot");
    command.arg(root).args(&config.entrypoint).env_clear();
    command.envs(config.env.iter().filter_map(|variable| variable.split_once('=')));
    command
        .env("HOST", Ipv4Addr::LOCALHOST.to_string())
        .env("PORT", port.to_string());
    let mut process = run.spawn("access", command)?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let answered = crate::probe::first_200(address, crate::demo_image::PATH, ANSWER_LIMIT).await;
    if answered.is_err() {
        process.check_running()?;
    }
    answered?;
    process.stop()?;
    let mut read = Vec::new();
    collect(root, Path::new(""), &mut read)?;
    read.sort();
    let names: Vec<_> = read
        .into_iter()
        .map(|(_, path)| path.to_string_lossy().into_owned())
        .collect();
    ensure!(
        names.iter().any(|name| name == crate::demo_image::PROGRAM),
        "{} was not read as the function started: the file system of {} keeps no access times (mounted noatime?)",
        crate::demo_image::PROGRAM,
        root.display()
    );
    let own = READ_BY_RUNTIME.map(String::from);
    let first: Vec<String> = own.into_iter().filter(|path| root.join(path).is_file()).collect();
    let rest: Vec<String> = names.into_iter().filter(|name| !first.contains(name)).collect();
    Ok([first, rest].concat())
}

fn collect(root: &Path, relative: &Path, found: &mut Vec<((i64, i64), PathBuf)>) -> Result<()> {
    let directory = root.join(relative);
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let entry = entry?;
        let path = relative.join(entry.file_name());
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            collect(root, &path, found)?;
        } else if metadata.is_file() && metadata.atime() > 0 {
            found.push(((metadata.atime(), metadata.atime_nsec()), path));
        }
    }
    Ok(())
}
