//! One connection, many processes: killed, left, and taken up again while it is used.
//!
//! The processes that serve are this test binary again, as [`serves_what_it_is_given`]. The test keeps the descriptor, as a
//! descriptor store would.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use fuse_session::forgetting::{Afterwards, Helpers};
use fuse_session::passthrough::{Backing, OpenModes, Passthrough};
use fuse_session::{DeviceNumber, End, MountConfig, MountError, Negotiated, Session};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, kill_process};

use super::memory::{Content, Kind, MemoryFs, Tree, pattern};
use super::{Mounted, directory, eventually, runtime, wait, within};

const TARGET: &str = "FUSE_SESSION_TEST_TARGET";
const KEPT: &str = "FUSE_SESSION_TEST_KEPT";
/// Node ids of [`tree`].
pub(crate) const LARGE: u64 = 2;
pub(crate) const PROGRAM_FILE: u64 = 3;
pub(crate) const FIRST_SMALL: u64 = 5;
const LAST_NODE: u64 = 1000;
const SMALL: usize = 120;
pub(crate) const LARGE_BYTES: usize = 12 << 20;
const PROGRAM: &str = "/usr/bin/sha256sum";

/// The same tree in every process; a file named `gate` beside the mount point lets the gated ones be read.
fn tree(target: &Path) -> MemoryFs {
    let mut tree = Tree::default();
    if backing(target).exists() {
        // Not what is to be read: that is in the backing files.
        tree.file(1, "large", vec![0; LARGE_BYTES]);
        let len = std::fs::metadata(backing(target).join(PROGRAM_FILE.to_string()))
            .unwrap()
            .len();
        tree.file(1, "program", vec![0; usize::try_from(len).unwrap()]);
    } else {
        tree.file(1, "large", pattern(LARGE_BYTES));
        tree.file(1, "program", std::fs::read(PROGRAM).unwrap());
    }
    tree.node(PROGRAM_FILE).mode = 0o755;
    let many = tree.add(1, "many", Kind::Directory(vec![]), 0o755);
    for index in 0..SMALL {
        tree.file(many, &format!("small-{index:03}"), pattern(1000 + index * 131));
    }
    let slow = Content::Slow(Duration::from_millis(15), pattern(300_000));
    tree.add(1, "slow", Kind::File(slow), 0o644);
    for index in 0..3 {
        let gated = Content::When(gate(target), pattern(50_000 + index));
        tree.add(1, &format!("gated-{index}"), Kind::File(gated), 0o644);
    }
    let mut fs = tree.build();
    fs.forgetful = true;
    fs
}

/// Files with the content of node ids, if there are any.
pub(crate) fn backing(target: &Path) -> PathBuf {
    target.with_file_name("backing")
}

struct BackingFiles(PathBuf);

impl Backing for BackingFiles {
    fn backing(&self, inode: u64) -> Option<OwnedFd> {
        File::open(self.0.join(inode.to_string())).ok().map(OwnedFd::from)
    }
}

fn passthrough(target: &Path, modes: &Arc<OpenModes>) -> Option<Passthrough> {
    let files = Arc::new(BackingFiles(backing(target)));
    files.0.exists().then(|| Passthrough::new(files, Arc::clone(modes)))
}

fn gate(target: &Path) -> PathBuf {
    target.with_file_name("gate")
}

fn report(target: &Path) -> PathBuf {
    target.with_file_name("report")
}

