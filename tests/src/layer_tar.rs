//! Turns a directory (a root file system, or the upper directory of an overlay mount) into a layer's tar archive.
//!
//! Whiteouts and opaque directories of overlayfs become `.wh.` entries. Entries come in path order and times in whole
//! seconds, so that the same tree gives the same bytes.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use tar::{Builder, EntryType, Header};

/// overlayfs's mark of a directory that hides the ones below it.
const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";

/// Prefix of overlayfs's own attributes, which do not belong in a layer.
const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";

/// Writes the tree below `root` as a layer.
pub fn write(root: &Path, output: impl Write) -> Result<()> {
    let mut builder = Builder::new(output);
    let mut hardlinks = HashMap::new();
    for relative in paths(root)? {
        let path = root.join(&relative);
        append(&mut builder, &mut hardlinks, &path, &relative)
            .with_context(|| format!("cannot archive {}", path.display()))?;
    }
    builder
        .into_inner()
        .context("cannot end an archive")?
        .flush()
        .context("cannot end an archive")
}

/// All paths below `root`, sorted, parents first.
fn paths(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut stack = vec![PathBuf::new()];
    while let Some(relative) = stack.pop() {
        let directory = root.join(&relative);
        for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
            let entry = entry?;
            let child = relative.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                stack.push(child.clone());
            }
            found.push(child);
        }
    }
    found.sort();
    Ok(found)
}

fn append<W: Write>(
    builder: &mut Builder<W>,
    hardlinks: &mut HashMap<(u64, u64), PathBuf>,
    path: &Path,
    relative: &Path,
) -> Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    if is_whiteout(&metadata) {
        return whiteout(builder, &sibling(relative, ".wh.")?);
    }
    let mut header = header(&metadata)?;
    if !metadata.is_dir() && metadata.nlink() > 1 {
        let inode = (metadata.dev(), metadata.ino());
        if let Some(first) = hardlinks.get(&inode) {
            header.set_entry_type(EntryType::Link);
            header.set_size(0);
            return builder
                .append_link(&mut header, relative, first)
                .context("cannot append a hardlink");
        }
        hardlinks.insert(inode, relative.into());
    }
    let xattrs = crate::tree::xattrs(path)?;
    append_xattrs(builder, &xattrs)?;
    if metadata.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        builder.append_link(&mut header, relative, fs::read_link(path)?)?;
    } else if metadata.is_file() {
        header.set_size(metadata.len());
        builder.append_data(&mut header, relative, fs::File::open(path)?)?;
    } else {
        header.set_entry_type(special_type(&metadata)?);
        let rdev = metadata.rdev();
        header.set_device_major(rustix::fs::major(rdev))?;
        header.set_device_minor(rustix::fs::minor(rdev))?;
        let name = if metadata.is_dir() {
            directory_name(relative)
        } else {
            relative.into()
        };
        builder.append_data(&mut header, name, io::empty())?;
    }
    if xattrs.get(OPAQUE_XATTR).is_some_and(|value| value == b"y") {
        whiteout(builder, &relative.join(".wh..wh..opq"))?;
    }
    Ok(())
}

fn directory_name(relative: &Path) -> PathBuf {
    let mut name = relative.as_os_str().to_os_string();
    name.push("/");
    name.into()
}

fn is_whiteout(metadata: &Metadata) -> bool {
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

fn sibling(relative: &Path, prefix: &str) -> Result<PathBuf> {
    let mut name = std::ffi::OsString::from(prefix);
    name.push(relative.file_name().context("a whiteout without a name")?);
    Ok(relative.with_file_name(name))
}

fn whiteout<W: Write>(builder: &mut Builder<W>, name: &Path) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(0);
    builder
        .append_data(&mut header, name, io::empty())
        .context("cannot append a whiteout")
}

fn header(metadata: &Metadata) -> Result<Header> {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).context("a time before 1970")?);
    header.set_size(0);
    Ok(header)
}

fn special_type(metadata: &Metadata) -> Result<EntryType> {
    let kind = metadata.file_type();
    Ok(if kind.is_dir() {
        EntryType::Directory
    } else if kind.is_char_device() {
        EntryType::Char
    } else if kind.is_block_device() {
        EntryType::Block
    } else if kind.is_fifo() {
        EntryType::Fifo
    } else {
        bail!("a socket does not belong in a layer")
    })
}

fn append_xattrs<W: Write>(builder: &mut Builder<W>, xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<()> {
    let wanted = xattrs.iter().filter(|(name, _)| !name.starts_with(OVERLAY_PREFIX));
    let records: Vec<(String, &[u8])> = wanted
        .map(|(name, value)| Ok((format!("SCHILY.xattr.{}", std::str::from_utf8(name)?), value.as_slice())))
        .collect::<Result<_>>()?;
    if !records.is_empty() {
        builder.append_pax_extensions(records.iter().map(|(name, value)| (name.as_str(), *value)))?;
    }
    Ok(())
}

/// Whole seconds for every path below `root`; what was changed at `since` or later, which is what a build made, gets the
/// time `instead`.
pub fn clamp_times(root: &Path, since: i64, instead: i64) -> Result<()> {
    for path in paths(root)?
        .iter()
        .map(|relative| root.join(relative))
        .chain([root.to_path_buf()])
    {
        let mtime = fs::symlink_metadata(&path)?.mtime();
        set_mtime(&path, if mtime >= since { instead } else { mtime })?;
    }
    Ok(())
}

/// Sets the modification time and a zero access time, links not followed.
pub fn set_mtime(path: &Path, seconds: i64) -> Result<()> {
    let stamp = |seconds| rustix::fs::Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    let times = rustix::fs::Timestamps {
        last_access: stamp(0),
        last_modification: stamp(seconds),
    };
    rustix::fs::utimensat(
        rustix::fs::CWD,
        path.as_os_str().as_bytes(),
        &times,
        rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
    )
    .with_context(|| format!("cannot set the times of {}", path.display()))
}
