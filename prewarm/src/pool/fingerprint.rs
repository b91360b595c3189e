//! What hulls are made with, and how a change of it is noticed.
//!
//! A [`Stamp`] holds marks of files: containerd's socket, which a restart makes anew, and all that decides on the
//! network. Comparing it costs a few stats, so that is done whenever a hull is handed out. A stamp that does not match
//! only means that somebody has to look again; whether hulls have to go is decided by [`Fingerprint`], a digest of
//! content. It is kept on each hull, too, for a later run of this daemon.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::containerd::facts::Facts;

use super::cni::{self, Network};

/// Changes when hulls are made differently, so that those of an older version of this daemon are not kept.
const FORM: &str = "1";

/// Configurations of one directory that are watched, beside the directory itself.
const MAX_WATCHED: usize = 64;

/// Largest part of a plugin's input that counts.
const MAX_INPUT_BYTES: u64 = 64 << 10;

/// One state of a file; `None`: it cannot be read or is not there.
type Mark = Option<(u64, u64, u64, i64, i64, i64, i64)>;

fn mark(path: &Path) -> Mark {
    let of = std::fs::metadata(path).ok()?;
    Some((
        of.dev(),
        of.ino(),
        of.size(),
        of.mtime(),
        of.mtime_nsec(),
        of.ctime(),
        of.ctime_nsec(),
    ))
}

/// Marks of files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    marks: Vec<(PathBuf, Mark)>,
}

impl Stamp {
    pub(super) fn of(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let marks = paths.into_iter().map(|path| {
            let mark = mark(&path);
            (path, mark)
        });
        Self { marks: marks.collect() }
    }

    /// Whether none of the files has changed.
    pub(super) fn is_current(&self) -> bool {
        self.marks.iter().all(|(path, before)| mark(path) == *before)
    }
}

/// The paths in a CNI directory that decide on the network: itself and its configurations. Those of its networks come
/// with [`network_paths`], once they can be read.
pub(super) fn directory_paths(directory: &Path) -> Vec<PathBuf> {
    let mut paths = vec![directory.to_owned()];
    if let Ok(entries) = std::fs::read_dir(directory) {
        let entries = entries
            .take(cni::MAX_FILES)
            .filter_map(Result::ok)
            .map(|entry| entry.path());
        let mut files: Vec<_> = entries
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| cni::is_configuration(Path::new(name)))
            })
            .collect();
        // The first ones are those that containerd uses.
        files.sort();
        files.truncate(MAX_WATCHED);
        paths.extend(files);
    }
    paths
}

/// The further paths that decide on these networks.
pub(super) fn network_paths(directory: &Path, networks: &[Network]) -> Vec<PathBuf> {
    let own = networks.iter().map(|network| directory.join(&network.name));
    own.chain(networks.iter().flat_map(|network| network.inputs.clone()))
        .collect()
}

/// A digest of what hulls are made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fingerprint {
    /// Configuration and networks.
    base: String,
    /// The pause image; unknown before containerd has pulled it.
    pause: Option<String>,
}

impl Fingerprint {
    pub(super) fn new<'a>(facts: &Facts, networks: impl Iterator<Item = &'a Network>, cgroup: &str) -> Self {
        let mut digest = Sha256::new();
        let mut add = |text: &[u8]| {
            digest.update(text.len().to_le_bytes());
            digest.update(text);
        };
        add(FORM.as_bytes());
        add(facts.fingerprint.as_bytes());
        add(cgroup.as_bytes());
        for network in networks {
            add(network.name.as_bytes());
            for plugin in &network.plugins {
                // Keys are sorted, so the same content has the same text.
                add(Value::Object(plugin.clone()).to_string().as_bytes());
            }
            for input in &network.inputs {
                add(&beginning(input));
            }
        }
        let pause = facts.pause_images.join(" ");
        Self {
            base: hex::encode(&digest.finalize()[..16]),
            pause: (!pause.is_empty()).then(|| hex::encode(&Sha256::digest(pause.as_bytes())[..8])),
        }
    }

    /// The text that a hull carries.
    pub(super) fn text(&self) -> String {
        format!("{}.{}", self.base, self.pause.as_deref().unwrap_or("unknown"))
    }

    /// Whether a hull with this text was made with just this.
    pub(super) fn is(&self, text: &str) -> bool {
        self.pause.is_some() && text == self.text()
    }

    /// Why hulls made with `before` must not be handed out any more, if so. Learning of the pause image is no change.
    pub(super) fn change_since(&self, before: &Self) -> Option<&'static str> {
        if self.base != before.base {
            Some("configuration")
        } else if before.pause.is_some() && self.pause != before.pause {
            Some("pause_image")
        } else {
            None
        }
    }
}

