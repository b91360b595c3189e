//! What a served mount does when everything goes well.

use std::fs::File;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuse_session::End;

use super::memory::{Content, Kind, MemoryFs, Tree, pattern};
use super::{Mounted, eventually, is_mounted, within};

fn one_file() -> MemoryFs {
    let mut tree = Tree::default();
    tree.file(1, "file", pattern(100_000));
    tree.build()
}

#[test]
fn privileged_sixty_four_threads_read_right_bytes() {
    let content = pattern(64 << 20);
    let mut tree = Tree::default();
    tree.file(1, "large", content.clone());
    let mounted = Mounted::new(tree.build());
    let file = Arc::new(File::open(mounted.path("large")).unwrap());
    rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::Random).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..64_usize {
            let (file, content) = (Arc::clone(&file), content.clone());
            scope.spawn(move || {
                let mut buffer = vec![0; 4096 * 3];
                for step in 0..64_usize {
                    let offset = (thread * 7919 + step * 104_729) * 613 % (content.len() - buffer.len());
                    file.read_exact_at(&mut buffer, offset as u64).unwrap();
                    assert!(buffer == content[offset..offset + buffer.len()], "bytes at {offset}");
                }
            });
        }
    });
    assert_eq!(mounted.session().pending(), 0);
}

#[test]
fn privileged_workers_come_where_handlers_sleep_and_leave_when_it_is_quiet() {
    let mut tree = Tree::default();
    let content = Content::Blocking(Duration::from_millis(30), pattern(100_000));
    tree.add(1, "file", Kind::File(content), 0o644);
    let mounted = Mounted::with(tree.build(), |config| {
        config.worker_patience = Duration::from_millis(100)
    });
    let read = || {
        let file = File::open(mounted.path("file")).unwrap();
        let mut buffer = [0; 4096];
        file.read_exact_at(&mut buffer, 8192).unwrap();
        assert!(buffer == pattern(100_000)[8192..12_288]);
    };
    for _ in 0..3 {
        eventually("a second worker", || {
            read();
            mounted.session().workers() > 1
        });
        assert!(mounted.session().workers() <= 4);
        eventually("a session of one worker", || mounted.session().workers() == 1);
        assert!(mounted.session().is_alive());
        read();
    }
}

#[test]
fn privileged_a_handler_that_blocks_its_thread_does_not_keep_others_waiting() {
    let mut tree = Tree::default();
    for name in ["one", "two", "three"] {
        let content = Content::Blocking(Duration::from_secs(4), pattern(4096));
        tree.add(1, name, Kind::File(content), 0o644);
    }
    tree.file(1, "file", pattern(100_000));
    let mounted = Mounted::new(tree.build());
    std::thread::scope(|scope| {
        let blocked = ["one", "two", "three"].map(|name| {
            let path = mounted.path(name);
            scope.spawn(move || std::fs::read(path).unwrap())
        });
        // All three have their handlers, and the fourth worker has the rest.
        eventually("four workers", || mounted.session().workers() == 4);
        assert!(std::fs::read(mounted.path("file")).unwrap() == pattern(100_000));
        assert!(
            blocked.iter().all(|reader| !reader.is_finished()),
            "it waited for the others"
        );
        for reader in blocked {
            assert!(reader.join().unwrap() == pattern(4096));
        }
    });
}

#[test]
fn privileged_offsets_beyond_four_gib_are_whole() {
    let block = pattern(1 << 20);
    let mut tree = Tree::default();
    tree.add(1, "vast", Kind::File(Content::Repeated(block.clone(), 1 << 40)), 0o644);
    let mounted = Mounted::new(tree.build());
    let file = File::open(mounted.path("vast")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 40);
    for gib in [3_u64, 5, 1000] {
        let mut buffer = [0; 8192];
        file.read_exact_at(&mut buffer, (gib << 30) + 4096).unwrap();
        assert!(buffer == block[4096..12_288], "bytes at {gib} GiB");
    }
}