/// Not a test: what serves in a process of its own. Mounts, or resumes what it was given; ends itself gracefully when the file
/// `leave` appears beside the mount point.
#[test]
#[ignore = "the serving process of other tests"]
fn serves_what_it_is_given() {
    let Some(target) = std::env::var_os(TARGET).map(PathBuf::from) else {
        return;
    };
    let runtime = runtime();
    let mut config = MountConfig::new(runtime.handle().clone());
    config.worker_patience = Duration::from_millis(200);
    let modes;
    let session = match std::env::var(KEPT) {
        Err(_) => {
            modes = Arc::new(OpenModes::create(LAST_NODE).unwrap());
            config.passthrough = passthrough(&target, &modes);
            Session::mount(tree(&target), &target, config).unwrap()
        }
        Ok(kept) => {
            let words: Vec<&str> = kept.split(' ').collect();
            let (device, number) = (inherited(words[0]), DeviceNumber::from_bytes(&bytes(words[2])).unwrap());
            let negotiated = Negotiated::from_bytes(&bytes(words[3])).unwrap();
            modes = Arc::new(OpenModes::from_fd(inherited(words[1])).unwrap());
            config.passthrough = passthrough(&target, &modes);
            // Another configuration than the predecessor's.
            config.workers = config.workers.saturating_add(2);
            config.max_background = 16;
            Session::resume(tree(&target), device, &target, number, negotiated, config).unwrap()
        }
    };
    let kept = [hex(&session.device().to_bytes()), hex(&session.negotiated().to_bytes())].join(" ");
    let fresh = report(&target).with_extension("fresh");
    let numbers = [session.as_fd(), modes.as_fd()].map(|fd| fd.as_raw_fd());
    std::fs::write(&fresh, format!("{} {} {kept}", numbers[0], numbers[1])).unwrap();
    std::fs::rename(&fresh, report(&target)).unwrap();
    let [leave, forget] = ["leave", "forget"].map(|name| target.with_file_name(name));
    while !leave.exists() {
        std::thread::sleep(Duration::from_millis(2));
        if let Ok(order) = std::fs::read_to_string(&forget) {
            std::fs::remove_file(&forget).unwrap();
            let (inode, afterwards) = match order.split_once(' ').unwrap() {
                (inode, "resumed") => (inode.parse().unwrap(), Afterwards::Resumed),
                (inode, _) => (inode.parse().unwrap(), Afterwards::Over),
            };
            let notifier = session.notifier();
            std::thread::spawn(move || {
                let helpers = Helpers::new(helper, Duration::from_secs(60));
                helpers.forget_pages(&notifier, inode, 0..4096, afterwards)
            });
        }
    }
    let closed = session.closed();
    session.leave();
    assert_eq!(runtime.block_on(closed), End::Left);
}

/// Not a test: what has pages forgotten in the place of the serving process.
#[test]
#[ignore = "a helper of other tests"]
fn waits_for_another() -> std::process::ExitCode {
    fuse_session::forgetting::serve()
}

/// How that is started.
pub(crate) fn helper() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "succession::waits_for_another", "--ignored", "--nocapture"]);
    command
}

/// Helpers of this mount's serving process that wait in the kernel, where no signal reaches them.
fn helpers(target: &Path) -> usize {
    let processes = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let variable = format!("{TARGET}={}\0", target.display());
    let is_ours = |process: &PathBuf| {
        let command = std::fs::read_to_string(process.join("cmdline")).unwrap_or_default();
        let environment = std::fs::read_to_string(process.join("environ")).unwrap_or_default();
        command.contains("waits_for_another") && environment.contains(&variable)
    };
    let waits = |process: &PathBuf| {
        let threads = std::fs::read_dir(process.join("task")).into_iter().flatten().flatten();
        threads
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok())
            .any(|stat| stat.contains(") D "))
    };
    processes.filter(is_ours).filter(waits).count()
}

#[expect(unsafe_code, reason = "a descriptor that is inherited is known by its number")]
fn inherited(number: &str) -> OwnedFd {
    // SAFETY: the test that started this process left the descriptor open under this number, and nobody else here knows it.
    unsafe { OwnedFd::from_raw_fd(number.parse().unwrap()) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digit).collect()
}

/// A connection, its mount, and the process that serves it now.
pub(crate) struct Kept {
    device: OwnedFd,
    pub(crate) modes: OwnedFd,
    words: String,
    number: DeviceNumber,
    pub(crate) target: PathBuf,
    server: Option<Child>,
    _directory: tempfile::TempDir,
}

impl Kept {
    fn mount() -> Self {
        Self::mount_with(|_| {})
    }

