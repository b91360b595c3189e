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
use hullspeed_tests::way::Way;
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

/// One line, besides the daemon's log, says all of `words`.
fn judge(output: &Output, code: i32, words: &[&str]) -> String {
    let faults = faults(output, code);
    let [line] = faults.as_slice() else {
        panic!("not one line: {faults:?}");
    };
    for word in words {
        assert!(line.contains(word), "{word:?} is not in {line:?}");
    }
    line.clone()
}

/// The lines of standard error of a program that failed with `code`, without the daemon's log and the lines that the
/// converter writes of each finished layer.
fn faults(output: &Output, code: i32) -> Vec<String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{}\n{said}", output.status);
    assert!(
        output.stdout.is_empty(),
        "results on standard output of a failure: {:?}",
        output.stdout
    );
    assert!(!said.contains("panicked"), "{said}");
    let is_log = |line: &&str| serde_json::from_str::<serde_json::Value>(line).is_ok_and(|value| value.is_object());
    let is_progress = |line: &&str| line.contains(" -> ") && line.contains(" sha256:") && line.ends_with(" s)");
    let lines = said.lines().filter(|line| !is_log(line) && !is_progress(line));
    lines.map(Into::into).collect()
}

/// Nothing came of a conversion: no target, and beside it nothing that was begun.
fn check_nothing_written(target: &Path) {
    assert!(!target.exists(), "a half image was left: {:?}", files(target));
    let beside = fs::read_dir(target.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let begun: Vec<_> = beside
        .filter(|name| name.to_string_lossy().starts_with(".estargz-"))
        .collect();
    assert!(begun.is_empty(), "{begun:?} was left beside {}", target.display());
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in fs::read_dir(directory)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
    {
        if path.is_dir() {
            found.extend(files(&path))
        } else {
            found.push(path)
        }
    }
    found
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
        check_nothing_written(&target);
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
        check_nothing_written(&target);
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
        check_nothing_written(&target);
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
        check_nothing_written(&target);
        assert_eq!(files(&disk.0), Vec::<PathBuf>::new());
    }
}

mod daemon {
    use super::*;

    /// A configuration file, and what the daemon should say of it.
    fn refused_config(text: &str, code: i32, words: &[&str]) -> String {
        judge(&run_config(text), code, words)
    }

    fn run_config(text: &str) -> Output {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapshotter.toml");
        fs::write(&path, text.replace("DIR", &directory.path().display().to_string())).unwrap();
        run_to_end(
            Command::new(programs::find(PROGRAM).unwrap())
                .arg("--config")
                .arg(&path),
        )
    }

    #[test]
    fn unknown_flag() {
        refused(PROGRAM, &["--no-such-flag"], 64, &["--no-such-flag"]);
    }

    #[test]
    fn three_mistakes_are_all_reported() {
        let text = "root = \"relative\"\nsocket = \"DIR/socket\"\n[log]\nformat = \"xml\"\n[fuse]\nworkers = 0\n";
        let output = run_config(text);
        let faults = faults(&output, 64);
        assert_eq!(faults.len(), 3, "not a line each: {faults:?}");
        for key in ["root", "log.format", "fuse.workers"] {
            let naming = faults.iter().filter(|line| line.contains(key)).count();
            assert_eq!(naming, 1, "{key} is named {naming} times: {faults:?}");
        }
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
        assert!(
            !run.path().join("other-root").exists(),
            "the refused daemon left the root that it made"
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
        // There is no EROFS over files of a tmpfs; whoever leaves the choice to the daemon gets FUSE.
        let choice = match Way::of_this_run().unwrap() {
            Way::Fuse => "",
            Way::Erofs => "[layers]\nmount = \"auto\"\n",
        };
        let mut node = scenario.lazy_node(choice).await.unwrap();
        if node.cri.pull(&scenario.reference(CONVERTED)).await.is_ok() {
            let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
            let read = fs::read(view.path().join(fixture::LARGE_FILE));
            match read {
                // What was read before made room for the rest.
                Ok(content) => assert!(content == fixture::large_content()),
                Err(error) => {
                    let expected = [rustix::io::Errno::IO, rustix::io::Errno::NOSPC];
                    assert!(
                        expected
                            .map(|errno| Some(errno.raw_os_error()))
                            .contains(&error.raw_os_error()),
                        "{error}"
                    );
                }
            }
            node.snapshots.remove(view).await.unwrap();
        }
        let snapshotter = node.snapshotter().unwrap();
        snapshotter.process().check_running().unwrap();
        let log = snapshotter.process().log_text().unwrap();
        assert!(!log.contains("panicked"), "{log}");
        // The fault that this test is about has been met, and a line says so.
        let evicted = snapshotter
            .metric("hullspeed_cache_evicted_bytes_total", &["kind=\"chunks\""])
            .await
            .unwrap();
        let failed_writes = snapshotter
            .metric("hullspeed_cache_write_errors_total", &[])
            .await
            .unwrap();
        let fallbacks = snapshotter
            .metric("hullspeed_snapshot_prepare_total", &["reason=\"cache_io\""])
            .await
            .unwrap();
        assert!(
            evicted + failed_writes + fallbacks > 0.0,
            "the disk never was full for the daemon:\n{log}"
        );
        let records = snapshotter.log_records().unwrap();
        let says_so = |record: &serde_json::Value| record["level"] == "WARN" && record["limit"] == "disk";
        assert!(records.iter().any(says_so), "no warning says so:\n{log}");
    }
}