fn beginning(path: &Path) -> Vec<u8> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    // Only files: opening a FIFO would wait. What cannot be read has no content.
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
        && let Ok(file) = std::fs::File::open(path)
        && file.take(MAX_INPUT_BYTES).read_to_end(&mut bytes).is_err()
    {
        bytes.clear();
    }
    bytes
}

/// What a hull that is made now is made with.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) facts: Arc<Facts>,
    /// containerd itself.
    pub(super) instance: Stamp,
    /// The network's configuration.
    pub(super) network: Stamp,
    pub(super) fingerprint: Fingerprint,
    /// Names of networks.
    pub(super) networks: Vec<Network>,
}

impl Current {
    /// Whether nothing has changed since.
    pub(super) fn is_current(&self) -> bool {
        self.instance.is_current() && self.network.is_current()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(mtu: u64) -> Network {
        let plugin = serde_json::json!({"type": "bridge", "mtu": mtu});
        Network {
            name: "n".into(),
            plugins: vec![plugin.as_object().unwrap().clone()],
            addresses: None,
            inputs: Vec::new(),
        }
    }

    fn fingerprint(pause: &[&str], mtu: u64) -> Fingerprint {
        let facts = Facts {
            pause_images: pause.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        Fingerprint::new(&facts, [network(mtu)].iter(), "/hullspeed")
    }

    #[test]
    fn content_decides_and_a_pause_image_may_become_known() {
        let known = fingerprint(&["a"], 1500);
        assert_eq!(known.change_since(&fingerprint(&[], 1500)), None);
        assert_eq!(known.change_since(&known), None);
        assert_eq!(fingerprint(&["b"], 1500).change_since(&known), Some("pause_image"));
        assert_eq!(fingerprint(&[], 1500).change_since(&known), Some("pause_image"));
        assert_eq!(fingerprint(&["a"], 9000).change_since(&known), Some("configuration"));
        assert!(known.is(&known.text()) && !known.is(&fingerprint(&["b"], 1500).text()));
        let unknown = fingerprint(&[], 1500);
        assert!(!unknown.is(&unknown.text()));
    }

    #[test]
    fn stamps_notice_edits_replacements_arrivals_and_departures() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("10-a.conflist");
        std::fs::write(&path, "{}").unwrap();
        let look = || Stamp::of(directory_paths(directory.path()));
        let first = look();
        assert!(first.is_current());
        std::fs::write(&path, "{ }").unwrap();
        assert!(!first.is_current());
        let second = look();
        std::fs::write(directory.path().join("tmp"), "{ }").unwrap();
        std::fs::rename(directory.path().join("tmp"), &path).unwrap();
        assert!(!second.is_current());
        let third = look();
        std::fs::write(directory.path().join("05-b.conf"), "{}").unwrap();
        assert!(!third.is_current());
        let fourth = look();
        std::fs::remove_file(&path).unwrap();
        assert!(!fourth.is_current());
        assert!(!Stamp::of([path.clone()]).marks.is_empty() && Stamp::of([path]).is_current());
    }
}