    /// Mounts after `prepare` has seen the mount point.
    pub(crate) fn mount_with(prepare: impl FnOnce(&Path)) -> Self {
        let directory = directory();
        let target = directory.path().join("mnt");
        std::fs::create_dir(&target).unwrap();
        prepare(&target);
        let server = serve(&target, None);
        let report = reported(&target);
        let [device, modes, words] = split(&report);
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&server), PidfdFlags::empty()).unwrap();
        let taken = |number: &str| {
            let number = number.parse().unwrap();
            rustix::process::pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).unwrap()
        };
        let number = DeviceNumber::from_bytes(&bytes(words.split_once(' ').unwrap().0)).unwrap();
        Self {
            device: taken(device),
            modes: taken(modes),
            words: words.to_owned(),
            number,
            target,
            server: Some(server),
            _directory: directory,
        }
    }

    pub(crate) fn resume(&mut self) {
        // Without CLOEXEC, for the moment in which the process is made.
        let passed = [&self.device, &self.modes].map(|fd| rustix::io::dup(fd).unwrap());
        let numbers = passed.each_ref().map(|fd| fd.as_raw_fd());
        let kept = format!("{} {} {}", numbers[0], numbers[1], self.words);
        self.server = Some(serve(&self.target, Some(&kept)));
        let report = reported(&self.target);
        assert_eq!(split(&report)[2], self.words, "what is kept does not change");
    }

    pub(crate) fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        kill_process(Pid::from_child(&server), Signal::KILL).unwrap();
        wait(&mut server, Duration::from_secs(10)).expect("a killed process ends, whatever it was doing");
    }

    fn leave(&mut self) {
        let sign = self.target.with_file_name("leave");
        std::fs::write(&sign, "").unwrap();
        let status = wait(self.server.as_mut().unwrap(), Duration::from_secs(10)).expect("it leaves and ends");
        assert!(status.success(), "{status}");
        std::fs::remove_file(sign).unwrap();
        self.server = None;
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.target.join(name)
    }

    /// Requests the kernel holds for this connection, waiting or in flight.
    fn waiting(&self) -> usize {
        let context = rustix::mount::fsopen("fusectl", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        rustix::mount::fsconfig_create(context.as_fd()).unwrap();
        let (flags, attributes) = (
            rustix::mount::FsMountFlags::FSMOUNT_CLOEXEC,
            rustix::mount::MountAttrFlags::empty(),
        );
        let root = rustix::mount::fsmount(context.as_fd(), flags, attributes).unwrap();
        let path = format!("/proc/self/fd/{}/{}/waiting", root.as_raw_fd(), self.number.minor);
        std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.target, rustix::mount::UnmountFlags::DETACH);
        // Readers of a failed test are freed.
        let _ = self
            .device
            .try_clone()
            .map(|device| fuse_session::end(device, self.number));
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = wait(server, Duration::from_secs(5));
        }
    }
}

fn serve(target: &Path, kept: Option<&str>) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "succession::serves_what_it_is_given",
            "--ignored",
            "--nocapture",
        ])
        .env(TARGET, target)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if let Some(kept) = kept {
        command.env(KEPT, kept);
    }
    command.spawn().unwrap()
}

/// Numbers of two descriptors, and what is kept besides them.
fn split(report: &str) -> [&str; 3] {
    let parts: Vec<&str> = report.splitn(3, ' ').collect();
    parts.try_into().unwrap()
}

/// What the serving process says when it serves.
fn reported(target: &Path) -> String {
    let path = report(target);
    eventually("a report of the serving process", || path.exists());
    let report = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    report
}

/// Threads and processes that use the mount until they are told to stop; the first fault ends one.
struct Load {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    users: Vec<JoinHandle<Result<(), String>>>,
}

