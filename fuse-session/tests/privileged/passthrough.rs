//! Files the kernel reads by itself, from a file-backed EROFS as from any file system that is not stacked.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use fuse_session::passthrough::{OpenModes, ProbeError, probe};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use super::memory::pattern;
use super::succession::{self, FIRST_SMALL, Kept, LARGE, LARGE_BYTES, PROGRAM_FILE};
use super::{directory, runtime};

/// An EROFS image in a file and another file with the content, as a layer in the cache has them; mounted where nobody sees it.
fn erofs(scratch: &Path) -> OwnedFd {
    let source = scratch.join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), pattern(300_000)).unwrap();
    std::fs::copy("/usr/bin/id", source.join("id")).unwrap();
    let (image, data) = (scratch.join("image"), scratch.join("data"));
    let made = Command::new("mkfs.erofs")
        .arg("--chunksize=4096")
        .arg(format!("--blobdev={}", data.display()))
        .args([&image, &source])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (key, value) in [("source", &image), ("device", &data)] {
        fsconfig_set_string(context.as_fd(), key, value).unwrap();
    }
    fsconfig_create(context.as_fd()).unwrap();
    let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY);
    fsmount(context.as_fd(), flags, attributes).unwrap()
}

fn at(directory: &OwnedFd, name: &str) -> OwnedFd {
    rustix::fs::openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn probed(sample: &OwnedFd) -> Result<(), ProbeError> {
    let (runtime, scratch) = (runtime(), directory());
    let outcome = probe(sample.as_fd(), scratch.path(), runtime.handle());
    assert!(!super::is_mounted(scratch.path()));
    outcome
}

#[test]
fn privileged_files_of_a_file_backed_erofs_are_taken_and_overlayfs_stands_on_top() {
    let scratch = directory();
    let erofs = erofs(scratch.path());
    probed(&at(&erofs, "file")).unwrap();
    probed(&at(&erofs, "id")).unwrap();
}

#[test]
fn privileged_the_probe_says_why_it_does_not_work() {
    let memory = rustix::fs::memfd_create("sample", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert!(matches!(probed(&memory), Err(ProbeError::Sample(Errno::NODATA))));
    rustix::io::write(&memory, &pattern(5000)).unwrap();
    probed(&memory).unwrap();
    let scratch = directory();
    for name in ["one", "two"] {
        std::fs::create_dir(scratch.path().join(name)).unwrap();
        std::fs::write(scratch.path().join(name).join(name), pattern(5000)).unwrap();
    }
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for lower in ["one", "two"] {
        fsconfig_set_string(context.as_fd(), "lowerdir+", scratch.path().join(lower)).unwrap();
    }
    fsconfig_create(context.as_fd()).unwrap();
    let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY);
    let overlay = fsmount(context.as_fd(), flags, attributes).unwrap();
    let refused = probed(&at(&overlay, "one")).unwrap_err();
    assert!(matches!(refused, ProbeError::Refused(Errno::LOOP)), "{refused:?}");
}

/// Backing files for the large file and the program, which is cat.
fn backed(target: &Path) {
    let backing = succession::backing(target);
    std::fs::create_dir(&backing).unwrap();
    std::fs::write(backing.join(LARGE.to_string()), pattern(LARGE_BYTES)).unwrap();
    std::fs::copy("/bin/cat", backing.join(PROGRAM_FILE.to_string())).unwrap();
}

/// One line through a running cat.
fn echo(cat: &mut Child, line: &str) {
    let (input, output) = (cat.stdin.as_mut().unwrap(), cat.stdout.as_mut().unwrap());
    input.write_all(line.as_bytes()).unwrap();
    let mut echoed = vec![0; line.len()];
    output.read_exact(&mut echoed).unwrap();
    assert_eq!(echoed, line.as_bytes());
}

#[test]
fn privileged_what_is_passed_through_goes_on_while_nobody_serves_and_opens_again_afterwards() {
    let mut kept = Kept::mount_with(backed);
    let large = pattern(LARGE_BYTES);
    let held = succession::opened(&kept.path("large")).unwrap();
    let mut cat = Command::new(kept.path("program"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    echo(&mut cat, "served\n");
    for round in 0..4 {
        kept.kill();
        // Its pages may be dropped, too: nobody is asked for them.
        rustix::fs::fadvise(&held, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut read = vec![0; 1 << 20];
        held.read_exact_at(&mut read, round << 21).unwrap();
        let start = usize::try_from(round << 21).unwrap();
        assert!(read == large[start..start + read.len()], "round {round}");
        echo(&mut cat, "served by nobody\n");
        kept.resume();
        // With the number that the first process got: the inode is open.
        succession::read_file(&kept.path("large"), &large).unwrap();
        echo(&mut cat, "served again\n");
    }
    drop(cat.stdin.take());
    assert!(cat.wait().unwrap().success());
    let modes = OpenModes::from_fd(kept.modes.try_clone().unwrap()).unwrap();
    assert_eq!(modes.counts(), (2, 0));
}

#[test]
fn privileged_an_inode_keeps_the_mode_of_its_first_open() {
    let mut kept = Kept::mount_with(backed);
    let held = File::open(kept.path("many/small-000")).unwrap();
    // Complete now, but it was not when it was opened; with other bytes, to see where they come from.
    let late = succession::backing(&kept.target).join(FIRST_SMALL.to_string());
    std::fs::write(late, vec![0; 1000]).unwrap();
    for _ in 0..3 {
        succession::read_file(&kept.path("many/small-000"), &pattern(1000)).unwrap();
        kept.kill();
        kept.resume();
    }
    let mut read = [0; 1000];
    held.read_exact_at(&mut read, 0).unwrap();
    assert!(read == pattern(1000)[..]);
    let modes = OpenModes::from_fd(kept.modes.try_clone().unwrap()).unwrap();
    assert_eq!(modes.counts(), (0, 1));
}

#[test]
fn privileged_direct_reads_are_served_or_refused_before_anything_is_read() {
    use std::os::unix::fs::OpenOptionsExt as _;

    let kept = Kept::mount_with(backed);
    let direct = |name: &str| {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(kept.path(name));
        file.map(|file| file.metadata().unwrap().len())
    };
    // First opened so: it is served by the session for good.
    direct("program").unwrap();
    direct("program").unwrap();
    // The kernel reads it already.
    let held = File::open(kept.path("large")).unwrap();
    assert_eq!(direct("large").unwrap_err().raw_os_error(), Some(libc::EINVAL));
    drop(held);
    let modes = OpenModes::from_fd(kept.modes.try_clone().unwrap()).unwrap();
    assert_eq!(modes.counts(), (1, 1));
}

#[test]
fn privileged_a_lost_table_fails_what_is_in_use_and_nothing_else() {
    let mut kept = Kept::mount_with(backed);
    let held = File::open(kept.path("large")).unwrap();
    kept.kill();
    kept.modes = OpenModes::create(100).unwrap().as_fd().try_clone_to_owned().unwrap();
    kept.resume();
    let refused = File::open(kept.path("large")).unwrap_err();
    assert_eq!(
        refused.raw_os_error(),
        Some(libc::EIO),
        "another backing file while one is open"
    );
    let output = Command::new(kept.path("program"))
        .arg("/etc/hostname")
        .output()
        .unwrap();
    assert!(output.status.success());
    let mut read = vec![0; 4096];
    held.read_exact_at(&mut read, 8192).unwrap();
    assert!(read == pattern(LARGE_BYTES)[8192..12_288]);
}
