//! The mount itself: what it is, what it takes, what it says.

use std::os::unix::fs::MetadataExt;

use hullspeed_erofs::mount::{self, Detached, MountError};

use super::layer::{Layer, everything};
use super::*;

fn attached(source: &Path, mounted: &Mounted) -> (Detached, String) {
    let detached = Mounter::default().create(source, mounted.data.as_fd()).unwrap();
    let (major, minor) = detached.device();
    (detached, format!(" {major}:{minor} "))
}

fn mount_line(of: &str) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().find(|line| line.contains(of)).map(str::to_owned)
}

#[test]
fn privileged_mounts_are_detached_first_and_what_containers_need() {
    let mounted = Mounted::new(&everything().index());
    let (major, minor) = mounted.device;
    let seen = fs::metadata(mounted.root()).unwrap().dev();
    assert_eq!((rustix::fs::major(seen), rustix::fs::minor(seen)), (major, minor));
    let line = mount_line(&format!(" {major}:{minor} ")).unwrap();
    assert!(
        line.contains(" ro,nodev,") && !line.contains("nosuid") && !line.contains("noexec"),
        "{line}"
    );
    assert!(
        line.contains(&format!("- erofs {} ro,", mounted.beside("erofs").display())),
        "{line}"
    );

    let (detached, device) = attached(&mounted.beside("erofs"), &mounted);
    assert_eq!(mount_line(&device), None, "nobody sees a mount that is not attached");
    let shown = rustix::fs::openat(
        &detached,
        "bin/aligned",
        rustix::fs::OFlags::RDONLY,
        rustix::fs::Mode::empty(),
    );
    assert!(shown.is_ok(), "but its maker can use it");
    drop((detached, shown));

    let denied = File::open(mounted.path("null")).unwrap_err();
    assert_eq!(
        denied.kind(),
        std::io::ErrorKind::PermissionDenied,
        "a device of an image is none"
    );
    assert_eq!(
        fs::write(mounted.path("x"), "").unwrap_err().kind(),
        std::io::ErrorKind::ReadOnlyFilesystem
    );
}

#[test]
fn privileged_what_is_open_counts_and_not_what_its_path_names_by_now() {
    let index = everything().index();
    let mounted = Mounted::new(&index);
    let image = File::open(mounted.beside("erofs")).unwrap();
    for name in ["erofs", "data"] {
        fs::remove_file(mounted.beside(name)).unwrap();
        fs::write(mounted.beside(name), vec![0; 1 << 20]).unwrap();
    }
    let (detached, device) = attached(&mount::path_of(image.as_fd()), &mounted);
    let target = mounted.beside("second");
    fs::create_dir(&target).unwrap();
    detached.attach(&target).unwrap();
    let line = mount_line(&device);
    let same = fs::read(target.join("bin/tool")).and_then(|copy| Ok(copy == fs::read(mounted.path("bin/tool"))?));
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(
        line.unwrap().contains("/proc/self/fd/"),
        "the source is shown as it was given"
    );
    assert!(same.unwrap());
}

#[test]
fn privileged_an_image_may_have_a_long_path() {
    let mounted = Mounted::new(&everything().index());
    let directory = mounted.beside(&vec!["a-long-name"; 40].join("/"));
    fs::create_dir_all(&directory).unwrap();
    let image = directory.join("erofs");
    fs::rename(mounted.beside("erofs"), &image).unwrap();
    let (detached, device) = attached(&image, &mounted);
    let target = directory.join("mnt");
    fs::create_dir(&target).unwrap();
    detached.attach(&target).unwrap();
    let (line, shown) = (mount_line(&device), fs::read(target.join("bin/one")));
    rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(line.unwrap().contains(" /proc/self/fd/"));
    assert_eq!(shown.unwrap().len(), 1);
}

#[test]
fn privileged_failures_say_what_failed() {
    let mounted = Mounted::new(&Layer::default().index());
    let fault = |image: &Path, data: &File| Mounter::default().create(image, data.as_fd()).unwrap_err();
    let zeros = mounted.beside("zeros");
    fs::write(&zeros, vec![0; 8192]).unwrap();
    let mut damaged = fs::read(mounted.beside("erofs")).unwrap();
    damaged[1024 + 16] ^= 1;
    let checksum = mounted.beside("checksum");
    fs::write(&checksum, damaged).unwrap();
    let directory = File::open("/tmp").unwrap();
    for (error, errno) in [
        (fault(&zeros, &mounted.data), "Invalid argument (os error 22)"),
        (fault(&checksum, &mounted.data), "Bad message (os error 74)"),
        (
            fault(Path::new("/tmp"), &mounted.data),
            "Block device required (os error 15)",
        ),
        (
            fault(&mounted.beside("erofs"), &directory),
            "Invalid argument (os error 22)",
        ),
    ] {
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(source, errno, "{error}");
        let text = error.to_string();
        assert!(
            text.starts_with("cannot mount /tmp") && text.contains(": fsconfig create failed"),
            "{text}"
        );
    }
    let error = fault(&mounted.beside("none"), &mounted.data).to_string();
    assert!(error.ends_with("/none: open failed"), "{error}");
    let (detached, _) = attached(&mounted.beside("erofs"), &mounted);
    let error = detached.attach(&mounted.beside("none")).unwrap_err();
    assert!(matches!(error, MountError::Attach { .. }), "{error:?}");
}

/// One of several made at once, with its read-ahead set. Other tests mount in other processes, and then it is an error
/// that says so: the next one will do.
fn with_read_ahead(mounter: &Mounter, image: &Path, data: &File, kib: u32) -> Detached {
    for _ in 0..1000 {
        let detached = mounter.create(image, data.as_fd()).unwrap();
        match detached.read_ahead().set(kib) {
            Ok(()) => return detached,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error:?}"),
        }
    }
    panic!("never the only mount that appeared");
}

#[test]
fn privileged_read_ahead_is_set_on_each_of_many() {
    let mounted = Mounted::new(&everything().index());
    let image = mounted.beside("erofs");
    let mounter = Mounter::default();
    let values: Vec<u32> = (0..8).map(|at| 25_600 + 4 * at).collect();
    let made: Vec<Detached> = std::thread::scope(|scope| {
        let (mounter, image, data) = (&mounter, &image, &mounted.data);
        let start = |kib: &u32| {
            let kib = *kib;
            scope.spawn(move || with_read_ahead(mounter, image, data, kib))
        };
        let threads: Vec<_> = values.iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let devices = fs::read_dir("/sys/class/bdi")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let set: Vec<String> = devices
        .filter_map(|path| fs::read_to_string(path.join("read_ahead_kb")).ok())
        .collect();
    for kib in &values {
        let devices = set.iter().filter(|seen| seen.trim() == kib.to_string()).count();
        assert_eq!(devices, 1, "{kib} in {set:?}");
    }
    drop(made);
}
