//! Each kind of bad input ends in one clear line and a documented exit code, and leaves nothing half-written.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::run::RunDir;
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use hullspeed_tests::snapshotter::{PROGRAM, Snapshotter};
use hullspeed_tests::{fixture, programs, requirements};

/// No refusal takes longer.
const LIMIT: Duration = Duration::from_secs(30);

fn run_to_end(command: &mut Command) -> Output {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let end = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("{command:?} did not end: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

/// Runs a program that has to fail with `code`, saying each of `words`; returns its standard error.
fn refused(program: &str, arguments: &[&str], code: i32, words: &[&str]) -> String {
    let output = run_to_end(Command::new(programs::find(program).unwrap()).args(arguments));
    judge(&output, code, words)
}

fn judge(output: &Output, code: i32, words: &[&str]) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{}\n{said}", output.status);
    assert!(
        output.stdout.is_empty(),
        "results on standard output of a failure: {:?}",
        output.stdout
    );
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in:\n{said}");
    }
    said
}

/// A small file system that is full.
struct FullDisk(PathBuf);

impl FullDisk {
    fn mount(run: &RunDir, size: &str) -> Self {
        let path = run.directory("full").unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&path)
            .status();
        assert!(status.unwrap().success());
        Self(path)
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

mod converter {
    use super::*;

    #[test]
    fn unknown_flag() {
        refused(
            "estargz",
            &["convert", "--no-such-flag", "oci:a", "oci:b"],
            2,
            &["--no-such-flag"],
        );
    }

    #[test]
    fn unknown_transport() {
        refused("estargz", &["convert", "ftp://host/image", "oci:b"], 2, &["ftp"]);
        refused("estargz", &["convert", "oci:a", "tarball:b"], 2, &["tarball"]);
    }

    #[test]
    fn missing_source() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let arguments = [
            "convert",
            "oci:/nonexistent/layout",
            &format!("oci:{}", target.display()),
        ];
        refused("estargz", &arguments, 3, &["/nonexistent/layout"]);
        assert!(!target.exists(), "something was written");
    }

    #[test]
    fn missing_blob() {
        let directory = tempfile::tempdir().unwrap();
        let (layout, target) = (directory.path().join("layout"), directory.path().join("out"));
        let layers = fixture::build(&layout, b"program").unwrap();
        let digest = &layers[1].blob.digest;
        fs::remove_file(hullspeed_tests::layout::blob_path(&layout, digest)).unwrap();
        let (source, goal) = (
            format!("oci:{}:{}", layout.display(), fixture::TAG),
            format!("oci:{}", target.display()),
        );
        let hex = digest.strip_prefix("sha256:").unwrap();
        refused("estargz", &["convert", &source, &goal], 3, &[hex]);
        assert!(!target.join("index.json").exists(), "a half image was left");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn unauthorised_registry() {
        let scenario = Scenario::fixture().await.unwrap();
        scenario.proxy.inject(FaultRule {
            method: None,
            ..FaultRule::get("/v2/", Fault::Status(401))
        });
        let source = format!("docker://{}", scenario.plain_reference());
        let host = scenario.proxy.address().to_string();
        let target = scenario.run.path().join("out");
        refused(
            "estargz",
            &["convert", &source, &format!("oci:{}", target.display())],
            3,
            &[&host],
        );
        assert!(!target.join("index.json").exists());
    }

    #[test]
    fn full_disk() {
        requirements::check().unwrap();
        let run = RunDir::temporary().unwrap();
        let layout = run.path().join("layout");
        fixture::build(&layout, b"program").unwrap();
        let disk = FullDisk::mount(&run, "1m");
        let target = disk.0.join("out");
        let (source, goal) = (
            format!("oci:{}:{}", layout.display(), fixture::TAG),
            format!("oci:{}", target.display()),
        );
        refused(
            "estargz",
            &["convert", &source, &goal],
            5,
            &[&disk.0.display().to_string()],
        );
        assert!(!target.join("index.json").exists(), "a half image was left");
        let left: u64 = files(&disk.0)
            .iter()
            .map(|path| fs::metadata(path).unwrap().len())
            .sum();
        assert!(left < 100_000, "{left} bytes were left: {:?}", files(&disk.0));
    }

    fn files(directory: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(files(&path))
            } else {
                found.push(path)
            }
        }
        found
    }
}

mod daemon {
    use super::*;

    /// A configuration file, and what the daemon should say of it.
    fn refused_config(text: &str, code: i32, words: &[&str]) -> String {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapshotter.toml");
        fs::write(&path, text.replace("DIR", &directory.path().display().to_string())).unwrap();
        refused(PROGRAM, &["--config", path.to_str().unwrap()], code, words)
    }

    #[test]
    fn unknown_flag() {
        refused(PROGRAM, &["--no-such-flag"], 64, &["--no-such-flag"]);
    }

