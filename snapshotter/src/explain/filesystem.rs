//! The filesystem that the cache is on.

use std::io;
use std::path::Path;

use crate::layer::layers::inspector::Space;

/// Types by their magic numbers, from statfs(2); ext2 and ext3 are driven by ext4 today and have its number.
const TYPES: [(u64, &str); 9] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0xf2f5_2010, "f2fs"),
    (0x2fc1_2fc1, "zfs"),
    (0x0102_1994, "tmpfs"),
    (0x794c_7630, "overlayfs"),
    (0x6969, "nfs"),
    (0x6573_5546, "fuse"),
];

/// Fills in what the kernel tells of the filesystem at `path`.
pub(crate) fn measure(path: &Path, space: Space) -> io::Result<Space> {
    let found = rustix::fs::statfs(path)?;
    // Kernels disagree on the width and the sign of these numbers.
    let number = |value: i128| u64::try_from(value).unwrap_or(0);
    let block = number(found.f_bsize.into());
    let magic = number(i128::from(found.f_type) & 0xffff_ffff);
    let name = TYPES
        .iter()
        .find(|(known, _)| *known == magic)
        .map_or("other", |(_, name)| name);
    Ok(Space {
        filesystem: name,
        size: found.f_blocks.saturating_mul(block),
        free: found.f_bavail.saturating_mul(block),
        ..space
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_has_a_name_and_a_size() {
        let proc = measure(Path::new("/proc"), Space::default()).unwrap();
        assert_eq!(proc.filesystem, "other");
        let root = measure(Path::new(env!("CARGO_MANIFEST_DIR")), Space::default()).unwrap();
        assert!(root.size > root.free && root.size > 1 << 20, "{root:?}");
        assert!(measure(Path::new("/nonesuch"), Space::default()).is_err());
    }
}
