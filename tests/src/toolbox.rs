//! An image with a shell and the usual small programs: Debian's static busybox. For containers that look around.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::layer_tar;
use crate::layout::{ImageConfig, LayoutWriter};

/// Where Debian's busybox-static is.
const PROGRAM: &str = "/usr/bin/busybox";

/// What it is called in the image; busybox looks at its name.
const NAMES: &[&str] = &[
    "cat", "chmod", "cut", "dd", "df", "echo", "env", "grep", "head", "hostname", "httpd", "id", "ip", "kill", "ls",
    "mkdir", "mount", "nc", "ping", "printf", "ps", "readlink", "rm", "sed", "seq", "sh", "sleep", "sort", "stat",
    "sync", "tail", "test", "touch", "tr", "true", "uname", "wc", "wget", "yes",
];

/// Writes the image, tagged `latest`, as a layout in `layout`, with `scratch` to work in. Its command sleeps.
pub fn build(layout: &Path, scratch: &Path) -> Result<()> {
    let root = scratch.join("toolbox-root");
    for directory in ["bin", "etc", "tmp", "www"] {
        fs::create_dir_all(root.join(directory)).context("cannot create a directory of the toolbox")?;
    }
    fs::copy(PROGRAM, root.join("bin/busybox")).with_context(|| format!("cannot copy {PROGRAM}"))?;
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
    for name in NAMES {
        symlink("busybox", root.join("bin").join(name)).with_context(|| format!("cannot link {name}"))?;
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/:/bin/sh\nsomeone:x:1000:1000::/:/bin/sh\n",
    )?;
    fs::write(root.join("etc/group"), "root:x:0:\nsomeone:x:1000:\n")?;
    fs::write(root.join("www/index.html"), "hello from the toolbox\n")?;
    layer_tar::clamp_times(&root, 0, 0)?;
    let mut writer = LayoutWriter::create(layout)?;
    writer.add_layer(|tar| layer_tar::write(&root, tar))?;
    let config = ImageConfig {
        entrypoint: vec!["/bin/sleep".into(), "1000000".into()],
        env: vec!["PATH=/bin".into(), "FROM_IMAGE=yes".into()],
        working_dir: "/tmp".into(),
    };
    writer.finish(&config, "latest")?;
    fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))
}
