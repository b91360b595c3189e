//! EROFS metadata images of lazy layers, and their file-backed mounts.
//!
//! [`image()`] makes an image from a layer's index: everything about its files but their contents, which lie in the layer's
//! data file, the image's one extra device. [`mount`] mounts both without a loop device, so that a fanotify mark on the
//! data file sees every read that goes to it. Metadata never leave the kernel, and reading them raises no events.
//!
//! ```no_run
//! # fn example(index: &estargz::index::LayerIndex<Vec<u8>>, layer: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
//! use std::os::fd::AsFd;
//! use hullspeed_erofs::mount::Mounter;
//!
//! std::fs::write(layer.join("erofs"), hullspeed_erofs::image(index)?)?;
//! let data = std::fs::File::open(layer.join("data"))?;
//! // Here the data file gets its mark: what is opened by the mount before it has one raises no events later.
//! let mount = Mounter::default().create(&layer.join("erofs"), data.as_fd())?;
//! mount.read_ahead().set(1024)?;
//! mount.attach(&layer.join("mnt"))?;
//! # Ok(()) }
//! ```
//!
//! The image is a pure function of the index (docs/format.md says what is where), so it needs no checksum of its own to be
//! compared: whoever doubts one makes it again.

mod directory;
mod error;
mod format;
mod hash;
mod image;
pub mod mount;
pub mod read_ahead;
mod space;
mod xattrs;

pub use error::{ImageError, MAX_ATTRIBUTES, MAX_DATA_BYTES, MAX_IMAGE_BYTES};
pub use image::image;

/// Id of this form of the image. Raised whenever an index gives other bytes than it gave before, so that images made by an
/// earlier version are known and made again.
pub const FORMAT: u32 = 1;
