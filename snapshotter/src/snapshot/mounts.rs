//! The mounts that containerd is told to make for a snapshot. Pure.

use super::Kind;
use super::directories::Directories;
use super::store::Chain;

/// One mount, as containerd performs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: &'static str,
    /// What is mounted.
    pub source: String,
    /// Options as in fstab.
    pub options: Vec<String>,
}

/// What the kernel's overlayfs offers, found once at the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OverlayFeatures {
    /// The `index` option exists. It is switched off: with it, an upper directory could not be mounted again over
    /// lower directories that were mounted anew.
    pub index: bool,
}

impl OverlayFeatures {
    /// Asks the kernel.
    pub fn detect() -> Self {
        Self {
            index: std::path::Path::new("/sys/module/overlay/parameters/index").exists(),
        }
    }
}

/// The mounts of an active or view snapshot.
pub fn mounts(chain: &Chain, directories: &Directories, features: OverlayFeatures) -> Vec<Mount> {
    let own = directories.upper(chain.id);
    // overlayfs needs a lower directory, and for a writable mount an upper one: where there is only one directory it
    // is mounted itself.
    match (chain.kind, chain.parents.as_slice()) {
        (Kind::Active, []) => vec![bind(&own, "rw")],
        (_, []) => vec![bind(&own, "ro")],
        (Kind::View, [parent]) => vec![bind(&directories.upper(*parent), "ro")],
        (kind, parents) => {
            let mut options = Vec::new();
            if kind == Kind::Active {
                options.push(format!("workdir={}", directories.work(chain.id).display()));
                options.push(format!("upperdir={}", own.display()));
            }
            let lower: Vec<_> = parents
                .iter()
                .map(|id| directories.upper(*id).display().to_string())
                .collect();
            options.push(format!("lowerdir={}", lower.join(":")));
            if features.index {
                options.push("index=off".to_owned());
            }
            vec![Mount {
                kind: "overlay",
                source: "overlay".to_owned(),
                options,
            }]
        }
    }
}

fn bind(path: &std::path::Path, access: &str) -> Mount {
    let options = vec![access.to_owned(), "rbind".to_owned()];
    Mount {
        kind: "bind",
        source: path.display().to_string(),
        options,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(kind: Kind, parents: &[u64], index: bool) -> (String, Vec<Mount>) {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::open(root.path()).unwrap();
        let chain = Chain {
            id: 9,
            kind,
            parents: parents.to_vec(),
            layers: Vec::new(),
        };
        let place = root.path().join("snapshots").display().to_string();
        (place, mounts(&chain, &directories, OverlayFeatures { index }))
    }

    #[test]
    fn one_directory_is_bound() {
        for (kind, parents, id, access) in [
            (Kind::Active, &[][..], 9, "rw"),
            (Kind::View, &[][..], 9, "ro"),
            (Kind::View, &[4][..], 4, "ro"),
        ] {
            let (place, mounts) = made(kind, parents, true);
            let options = vec![access.to_owned(), "rbind".to_owned()];
            assert_eq!(
                mounts,
                [Mount {
                    kind: "bind",
                    source: format!("{place}/{id}/fs"),
                    options
                }]
            );
        }
    }

    #[test]
    fn several_directories_are_an_overlay_nearest_parent_first() {
        let (place, mounts) = made(Kind::Active, &[4, 2], true);
        let options = [
            format!("workdir={place}/9/work"),
            format!("upperdir={place}/9/fs"),
            format!("lowerdir={place}/4/fs:{place}/2/fs"),
            "index=off".to_owned(),
        ];
        assert_eq!(
            mounts,
            [Mount {
                kind: "overlay",
                source: "overlay".to_owned(),
                options: options.to_vec()
            }]
        );
        let (place, mounts) = made(Kind::View, &[4, 2], false);
        assert_eq!(mounts[0].options, [format!("lowerdir={place}/4/fs:{place}/2/fs")]);
        let (place, mounts) = made(Kind::Active, &[4], false);
        assert_eq!(mounts[0].options[2], format!("lowerdir={place}/4/fs"));
    }
}
