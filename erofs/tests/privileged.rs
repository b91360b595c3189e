//! Images as the kernel mounts them and as the tools of the format see them. Needs root, EROFS and erofs-utils, and
//! fails without them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "privileged/compare.rs"]
mod compare;
#[allow(dead_code, reason = "some helpers are for images without a mount only")]
#[path = "support/layer.rs"]
mod layer;
#[path = "privileged/mounts.rs"]
mod mounts;
#[path = "privileged/rights.rs"]
mod rights;
#[path = "privileged/sizes.rs"]
mod sizes;
#[path = "privileged/tree.rs"]
mod tree;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use estargz::index::LayerIndex;
use hullspeed_erofs::mount::Mounter;

/// A mounted image with its files; takes the mount away before it removes them.
struct Mounted {
    directory: tempfile::TempDir,
    data: File,
    device: (u32, u32),
}

impl Mounted {
    /// Mounts the image of a layer whose files have all their content.
    fn new<B: AsRef<[u8]>>(index: &LayerIndex<B>) -> Self {
        let mounted = Self::empty(index);
        layer::fill_data(&mounted.data, index);
        mounted
    }

    /// Mounts the image of a layer whose files are holes.
    fn empty<B: AsRef<[u8]>>(index: &LayerIndex<B>) -> Self {
        let directory = directory();
        let path = |name| directory.path().join(name);
        fs::write(path("erofs"), hullspeed_erofs::image(index).unwrap()).unwrap();
        let data = data_file(&path("data"));
        data.set_len(index.data_size()).unwrap();
        fs::create_dir(path("mnt")).unwrap();
        let detached = Mounter::default()
            .create(&path("erofs"), data.as_fd())
            .unwrap_or_else(|error| panic!("{error:?}"));
        let device = detached.device();
        detached.attach(&path("mnt")).unwrap();
        Self {
            directory,
            data,
            device,
        }
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn root(&self) -> PathBuf {
        self.beside("mnt")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Lets the format's own checker read the whole image.
    fn check(&self) {
        let device = format!("--device={}", self.beside("data").display());
        let output = run("fsck.erofs", &["-d3", &device, self.beside("erofs").to_str().unwrap()]);
        assert!(output.contains("No errors found"), "{output}");
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.root(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// A directory that other users can look into.
fn directory() -> tempfile::TempDir {
    assert!(rustix::process::geteuid().is_root(), "this test mounts: run it as root");
    assert!(
        hullspeed_erofs::mount::is_supported(),
        "this test needs a kernel with EROFS"
    );
    let directory = tempfile::Builder::new()
        .prefix("hullspeed-erofs-")
        .tempdir_in("/tmp")
        .unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
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

fn output(program: &str, arguments: &[&str]) -> Output {
    let started = Command::new(program).args(arguments).output();
    started.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// What a program says that must succeed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}
