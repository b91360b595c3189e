//! Who may do what: ACLs, file capabilities and set-user-id bits, on the mount and through an overlayfs on top.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::Ordering;

use bytes::Bytes;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_string,
    fsmount, fsopen, move_mount,
};

use super::memory::{Kind, MemoryFs, Tree, pattern};
use super::{Mounted, directory};

/// A user that ACLs name, and one they do not.
const NAMED: u32 = 65_534;
const OTHER: u32 = 65_533;
/// `CAP_NET_RAW`, permitted and effective.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// An ACL as an extended attribute: the owner may read and write, the others as given.
fn acl(named: u16, group: u16, mask: u16, other: u16) -> Bytes {
    let mut value = 2_u32.to_le_bytes().to_vec();
    let nobody = u32::MAX;
    let entries = [
        (1, 6, nobody),
        (2, named, NAMED),
        (4, group, nobody),
        (16, mask, nobody),
        (32, other, nobody),
    ];
    for (tag, permissions, id) in entries {
        value.extend_from_slice(&u16::to_le_bytes(tag));
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value.into()
}

fn sample() -> MemoryFs {
    let mut tree = Tree::default();
    let layer = tree.add(1, "layer", Kind::Directory(vec![]), 0o755);
    tree.add(1, "below", Kind::Directory(vec![]), 0o755);
    for (name, mode, value) in [
        ("granted", 0o640, Some(acl(4, 0, 4, 0))),
        ("denied", 0o644, Some(acl(0, 4, 4, 4))),
        ("private", 0o640, None),
        ("public", 0o644, None),
    ] {
        let file = tree.file(layer, name, pattern(5000));
        tree.node(file).mode = mode;
        tree.node(file).xattrs = value
            .map(|value| ("system.posix_acl_access".into(), value))
            .into_iter()
            .collect();
    }
    let capable = tree.file(layer, "capable", std::fs::read("/bin/grep").unwrap());
    tree.node(capable).mode = 0o755;
    tree.node(capable).xattrs = vec![("security.capability".into(), Bytes::from_static(&CAPABILITY))];
    let set_user_id = tree.file(layer, "suid-id", std::fs::read("/usr/bin/id").unwrap());
    tree.node(set_user_id).mode = 0o4755;
    tree.build()
}

fn run_as(user: u32, program: &Path, arguments: &[&str]) -> Output {
    Command::new("setpriv")
        .args([
            format!("--reuid={user}"),
            format!("--regid={user}"),
            "--clear-groups".to_owned(),
        ])
        .arg(program)
        .args(arguments)
        .output()
        .unwrap()
}

fn may_read(user: u32, file: &Path) -> bool {
    let output = run_as(user, Path::new("/bin/cat"), &[file.to_str().unwrap()]);
    assert!(
        !output.status.success() || output.stdout == pattern(5000),
        "bytes of {}",
        file.display()
    );
    output.status.success()
}

/// Everything about rights that a program on `layer` sees.
fn check(layer: &Path) {
    for (name, named, other) in [
        ("granted", true, false),
        ("denied", false, true),
        ("private", false, false),
        ("public", true, true),
    ] {
        let file = layer.join(name);
        assert_eq!(
            (may_read(NAMED, &file), may_read(OTHER, &file)),
            (named, other),
            "{}",
            file.display()
        );
    }
    let capable = run_as(OTHER, &layer.join("capable"), &["CapEff", "/proc/self/status"]);
    assert_eq!(
        String::from_utf8(capable.stdout).unwrap(),
        "CapEff:\t0000000000002000\n"
    );
    let set_user_id = run_as(OTHER, &layer.join("suid-id"), &["-u"]);
    assert_eq!(String::from_utf8(set_user_id.stdout).unwrap(), "0\n");
}

/// A read-only overlayfs that everyone may enter.
struct Overlay(tempfile::TempDir);

impl Overlay {
    fn on(lowers: [PathBuf; 2]) -> Self {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        for lower in lowers {
            fsconfig_set_string(context.as_fd(), "lowerdir+", lower).unwrap();
        }
        fsconfig_create(context.as_fd()).unwrap();
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
        let target = directory();
        move_mount(
            mount.as_fd(),
            "",
            CWD,
            target.path(),
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .unwrap();
        Self(target)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[test]
fn privileged_acls_capabilities_and_set_user_id_bits_hold_on_the_mount() {
    let mounted = Mounted::new(sample());
    check(&mounted.path("layer"));
}

#[test]
fn privileged_acls_capabilities_and_set_user_id_bits_hold_through_an_overlay() {
    let mounted = Mounted::new(sample());
    let overlay = Overlay::on([mounted.path("layer"), mounted.path("below")]);
    check(overlay.0.path());
}

#[test]
fn privileged_without_acls_nobody_is_asked_for_them() {
    let fs = sample();
    let calls = std::sync::Arc::clone(&fs.calls);
    let mounted = Mounted::with(fs, |config| config.posix_acl = false);
    assert!(may_read(OTHER, &mounted.path("layer/public")));
    assert!(may_read(NAMED, &mounted.path("layer/denied")), "the mode alone says so");
    assert_eq!(calls.getxattr.load(Ordering::SeqCst), 0);
}
