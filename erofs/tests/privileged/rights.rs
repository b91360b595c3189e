//! What the kernel enforces, and what overlayfs makes of a layer.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};

use estargz::toc::EntryType;

use super::layer::{Layer, acl, capability, set_xattr};
use super::*;

/// Runs a program as a user without any rights.
fn as_user(user: u32, arguments: &[&str]) -> Output {
    let (uid, gid) = (format!("--reuid={user}"), format!("--regid={user}"));
    output("setpriv", &[&[&*uid, &*gid, "--clear-groups"], arguments].concat())
}

#[test]
fn privileged_an_access_control_list_is_enforced() {
    let mut layer = Layer::default();
    layer.file("secret", 100, |file| {
        file.mode = 0o640;
        // User 4321 may read, everyone else but the owner and the group may not.
        set_xattr(file, "system.posix_acl_access", &acl(6, 4321, 4, 4, 4, 0));
    });
    let mounted = Mounted::new(&layer.index());
    let path = mounted.path("secret");
    let read = |user| as_user(user, &["cat", path.to_str().unwrap()]);
    let allowed = read(4321);
    assert!(allowed.status.success() && allowed.stdout.len() == 100, "{allowed:?}");
    let denied = read(4322);
    assert!(!denied.status.success() && denied.stdout.is_empty(), "{denied:?}");
    assert!(
        String::from_utf8_lossy(&denied.stderr).contains("Permission denied"),
        "{denied:?}"
    );
}

/// A layer with one program, mounted and filled with the machine's own.
fn with_program(program: &str, change: impl FnOnce(&mut estargz::toc::TocEntry)) -> Mounted {
    let bytes = fs::read(program).unwrap();
    let mut layer = Layer::default();
    layer.file("program", bytes.len() as u64, |file| {
        file.mode = 0o755;
        change(file);
    });
    let index = layer.index();
    let mounted = Mounted::empty(&index);
    mounted
        .data
        .write_all_at(&bytes, index.inode(2).unwrap().data_offset)
        .unwrap();
    mounted
}

#[test]
fn privileged_set_user_id_is_in_force() {
    let mounted = with_program("/usr/bin/id", |file| file.mode = 0o4755);
    let path = mounted.path("program");
    let shown = as_user(4321, &[path.to_str().unwrap(), "-u"]);
    assert_eq!(String::from_utf8_lossy(&shown.stdout), "0\n", "{shown:?}");
}

#[test]
fn privileged_file_capabilities_are_in_force() {
    const DAC_READ_SEARCH: u32 = 1 << 2;
    let mounted = with_program("/usr/bin/cat", |file| {
        set_xattr(file, "security.capability", &capability(DAC_READ_SEARCH));
    });
    let secret = mounted.beside("secret");
    fs::write(&secret, "for root only").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let secret = secret.to_str().unwrap();
    assert!(!as_user(4321, &["cat", secret]).status.success());
    let read = as_user(4321, &[mounted.path("program").to_str().unwrap(), secret]);
    assert_eq!(String::from_utf8_lossy(&read.stdout), "for root only", "{read:?}");
    let mut value = [0; 64];
    let path = std::ffi::CString::new(mounted.path("program").as_os_str().as_bytes()).unwrap();
    let size = rustix::fs::getxattr(&path, c"security.capability", &mut value).unwrap();
    assert_eq!(value[..size], capability(DAC_READ_SEARCH));
}

#[test]
fn privileged_overlayfs_obeys_whiteouts_and_opaque_directories() {
    let mut lower = Layer::default();
    for name in ["gone", "kept", "directory/old", "merged/old", "removed/file"] {
        lower.file(name, 10, |_| {});
    }
    let mut upper = Layer::default();
    upper
        .add(".wh.gone", EntryType::Reg, |_| {})
        .add(".wh.removed", EntryType::Reg, |_| {});
    upper
        .add("directory/.wh..wh..opq", EntryType::Reg, |_| {})
        .file("directory/new", 10, |_| {})
        .file("merged/new", 10, |_| {});
    let (lower, upper) = (Mounted::new(&lower.index()), Mounted::new(&upper.index()));
    let whiteout = fs::symlink_metadata(upper.path("gone")).unwrap();
    assert_eq!((whiteout.mode() & 0o170_000, whiteout.rdev()), (0o020_000, 0));

    for name in ["overlay", "rw", "work"] {
        fs::create_dir(upper.beside(name)).unwrap();
    }
    let target = upper.beside("overlay");
    let options = format!(
        "lowerdir={}:{},upperdir={},workdir={}",
        upper.root().display(),
        lower.root().display(),
        upper.beside("rw").display(),
        upper.beside("work").display()
    );
    run(
        "mount",
        &["-t", "overlay", "overlay", "-o", &options, target.to_str().unwrap()],
    );
    let names = |directory: &str| {
        let entries = fs::read_dir(target.join(directory)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names.join(" ")
    };
    let seen = [names(""), names("directory"), names("merged")];
    let copied_up = fs::write(target.join("kept"), "new").and_then(|()| fs::read(target.join("kept")));
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(seen, ["directory kept merged", "new", "new old"]);
    assert_eq!(copied_up.unwrap(), b"new");
}
