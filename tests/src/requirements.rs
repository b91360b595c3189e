//! What the machine has to have. A missing thing is one clear line, before anything is started.

use std::fs::File;
use std::path::Path;

use anyhow::{Result, bail};

/// The list that `tests/install-packages.sh` installs from.
const PACKAGES: &str = include_str!("../packages.txt");

/// Fails with one line (what is missing, and what to do) unless this machine can run the harness.
pub fn check() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("not root: namespaces, mounts and cgroups need it; run it with sudo");
    }
    let missing = missing_packages(PACKAGES, |proof| Path::new(proof).exists());
    if !missing.is_empty() {
        bail!(
            "missing Debian packages: {}; run tests/install-packages.sh",
            missing.join(" ")
        );
    }
    check_fuse()?;
    check_overlay()
}

/// Fails with one line unless FUSE file systems can be mounted.
pub fn check_fuse() -> Result<()> {
    match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Ok(()),
        Err(error) => bail!("cannot open /dev/fuse ({error}): load the fuse module, or give this container the device"),
    }
}

fn check_overlay() -> Result<()> {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known
        .lines()
        .any(|line| line.trim_start_matches("nodev").trim() == "overlay")
    {
        bail!("the kernel has no overlayfs: load the overlay module");
    }
    Ok(())
}

/// Packages of `list` whose proof does not exist.
fn missing_packages(list: &str, exists: impl Fn(&str) -> bool) -> Vec<&str> {
    let lines = list.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.filter_map(|line| line.split_once(char::is_whitespace));
    pairs
        .filter(|(_, proof)| !exists(proof.trim()))
        .map(|(package, _)| package)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_parses_and_names_only_what_is_missing() {
        assert!(missing_packages(PACKAGES, |_| false).len() >= 10);
        assert!(missing_packages(PACKAGES, |proof| proof.starts_with('/')).is_empty());
        assert_eq!(missing_packages("# note\na  /x\nb  /y\n", |proof| proof == "/x"), ["b"]);
    }
}
