//! containerd's configuration file and those that it imports, as far as they say what CRI does with images: containerd 2 tells it
//! nowhere else.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use hullspeed_daemon::doctor::containerd::ImagePolicy;
use toml::{Table, Value};

/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Files read in all.
const MAX_FILES: usize = 64;
/// Where CRI's images are configured: containerd 2, and 1 in its second and first form.
const SECTIONS: [&[&str]; 3] = [
    &["plugins", "io.containerd.cri.v1.images"],
    &["plugins", "io.containerd.grpc.v1.cri", "containerd"],
    &["plugins", "cri", "containerd"],
];

/// Why it is not known what the configuration says.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file is no TOML.
    #[error("{} is no TOML", path.display())]
    Syntax {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// What the file and its imports say. One that is not there says nothing: containerd does without, too.
pub(super) fn read(path: &Path) -> Result<ImagePolicy, FileError> {
    let mut policy = ImagePolicy::default();
    let mut left = vec![path.to_owned()];
    let mut seen: Vec<PathBuf> = Vec::new();
    // Each file overrides those before it, and comes before those that it imports.
    while let Some(path) = left.pop() {
        // One that is not there is told when it is read.
        let file = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if seen.contains(&file) || seen.len() >= MAX_FILES {
            continue;
        }
        let table = match parse(&path) {
            Err(FileError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound && seen.is_empty() => {
                return Ok(policy);
            }
            parsed => parsed?,
        };
        take(&table, &mut policy);
        let directory = path.parent().unwrap_or(Path::new("/"));
        let imports = table.get("imports").and_then(Value::as_array).into_iter().flatten();
        let imports: Vec<PathBuf> = imports
            .filter_map(Value::as_str)
            .flat_map(|pattern| matching(&directory.join(pattern)))
            .collect();
        left.extend(imports.into_iter().rev());
        seen.push(file);
    }
    Ok(policy)
}

fn parse(path: &Path) -> Result<Table, FileError> {
    let failed = |source| FileError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(failed)?;
    text.parse().map_err(|source| FileError::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

fn take(table: &Table, policy: &mut ImagePolicy) {
    for section in SECTIONS {
        let mut found = Some(table);
        for name in section {
            found = found.and_then(|table| table.get(*name)).and_then(Value::as_table);
        }
        let Some(section) = found else { continue };
        let snapshotter = section.get("snapshotter").and_then(Value::as_str);
        let hides = section.get("disable_snapshot_annotations").and_then(Value::as_bool);
        policy.snapshotter = snapshotter.map(str::to_owned).or(policy.snapshotter.take());
        policy.hides_images = hides.or(policy.hides_images);
    }
}

/// The files that an import names, in order: its last part may have asterisks.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let (Some(directory), Some(name)) = (pattern.parent(), pattern.file_name().and_then(OsStr::to_str)) else {
        return Vec::new();
    };
    if !name.contains('*') {
        return vec![pattern.to_owned()];
    }
    let entries = fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let names = entries.map(|entry| entry.file_name());
    let mut found: Vec<PathBuf> = names
        .filter(|found| found.to_str().is_some_and(|found| fits(found, name)))
        .map(|found| directory.join(found))
        .collect();
    found.sort();
    found.truncate(MAX_FILES);
    found
}

/// Whether a name fits a pattern in which each asterisk stands for any text.
fn fits(name: &str, pattern: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else {
        return false;
    };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else {
        return rest.is_empty();
    };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(snapshotter: &str, hides_images: Option<bool>) -> ImagePolicy {
        ImagePolicy {
            snapshotter: Some(snapshotter.to_owned()),
            hides_images,
        }
    }

    #[test]
    fn all_forms_are_understood_and_our_own_are() {
        for text in [
            include_str!("../../../../deploy/containerd/config-1.x.toml"),
            include_str!("../../../../deploy/containerd/config-2.x.toml"),
            "[plugins.cri.containerd]\nsnapshotter = 'hullspeed'\ndisable_snapshot_annotations = false",
        ] {
            let mut found = ImagePolicy::default();
            take(&text.parse().unwrap(), &mut found);
            assert_eq!(found, policy("hullspeed", Some(false)));
        }
        for text in [
            "",
            "plugins = 1",
            "[plugins.cri]\ncontainerd = []",
            "[plugins.cri.containerd]\nsnapshotter = 1",
        ] {
            let mut found = ImagePolicy::default();
            take(&text.parse().unwrap(), &mut found);
            assert_eq!(found, ImagePolicy::default(), "{text}");
        }
    }

    #[test]
    fn imports_override_and_may_import_each_other() {
        let place = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(place.path().join(name), text).unwrap();
        let main = place.path().join("config.toml");
        assert_eq!(read(&main).unwrap(), ImagePolicy::default());
        fs::create_dir(place.path().join("conf.d")).unwrap();
        let images = "[plugins.'io.containerd.cri.v1.images']\n";
        write(
            "config.toml",
            &format!("imports = ['conf.d/*.toml']\n{images}snapshotter = 'a'\ndisable_snapshot_annotations = false"),
        );
        assert_eq!(read(&main).unwrap(), policy("a", Some(false)));
        write("conf.d/1.toml", &format!("{images}snapshotter = 'b'"));
        write(
            "conf.d/2.toml",
            &format!("imports = ['../config.toml']\n{images}snapshotter = 'c'"),
        );
        write("conf.d/other.conf", "no TOML [");
        assert_eq!(read(&main).unwrap(), policy("c", Some(false)));
        write("conf.d/3.toml", "no TOML [");
        let error = read(&main).unwrap_err();
        assert!(error.to_string().contains("3.toml"), "{error}");
        write("config.toml", "imports = ['gone.toml']");
        assert!(matches!(read(&main), Err(FileError::Read { .. })));
    }

    proptest! {
        #[test]
        fn patterns_are_what_they_are_elsewhere(pattern in "[ab*]{0,6}", name in "[ab]{0,6}") {
            fn model(pattern: &[u8], name: &[u8]) -> bool {
                match (pattern.split_first(), name.split_first()) {
                    (None, None) => true,
                    (Some((b'*', rest)), None) => model(rest, name),
                    (Some((b'*', rest)), Some((_, shorter))) => model(rest, name) || model(pattern, shorter),
                    (Some((a, rest)), Some((b, shorter))) => a == b && model(rest, shorter),
                    _ => false,
                }
            }
            prop_assert_eq!(fits(&name, &pattern), model(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
