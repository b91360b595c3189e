//! A login of a private registry, and the search for where its secret was written down.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// A user of the private registry.
pub const USER: &str = "hull";

/// Their password, which is nowhere else.
pub const PASSWORD: &str = "correct-horse-battery-7";

/// `base64(USER:PASSWORD)`.
pub const ENCODED: &str = "aHVsbDpjb3JyZWN0LWhvcnNlLWJhdHRlcnktNw==";

/// The user, with bcrypt of the password, as [`crate::registry::Registry::start_private`] takes it.
pub const HTPASSWD: &str = "hull:$2b$05$abcdefghijklmnopqrstuuq17Gac4tyjXgv0dYB9MAoOS2CwVaxX.\n";

/// Whether the password is there, plain or encoded.
#[must_use]
pub fn has_secret(bytes: &[u8]) -> bool {
    [PASSWORD, ENCODED]
        .iter()
        .any(|secret| bytes.windows(secret.len()).any(|window| window == secret.as_bytes()))
}

/// Files below `directory` that hold the password in either form. Mounted layers are left out.
pub fn files_with_secrets(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
            let path = entry?.path();
            let metadata = fs::symlink_metadata(&path)?;
            if metadata.is_dir() && !path.ends_with("mnt") {
                directories.push(path);
            } else if metadata.is_file() && has_secret(&fs::read(&path)?) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_found_in_both_forms() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::create_dir(at("below")).unwrap();
        fs::write(at("none"), format!("{USER} {}", &PASSWORD[1..])).unwrap();
        assert_eq!(files_with_secrets(directory.path()).unwrap(), Vec::<PathBuf>::new());
        fs::write(at("below/plain"), format!("x{PASSWORD}y")).unwrap();
        fs::write(at("encoded"), ENCODED).unwrap();
        let mut found = files_with_secrets(directory.path()).unwrap();
        found.sort();
        assert_eq!(found, [at("below/plain"), at("encoded")]);
    }
}