#[test]
fn privileged_waiting_handlers_do_not_block_others() {
    let mut tree = Tree::default();
    for index in 0..16 {
        let slow = Content::Slow(Duration::from_secs(5), pattern(4096));
        tree.add(1, &format!("slow-{index}"), Kind::File(slow), 0o644);
    }
    tree.file(1, "quick", pattern(4096));
    let mounted = Mounted::new(tree.build());
    let readers: Vec<_> = (0..16)
        .map(|index| {
            let path = mounted.path(&format!("slow-{index}"));
            std::thread::spawn(move || std::fs::read(path).unwrap())
        })
        .collect();
    eventually("sixteen pending reads", || mounted.session().pending() == 16);
    assert_eq!(std::fs::read(mounted.path("quick")).unwrap(), pattern(4096));
    assert_eq!(
        mounted.session().pending(),
        16,
        "the quick read came while all slow ones waited"
    );
    for reader in readers {
        assert_eq!(reader.join().unwrap(), pattern(4096));
    }
    assert_eq!(mounted.session().pending(), 0);
}

#[test]
fn privileged_few_places_delay_but_lose_nothing() {
    let mut tree = Tree::default();
    for index in 0..12 {
        let slow = Content::Slow(Duration::from_millis(50), pattern(4096));
        tree.add(1, &format!("slow-{index}"), Kind::File(slow), 0o644);
    }
    let mounted = Mounted::with(tree.build(), |config| {
        config.max_background = 2;
        config.max_pending = 2;
    });
    std::thread::scope(|scope| {
        for index in 0..12 {
            let path = mounted.path(&format!("slow-{index}"));
            scope.spawn(move || assert_eq!(std::fs::read(path).unwrap(), pattern(4096)));
        }
        for _ in 0..20 {
            assert!(mounted.session().pending() <= 2);
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

#[test]
fn privileged_mount_is_what_containers_need() {
    let mounted = Mounted::with(one_file(), |config| config.fs_name = "layer-of-test".to_owned());
    let found = Command::new("findmnt")
        .args(["-rn", "-o", "FSTYPE,SOURCE,OPTIONS", "--mountpoint"])
        .arg(mounted.root())
        .output()
        .unwrap();
    let line = String::from_utf8(found.stdout).unwrap();
    let fields: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(fields[..2], ["fuse.hullspeed", "layer-of-test"], "{line}");
    let options: Vec<&str> = fields[2].split(',').collect();
    for option in [
        "ro",
        "nodev",
        "default_permissions",
        "allow_other",
        "max_read=1048576",
        "user_id=0",
    ] {
        assert!(options.contains(&option), "{option} in {line}");
    }
    for option in ["nosuid", "noexec", "rw"] {
        assert!(!options.contains(&option), "{option} not in {line}");
    }
    let device = mounted.session().device();
    let bdi = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.major, device.minor);
    assert_eq!(std::fs::read_to_string(bdi).unwrap().trim(), "1024");
    let refused = File::create(mounted.path("new")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
}

#[test]
fn privileged_programs_run_and_map_from_the_mount() {
    let mut tree = Tree::default();
    let id = std::fs::read("/usr/bin/id").unwrap();
    let plain = tree.file(1, "id", id.clone());
    tree.node(plain).mode = 0o755;
    let set_user_id = tree.file(1, "suid-id", id.clone());
    tree.node(set_user_id).mode = 0o4755;
    tree.file(1, "data", pattern(3 << 20));
    let mounted = Mounted::new(tree.build());
    assert_eq!(
        mounted.path("suid-id").metadata().unwrap().permissions().mode() & 0o7777,
        0o4755
    );
    let effective = |name: &str| {
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(mounted.path(name))
            .arg("-u")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(effective("id"), "65534");
    assert_eq!(effective("suid-id"), "0");
    let file = File::open(mounted.path("data")).unwrap();
    assert!(mapped(&file) == pattern(3 << 20), "mapped bytes");
}

#[expect(unsafe_code, reason = "mapping a file is what is tested")]
fn mapped(file: &File) -> Vec<u8> {
    // SAFETY: nobody writes the file or truncates it: the mount is read-only.
    let map = unsafe { memmap2::Mmap::map(file) }.unwrap();
    map.to_vec()
}

#[test]
fn privileged_the_kernel_caches_names_links_and_absence() {
    let mut tree = Tree::default();
    let directory = tree.add(1, "dir", Kind::Directory(vec![]), 0o755);
    tree.add(directory, "link", Kind::Symlink("target".into()), 0o777);
    let fs = tree.build();
    let calls = Arc::clone(&fs.calls);
    let mounted = Mounted::new(fs);
    for _ in 0..50 {
        assert_eq!(
            std::fs::read_link(mounted.path("dir/link")).unwrap(),
            Path::new("target")
        );
        assert!(!mounted.path("dir/absent").exists());
    }
    assert_eq!(calls.lookup.load(Ordering::SeqCst), 3, "dir, link and the absent one");
    assert_eq!(calls.readlink.load(Ordering::SeqCst), 1);
}

#[test]
fn privileged_an_overlay_on_top_reads_through() {
    let mut tree = Tree::default();
    let directory = tree.add(1, "dir", Kind::Directory(vec![]), 0o755);
    tree.file(directory, "file", pattern(200_000));
    let mounted = Mounted::new(tree.build());
    let scratch = super::directory();
    let at = |name: &str| {
        let path = scratch.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (upper, work, merged) = (at("upper"), at("work"), at("merged"));
    // The scratch directory may itself be on an overlay, which cannot hold an upper directory.
    rustix::mount::mount(
        "tmpfs",
        scratch.path().join("upper"),
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .unwrap();
    let (upper_in, work_in) = (upper.join("u"), upper.join("w"));
    std::fs::create_dir(&upper_in).unwrap();
    std::fs::create_dir(&work_in).unwrap();
    drop(work);
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        mounted.root().display(),
        upper_in.display(),
        work_in.display()
    );
    let options = std::ffi::CString::new(options).unwrap();
    rustix::mount::mount(
        "overlay",
        &merged,
        "overlay",
        rustix::mount::MountFlags::empty(),
        options.as_c_str(),
    )
    .unwrap();
    let read = std::fs::read(merged.join("dir/file"));
    let written = std::fs::write(merged.join("dir/new"), b"copied up");
    rustix::mount::unmount(&merged, rustix::mount::UnmountFlags::DETACH).unwrap();
    rustix::mount::unmount(&upper, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(read.unwrap() == pattern(200_000), "bytes through the overlay");
    written.unwrap();
}

#[test]
fn privileged_unmount_and_drop_leave_nothing() {
    let fs = one_file();
    let calls = Arc::clone(&fs.calls);
    // An unused mount needs none of its grace, or this takes too long.
    let mut mounted = Mounted::with(fs, |config| config.unmount_grace = Duration::from_secs(60));
    let root = mounted.root().to_owned();
    assert!(mounted.session().is_alive() && is_mounted(&root));
    let closed = mounted.session().closed();
    let session = mounted.session.take().unwrap();
    within(Duration::from_secs(30), move || session.unmount()).unwrap();
    assert!(!is_mounted(&root));
    assert_eq!(mounted.runtime.block_on(closed), End::Unmounted);
    assert_eq!(calls.destroy.load(Ordering::SeqCst), 1);

    let mounted = Mounted::new(one_file());
    let root = mounted.root().to_owned();
    drop(mounted);
    assert!(!is_mounted(&root) && !root.exists());
}

#[test]
fn privileged_an_unmount_by_others_is_noticed() {
    let mounted = Mounted::new(one_file());
    let closed = mounted.session().closed();
    assert!(Command::new("umount").arg(mounted.root()).status().unwrap().success());
    let end = mounted.runtime.block_on(tokio_timeout(closed));
    assert_eq!(end, End::Unmounted);
    assert!(!mounted.session().is_alive());
}

async fn tokio_timeout(closed: impl Future<Output = End>) -> End {
    tokio::time::timeout(Duration::from_secs(10), closed)
        .await
        .expect("noticed in time")
}
