//! Where our own binaries are.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// Overrides the directory that is searched for our binaries.
pub const DIRECTORY_VARIABLE: &str = "HULLSPEED_BIN_DIR";

/// The path of `name` (`estargz`, `hullspeed-snapshotter`), built by the same `cargo build` as the caller: beside the
/// running executable, or beside its `deps` directory.
pub fn find(name: &str) -> Result<PathBuf> {
    let directory = match std::env::var_os(DIRECTORY_VARIABLE) {
        Some(directory) => PathBuf::from(directory),
        None => build_directory()?,
    };
    let path = directory.join(name);
    if !path.is_file() {
        bail!(
            "{} does not exist; build it first: cargo build --workspace --bins",
            path.display()
        );
    }
    Ok(path)
}

fn build_directory() -> Result<PathBuf> {
    let me = std::env::current_exe().context("cannot tell where this program is")?;
    let directory = me.parent().context("this program is in no directory")?;
    let above = if directory.ends_with("deps") {
        directory.parent()
    } else {
        None
    };
    Ok(above.unwrap_or(directory).to_path_buf())
}
