//! Images without a kernel: their bytes, their limits, and what becomes of an index that lies.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[allow(dead_code, reason = "some helpers are for mounted images only")]
#[path = "support/layer.rs"]
mod layer;

use std::cell::Cell;
use std::rc::Rc;

use estargz::digest::Digest;
use estargz::index::LayerIndex;
use estargz::toc::EntryType;
use hullspeed_erofs::{FORMAT, ImageError, MAX_DATA_BYTES, MAX_IMAGE_BYTES, image};
use layer::{INODE_BYTES, INODES_AT, Layer, changed, everything, set_xattr, small};
use proptest::prelude::*;

/// Where the header of an index has the size of the data file.
const DATA_SIZE_AT: usize = 72;

/// Another digest here means other bytes for the same layer: then [`FORMAT`] is to be raised too.
#[test]
fn the_format_is_what_it_was() {
    let image = image(&everything().index()).unwrap();
    let digest = "sha256:f360b99ec78d1990e40213d76972eb6fcac478d2ae885e5931fb583e8c5818ca";
    assert_eq!((FORMAT, Digest::of(&image).to_string().as_str()), (1, digest));
}

#[test]
fn an_image_is_whole_blocks_and_the_same_every_time() {
    let layer = everything();
    let first = image(&layer.index()).unwrap();
    assert_eq!(first.len() % 4096, 0);
    assert!(first == image(&layer.index()).unwrap());
    let empty = image(&Layer::default().index()).unwrap();
    assert_eq!(empty.len(), 4096);
    assert_eq!(empty[1024..1028], 0xe0f5_e1e2_u32.to_le_bytes());
}

#[test]
fn files_are_small() {
    let mut layer = Layer::default();
    for at in 0..1000 {
        layer.file(&format!("directory/{at:04}"), 5000, |_| {});
    }
    let plain = image(&layer.index()).unwrap().len();
    // An inode with its chunk index takes 96 bytes, a directory entry 12 and its name.
    assert!(plain < 1000 * (96 + 12 + 4) + 3 * 4096, "{plain}");
    let mut labelled = Layer::default();
    for at in 0..1000 {
        labelled.file(&format!("directory/{at:04}"), 5000, |file| {
            set_xattr(file, "security.selinux", b"system_u:object_r:usr_t:s0\0");
        });
    }
    let labelled = image(&labelled.index()).unwrap().len();
    assert_eq!(
        labelled, plain,
        "a label that all files have fits between inode and chunk index"
    );
}

fn fault(bytes: Vec<u8>) -> ImageError {
    let image = image(&LayerIndex::open(bytes).unwrap());
    image.map(|bytes| bytes.len()).unwrap_err()
}

#[test]
fn contents_beyond_sixteen_tib_are_refused() {
    let with_size = |size: u64| {
        changed(Layer::default().index_bytes(), |bytes| {
            bytes[DATA_SIZE_AT..DATA_SIZE_AT + 8].copy_from_slice(&size.to_le_bytes());
        })
    };
    assert!(image(&LayerIndex::open(with_size(MAX_DATA_BYTES)).unwrap()).is_ok());
    let size = MAX_DATA_BYTES + 1;
    assert_eq!(fault(with_size(size)), ImageError::DataTooLarge { size });
}

#[test]
fn device_numbers_that_linux_has_not_are_refused() {
    let mut layer = Layer::default();
    layer.add("node", EntryType::Char, |_| {});
    let bytes = changed(layer.index_bytes(), |bytes| {
        let major = INODES_AT + INODE_BYTES + 40;
        bytes[major..major + 4].copy_from_slice(&4096u32.to_le_bytes());
    });
    let error = fault(bytes);
    assert_eq!(
        error.to_string(),
        "\"/node\" is device 4096:0, the limits are 4095:1048575"
    );
}

#[test]
fn attributes_that_do_not_fit_are_refused_by_name() {
    let mut layer = Layer::default();
    layer.file("a/file", 1, |file| set_xattr(file, "user.big", &[0; 65_536]));
    let error = fault(layer.index_bytes()).to_string();
    assert_eq!(
        error,
        "attribute \"user.big\" of \"/a/file\" has 65536 bytes, EROFS has room for 65535"
    );

    let mut layer = Layer::default();
    layer.file("many", 1, |file| {
        for at in 0..1300 {
            set_xattr(file, &format!("user.{at:04}"), &[1; 220]);
        }
    });
    let error = fault(layer.index_bytes());
    let size = 12 + 1300 * (4 + 4 + 220);
    assert_eq!(
        error,
        ImageError::AttributesTooLong {
            path: "/many".into(),
            size
        }
    );
}