impl Load {
    fn start(target: &Path) -> Self {
        let mut load = Self {
            stop: Arc::default(),
            rounds: Arc::default(),
            users: Vec::new(),
        };
        for use_of in [read_all, read_all, read_slow, list_and_stat, list_and_stat, run_program] {
            let (stop, rounds, target) = (Arc::clone(&load.stop), Arc::clone(&load.rounds), target.to_owned());
            load.users.push(std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    use_of(&target)?;
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        load
    }

    fn is_well(&self) -> bool {
        !self.users.iter().any(JoinHandle::is_finished)
    }

    /// Ends all users; nobody may have seen a fault.
    fn finish(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let users = self.users;
        let outcomes = within(Duration::from_secs(30), move || {
            let joined = users.into_iter().map(|user| user.join().unwrap());
            joined.collect::<Vec<_>>()
        });
        for outcome in outcomes {
            outcome.unwrap();
        }
        self.rounds.load(Ordering::Relaxed)
    }
}

fn same(path: &Path, read: &[u8], expected: &[u8]) -> Result<(), String> {
    if read == expected {
        return Ok(());
    }
    let at = read.iter().zip(expected).position(|(left, right)| left != right);
    Err(format!("{}: {} bytes, wrong from {at:?}", path.display(), read.len()))
}

/// Opened, and nothing of it in the page cache.
pub(crate) fn opened(path: &Path) -> Result<File, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(failed)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).map_err(|error| failed(error.into()))?;
    Ok(file)
}

pub(crate) fn read_file(path: &Path, expected: &[u8]) -> Result<(), String> {
    let file = opened(path)?;
    let mut read = vec![0; expected.len() + 1];
    let mut len = 0;
    while len < expected.len() {
        let want = (len + 200_000).min(read.len());
        match file.read_at(&mut read[len..want], len as u64) {
            Ok(0) => break,
            Ok(got) => len += got,
            Err(error) => return Err(format!("{} at {len}: {error}", path.display())),
        }
    }
    same(path, &read[..len], expected)
}

fn read_all(target: &Path) -> Result<(), String> {
    let large = pattern(LARGE_BYTES);
    read_file(&target.join("large"), &large)?;
    for index in (0..SMALL).step_by(7) {
        let path = target.join(format!("many/small-{index:03}"));
        read_file(&path, &large[..1000 + index * 131])?;
    }
    Ok(())
}

fn read_slow(target: &Path) -> Result<(), String> {
    read_file(&target.join("slow"), &pattern(300_000))
}

fn list_and_stat(target: &Path) -> Result<(), String> {
    let many = target.join("many");
    let failed = |error: std::io::Error| format!("{}: {error}", many.display());
    let mut seen = 0;
    for entry in many.read_dir().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().into_string().unwrap();
        let index: u64 = name.strip_prefix("small-").unwrap().parse().unwrap();
        let meta = entry.path().symlink_metadata().map_err(failed)?;
        if meta.len() != 1000 + index * 131 {
            return Err(format!("{name} has {} bytes", meta.len()));
        }
        seen += 1;
    }
    let absent = target.join("nothing").symlink_metadata().map(drop);
    match absent.map_err(|error| error.kind()) {
        Err(std::io::ErrorKind::NotFound) if seen == SMALL => Ok(()),
        other => Err(format!("{seen} entries, absent name: {other:?}")),
    }
}

fn run_program(target: &Path) -> Result<(), String> {
    let program = target.join("program");
    drop(opened(&program)?);
    let sum = |program: &Path| {
        let output = Command::new(program).arg("large").current_dir(target).output();
        let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
        if !output.status.success() {
            return Err(format!("{}: {output:?}", program.display()));
        }
        Ok(output.stdout)
    };
    same(&program, &sum(&program)?, &sum(Path::new(PROGRAM))?)
}

#[test]
fn privileged_readers_do_not_notice_that_the_serving_process_is_killed_again_and_again() {
    let mut kept = Kept::mount();
    let load = Load::start(&kept.target);
    let mut in_flight = 0;
    for round in 0..25_u64 {
        // At all points of a round of requests.
        std::thread::sleep(Duration::from_millis(30 + round * 37 % 150));
        assert!(load.is_well(), "round {round}");
        kept.kill();
        in_flight += usize::from(kept.waiting() > 0);
        kept.resume();
    }
    let rounds = load.finish();
    assert!(
        rounds > 0 && in_flight > 12,
        "{rounds} rounds, {in_flight} kills with requests in flight"
    );
}

