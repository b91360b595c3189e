//! Images as the kernel mounts them and as the tools of the format see them. Needs root, EROFS and erofs-utils, and
//! fails without them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "support/layer.rs"]
mod layer;
#[path = "privileged/tree.rs"]
mod tree;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use estargz::index::LayerIndex;
use hullspeed_erofs::mount::Detached;

/// A mounted image with its files; takes the mount away before it removes them.
struct Mounted {
    directory: tempfile::TempDir,
    device: (u32, u32),
}

impl Mounted {
    fn new<B: AsRef<[u8]>>(index: &LayerIndex<B>) -> Self {
        Self::with_content(index, u64::MAX)
    }

    /// Mounts the image of a layer whose files have at most `most` bytes of content, the rest being holes.
    fn with_content<B: AsRef<[u8]>>(index: &LayerIndex<B>, most: u64) -> Self {
        let directory = directory();
        let path = |name| directory.path().join(name);
        fs::write(path("erofs"), hullspeed_erofs::image(index).unwrap()).unwrap();
        let data = data_file(&path("data"));
        layer::fill_data(&data, index, most);
        fs::create_dir(path("mnt")).unwrap();
        let detached = Detached::create(&path("erofs"), data.as_fd()).unwrap_or_else(|error| panic!("{error:?}"));
        let device = detached.device();
        detached.attach(&path("mnt")).unwrap();
        Self { directory, device }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    fn root(&self) -> PathBuf {
        self.directory.path().join("mnt")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.root(), rustix::mount::UnmountFlags::DETACH);
    }
}

fn directory() -> tempfile::TempDir {
    assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
    assert!(
        hullspeed_erofs::mount::is_supported(),
        "this test needs a kernel with EROFS"
    );
    tempfile::Builder::new()
        .prefix("hullspeed-erofs-")
        .tempdir_in("/tmp")
        .unwrap()
}

fn data_file(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .unwrap()
}

/// Output of a program that must succeed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}