/// An index may say that files share a link target; in an image each has its own.
#[test]
fn an_index_that_unfolds_to_more_than_memory_is_refused() {
    let mut layer = Layer::default();
    let files = MAX_IMAGE_BYTES / 4096 + 1;
    layer.symlink("first", &"t".repeat(4095));
    for at in 1..files {
        layer.symlink(&format!("{at:x}"), "t");
    }
    let bytes = changed(layer.index_bytes(), |bytes| {
        // Size, place and length of the target.
        let first = bytes[INODES_AT + INODE_BYTES..][..INODE_BYTES].to_vec();
        for record in bytes[INODES_AT..].chunks_exact_mut(INODE_BYTES).skip(2).take(files - 1) {
            for part in [0..8, 64..68, 76..78] {
                record[part.clone()].copy_from_slice(&first[part]);
            }
        }
    });
    assert!(bytes.len() < 64 << 20, "{}", bytes.len());
    assert_eq!(fault(bytes), ImageError::TooLarge);
}

/// Files that all name the same long list of attributes.
#[test]
fn an_index_whose_files_share_all_attributes_is_refused() {
    let mut layer = Layer::default();
    let (files, attributes) = (6000, 3000);
    layer.file("first", 0, |file| {
        for at in 0..attributes {
            set_xattr(file, &format!("other.{at:04}"), b"");
        }
    });
    for at in 1..files {
        layer.file(&format!("{at:x}"), 0, |_| {});
    }
    let bytes = changed(layer.index_bytes(), |bytes| {
        let first = bytes[INODES_AT + INODE_BYTES..][..INODE_BYTES].to_vec();
        for record in bytes[INODES_AT..].chunks_exact_mut(INODE_BYTES).skip(2).take(files - 1) {
            record[56..64].copy_from_slice(&first[56..64]);
        }
    });
    assert_eq!(fault(bytes), ImageError::TooManyAttributes);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]
    /// Whatever an index says, there is an image or an error. Most changes do not open; those that do change a mode, a
    /// name, an attribute, a place.
    #[test]
    fn a_changed_index_gives_an_image_or_an_error(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..4)
    ) {
        thread_local!(static BYTES: Vec<u8> = small().index_bytes());
        let bytes = changed(BYTES.with(Clone::clone), |bytes| {
            for (at, value, bit) in changes {
                let at = INODES_AT.min(bytes.len() - 1) + at.index(bytes.len() - INODES_AT);
                bytes[at] = if bit { bytes[at] ^ 1 << (value % 8) } else { value };
            }
        });
        if let Ok(index) = LayerIndex::open(bytes)
            && let Ok(image) = image(&index)
        {
            prop_assert_eq!(image.len() % 4096, 0);
        }
    }
}

/// Bytes that are others after they were looked at so many times, as a mapped file's can be.
#[derive(Debug)]
struct Changing {
    before: Vec<u8>,
    after: Vec<u8>,
    looks_left: Rc<Cell<usize>>,
}

impl AsRef<[u8]> for Changing {
    fn as_ref(&self) -> &[u8] {
        let left = self.looks_left.get();
        self.looks_left.set(left.saturating_sub(1));
        if left == 0 { &self.after } else { &self.before }
    }
}

#[test]
fn an_index_that_changes_while_it_is_used_gives_an_image_or_an_error() {
    let before = small().index_bytes();
    let reversed = before.iter().rev().copied().collect();
    let counted = (0..=250).cycle().take(before.len()).collect();
    for after in [
        vec![0; before.len()],
        vec![0xff; before.len()],
        Vec::new(),
        reversed,
        counted,
    ] {
        let (mut images, mut errors) = (0, 0);
        for moment in 0.. {
            let looks_left = Rc::new(Cell::new(moment));
            let bytes = Changing {
                before: before.clone(),
                after: after.clone(),
                looks_left: Rc::clone(&looks_left),
            };
            // Opening looks too, and refuses most of what changes then.
            let Ok(index) = LayerIndex::open(bytes) else { continue };
            match image(&index) {
                Ok(image) => assert_eq!(image.len() % 4096, 0, "{moment}"),
                Err(_) => errors += 1,
            }
            images += 1;
            if looks_left.get() > 0 {
                break;
            }
        }
        assert!(errors > 20 && errors < images, "{errors} errors at {images} moments");
    }
}