#[test]
fn privileged_readers_do_not_notice_that_a_serving_process_leaves() {
    let mut kept = Kept::mount();
    let load = Load::start(&kept.target);
    for round in 0..12_u64 {
        std::thread::sleep(Duration::from_millis(50 + round * 41 % 100));
        assert!(load.is_well(), "round {round}");
        kept.leave();
        kept.resume();
    }
    load.finish();
}

#[test]
fn privileged_what_waits_for_the_network_is_answered_by_the_successor() {
    let mut kept = Kept::mount();
    // Processes, not threads: one made from here while nobody serves would close what threads have open, and wait for that.
    let mut readers: Vec<_> = (0..3)
        .map(|index| super::spawn("/bin/cat", &kept.path(&format!("gated-{index}"))))
        .collect();
    eventually("three requests in flight", || kept.waiting() >= 3);
    kept.kill();
    assert!(kept.waiting() >= 3);
    kept.resume();
    // Resent, pending again, and still unanswered when that one goes as well.
    std::thread::sleep(Duration::from_millis(100));
    assert!(kept.waiting() >= 3 && readers.iter_mut().all(|reader| reader.try_wait().unwrap().is_none()));
    kept.leave();
    kept.resume();
    std::fs::write(gate(&kept.target), "").unwrap();
    for (index, reader) in readers.into_iter().enumerate() {
        let output = within(Duration::from_secs(10), move || reader.wait_with_output()).unwrap();
        assert!(output.status.success(), "{}", output.status);
        same(&kept.path("gated"), &output.stdout, &pattern(50_000 + index)).unwrap();
    }
    eventually("nothing in flight", || kept.waiting() == 0);
}

#[test]
fn privileged_a_caller_killed_while_nobody_serves_is_freed_by_the_successor() {
    let mut kept = Kept::mount();
    let mut reader = super::spawn("/bin/cat", &kept.path("gated-0"));
    eventually("a request in flight", || kept.waiting() >= 1);
    kept.kill();
    kill_process(Pid::from_child(&reader), Signal::KILL).unwrap();
    kept.resume();
    wait(&mut reader, Duration::from_secs(10)).expect("interrupts find resent requests");
    // The gate was never opened, and those who live are served.
    read_file(&kept.path("large"), &pattern(LARGE_BYTES)).unwrap();
}

/// A reader in flight, and somebody who waits for it to have its pages forgotten.
fn with_helper(kept: &Kept, afterwards: &str) -> Child {
    let path = kept.path("gated-0");
    let inode = std::os::unix::fs::MetadataExt::ino(&path.metadata().unwrap());
    let reader = super::spawn("/bin/cat", &path);
    eventually("a request in flight", || kept.waiting() >= 1);
    let order = kept.target.with_file_name("order");
    std::fs::write(&order, format!("{inode} {afterwards}")).unwrap();
    std::fs::rename(order, kept.target.with_file_name("forget")).unwrap();
    eventually("a helper that waits", || helpers(&kept.target) == 1);
    reader
}

#[test]
fn privileged_who_forgets_pages_that_are_being_read_can_be_killed_and_followed() {
    let mut kept = Kept::mount();
    let reader = with_helper(&kept, "resumed");
    // It ends, although the kernel waits for a page.
    kept.kill();
    assert_eq!(helpers(&kept.target), 1);
    kept.resume();
    std::fs::write(gate(&kept.target), "").unwrap();
    let output = within(Duration::from_secs(10), move || reader.wait_with_output()).unwrap();
    assert!(output.status.success(), "{}", output.status);
    same(&kept.path("gated"), &output.stdout, &pattern(50_000)).unwrap();
    eventually("the helper's end", || helpers(&kept.target) == 0);
}

#[test]
fn privileged_a_helper_does_not_keep_a_connection_that_nobody_follows() {
    let mut kept = Kept::mount();
    let reader = with_helper(&kept, "over");
    kept.kill();
    let output = within(Duration::from_secs(10), move || reader.wait_with_output()).unwrap();
    assert!(!output.status.success());
    eventually("the helper's end", || helpers(&kept.target) == 0);
}

