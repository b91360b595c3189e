//! Reads the policy file again whenever it has changed.

use std::fs::{self, File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::policy::{MAX_POLICY_BYTES, Policy};

/// What of a file changes when its content does, whether it is written in place or replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A policy file that is looked at now and then.
#[derive(Debug)]
pub struct PolicyFile {
    path: PathBuf,
    /// What was read last: none for a file that was not there; nothing before the first look.
    read: Option<Option<Version>>,
}

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing new.
    Same,
    /// A policy; an empty one if the file is not there.
    Policy(Policy),
    /// Something that is none: what is wrong, and where. The policy before it goes on.
    Broken(String),
}

impl PolicyFile {
    /// The file at `path`, not read yet.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            read: None,
        }
    }

    /// Reads the file if it is another than last time. Blocks.
    pub fn look(&mut self) -> Look {
        let version = match fs::metadata(&self.path) {
            Ok(metadata) => Some(Version::of(&metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                // It is said once, and the file is read when it can be.
                let first = self.read.replace(None).is_none_or(|read| read.is_some());
                return if first {
                    self.broken(&error.to_string())
                } else {
                    Look::Same
                };
            }
        };
        if self.read == Some(version) {
            return Look::Same;
        }
        // Noted first: what is written while it is read has another version, and is read again.
        self.read = Some(version);
        if version.is_none() {
            return Look::Policy(Policy::default());
        }
        match self.text() {
            Ok(text) => match Policy::parse(&text) {
                Ok(policy) => Look::Policy(policy),
                Err(error) => Look::Broken(format!("{}:{error}", self.path.display())),
            },
            Err(error) => self.broken(&error.to_string()),
        }
    }

    fn broken(&self, why: &str) -> Look {
        Look::Broken(format!("{}: {why}", self.path.display()))
    }

    fn text(&self) -> io::Result<String> {
        if !fs::metadata(&self.path)?.is_file() {
            // A pipe could last for ever.
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        let mut text = String::new();
        let limit = u64::try_from(MAX_POLICY_BYTES).unwrap_or(u64::MAX) + 1;
        File::open(&self.path)?.take(limit).read_to_string(&mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[[image]]\nname = \"a\"\nshare = \"toc\"\n";

    #[test]
    fn it_is_read_when_it_changes_and_what_is_wrong_is_said_once() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("warm.toml");
        let mut file = PolicyFile::at(&path);
        assert_eq!(file.look(), Look::Policy(Policy::default()));
        assert_eq!(file.look(), Look::Same);
        fs::write(&path, GOOD).unwrap();
        assert!(matches!(file.look(), Look::Policy(policy) if policy.entries.len() == 1));
        assert_eq!(file.look(), Look::Same);
        fs::write(&path, GOOD.replace("toc", "tok")).unwrap();
        let Look::Broken(why) = file.look() else { panic!() };
        assert!(why.starts_with(&format!("{}:3:9: ", path.display())), "{why}");
        assert_eq!(file.look(), Look::Same);
        // Replaced by another file of the same size, as editors and configuration tools do.
        let other = place.path().join("other");
        fs::write(&other, GOOD.replace("toc", "all")).unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(matches!(file.look(), Look::Policy(_)));
        fs::remove_file(&path).unwrap();
        assert_eq!(file.look(), Look::Policy(Policy::default()));
        fs::create_dir(&path).unwrap();
        assert!(matches!(file.look(), Look::Broken(why) if why.contains("regular")));
        fs::remove_dir(&path).unwrap();
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert!(matches!(file.look(), Look::Broken(_)));
        let mut beyond = PolicyFile::at(&path.join("x"));
        assert!(matches!(beyond.look(), Look::Broken(_)));
        assert_eq!(beyond.look(), Look::Same);
    }
}