    #[test]
    fn three_mistakes_are_all_reported() {
        let text = "root = \"relative\"\nsocket = \"DIR/socket\"\n[log]\nformat = \"xml\"\n[fuse]\nworkers = 0\n";
        let said = refused_config(text, 64, &["root", "log.format", "fuse.workers"]);
        assert!(said.lines().count() <= 5, "more than a line each:\n{said}");
    }

    #[test]
    fn not_toml() {
        refused_config("root = \n", 64, &["snapshotter.toml"]);
    }

    #[test]
    fn missing_config_file() {
        refused(
            PROGRAM,
            &["--config", "/nonexistent/file.toml"],
            64,
            &["/nonexistent/file.toml"],
        );
    }

    #[test]
    fn unwritable_root() {
        refused_config(
            "root = \"/proc/nowhere\"\nsocket = \"DIR/socket\"\n",
            73,
            &["/proc/nowhere"],
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn second_daemon_and_socket_in_use() {
        requirements::check().unwrap();
        let run = RunDir::temporary().unwrap();
        let first = Snapshotter::start(&run, "first", "").await.unwrap();
        let config = |root: PathBuf, socket: PathBuf| {
            let path = run.path().join("second.toml");
            let text = format!("root = {root:?}\nsocket = {socket:?}\n[metrics]\naddress = \"127.0.0.1:0\"\n");
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let same_root = config(first.root(), run.path().join("other.sock"));
        refused(
            PROGRAM,
            &["--config", &same_root],
            75,
            &[&first.root().display().to_string()],
        );
        assert!(
            !run.path().join("other.sock").exists(),
            "the refused daemon left its socket"
        );
        let same_socket = config(run.path().join("other-root"), first.socket());
        refused(
            PROGRAM,
            &["--config", &same_socket],
            75,
            &[&first.socket().display().to_string()],
        );
        // The first one is unharmed.
        std::os::unix::net::UnixStream::connect(first.socket()).unwrap();
        assert!(first.metrics().await.unwrap().contains("hullspeed"));
    }

    /// A socket file that a killed daemon left is no obstacle.
    #[tokio::test(flavor = "multi_thread")]
    async fn stale_socket_is_replaced() {
        requirements::check().unwrap();
        let run = RunDir::temporary().unwrap();
        let mut daemon = Snapshotter::start(&run, "daemon", "").await.unwrap();
        daemon.process().kill().unwrap();
        assert!(daemon.socket().exists());
        daemon.start_again(&run).await.unwrap();
    }

    #[test]
    fn no_fuse_device() {
        requirements::check().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("snapshotter.toml");
        let (root, socket) = (directory.path().join("root"), directory.path().join("socket"));
        fs::write(&config, format!("root = {root:?}\nsocket = {socket:?}\n")).unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev && exec \"$@\"", "sh"]);
        command
            .arg(programs::find(PROGRAM).unwrap())
            .arg("--config")
            .arg(&config);
        judge(&run_to_end(&mut command), 69, &["/dev/fuse"]);
        assert!(!socket.exists());
    }

    #[test]
    fn full_disk_at_start() {
        requirements::check().unwrap();
        let run = RunDir::temporary().unwrap();
        let disk = FullDisk::mount(&run, "64k");
        assert!(fs::write(disk.0.join("filler"), vec![1; 1 << 20]).is_err());
        let root = disk.0.join("root");
        let config = run.path().join("snapshotter.toml");
        fs::write(
            &config,
            format!("root = {root:?}\nsocket = {:?}\n", run.path().join("socket")),
        )
        .unwrap();
        refused(
            PROGRAM,
            &["--config", &config.display().to_string()],
            73,
            &[&root.display().to_string()],
        );
    }

    /// A cache that runs full later: the pull fails or falls back, the daemon lives and says where.
    #[tokio::test(flavor = "multi_thread")]
    async fn full_disk_at_work() {
        let scenario = Scenario::fixture().await.unwrap();
        let root = scenario.run.directory("snapshotter/root").unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
            .arg(&root)
            .status();
        assert!(status.unwrap().success());
        let mut node = scenario.lazy_node("").await.unwrap();
        if node.cri.pull(&scenario.reference(CONVERTED)).await.is_ok() {
            let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
            let error = fs::read(view.path().join(fixture::LARGE_FILE)).unwrap_err();
            let expected = [rustix::io::Errno::IO, rustix::io::Errno::NOSPC].map(|errno| Some(errno.raw_os_error()));
            assert!(expected.contains(&error.raw_os_error()), "{error}");
            node.snapshots.remove(view).await.unwrap();
        }
        let snapshotter = node.snapshotter().unwrap();
        snapshotter.process().check_running().unwrap();
        let log = snapshotter.process().log_text().unwrap();
        assert!(
            log.lines().any(|line| line.contains(&root.display().to_string())),
            "the log does not say where:\n{log}"
        );
        assert!(!log.contains("panicked"), "{log}");
    }
}