#[test]
fn privileged_a_connection_that_cannot_be_taken_up_ends() {
    let mut kept = Kept::mount();
    let reader = super::spawn("/bin/cat", &kept.path("gated-0"));
    eventually("a request in flight", || kept.waiting() >= 1);
    kept.kill();
    let runtime = runtime();
    let words: Vec<&str> = kept.words.split(' ').collect();
    let mut fs = tree(&kept.target);
    fs.refuse_init = true;
    let config = MountConfig::new(runtime.handle().clone());
    let negotiated = Negotiated::from_bytes(&bytes(words[1])).unwrap();
    let device = kept.device.try_clone().unwrap();
    let error = Session::resume(fs, device, &kept.target, kept.number, negotiated, config).unwrap_err();
    assert!(matches!(error, MountError::Handshake { .. }), "{error}");
    // Who waits gets an error, and so does who comes, although there is another descriptor.
    let output = within(Duration::from_secs(10), move || reader.wait_with_output()).unwrap();
    assert!(!output.status.success());
    let target = kept.target.clone();
    let asked = within(Duration::from_secs(10), move || target.join("large").metadata());
    assert_eq!(asked.unwrap_err().raw_os_error(), Some(libc::ENOTCONN));
}

#[test]
fn privileged_a_session_can_be_left_and_taken_up_in_one_process() {
    let mut mounted = Mounted::with(tree(Path::new("/nowhere/mnt")), |config| {
        config.workers = config.workers.saturating_add(4)
    });
    let root = mounted.root().to_owned();
    let load = Load::start(&root);
    for round in 0..12 {
        std::thread::sleep(Duration::from_millis(60));
        assert!(load.is_well(), "round {round}");
        let session = mounted.session.take().unwrap();
        let (number, negotiated) = (session.device(), *session.negotiated());
        let device = session.as_fd().try_clone_to_owned().unwrap();
        let closed = session.closed();
        session.leave();
        assert_eq!(mounted.runtime.block_on(closed), End::Left);
        let config = MountConfig::new(mounted.runtime.handle().clone());
        let fs = tree(Path::new("/nowhere/mnt"));
        mounted.session = Some(Session::resume(fs, device, &root, number, negotiated, config).unwrap());
    }
    load.finish();
    assert!(mounted.session().is_shown());
    rustix::mount::unmount(&root, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(!mounted.session().is_shown());
    let session = mounted.session.take().unwrap();
    within(Duration::from_secs(20), move || session.unmount()).unwrap();
    assert!(!super::is_mounted(&root));
}

#[test]
fn privileged_what_is_handed_over_is_examined() {
    let (mounted, other) = (Mounted::new(tree(Path::new("/"))), Mounted::new(tree(Path::new("/"))));
    let resume = |device: OwnedFd, target: &Path, of: &Mounted| {
        let (number, negotiated) = (of.session().device(), *of.session().negotiated());
        let config = MountConfig::new(of.runtime.handle().clone());
        Session::resume(tree(target), device, target, number, negotiated, config).unwrap_err()
    };
    let device = |of: &Mounted| of.session().as_fd().try_clone_to_owned().unwrap();
    let file = OwnedFd::from(File::open("/etc/passwd").unwrap());
    assert!(matches!(resume(file, mounted.root(), &mounted), MountError::Kept(_)));
    let fresh = OwnedFd::from(File::options().read(true).write(true).open("/dev/fuse").unwrap());
    assert!(matches!(resume(fresh, mounted.root(), &mounted), MountError::Kept(_)));
    assert!(matches!(
        resume(device(&other), mounted.root(), &mounted),
        MountError::Kept(_)
    ));
    drop(other);
    // A connection that is over.
    let kept = device(&mounted);
    fuse_session::end(device(&mounted), mounted.session().device()).unwrap();
    assert!(matches!(resume(kept, mounted.root(), &mounted), MountError::Kept(_)));
}
