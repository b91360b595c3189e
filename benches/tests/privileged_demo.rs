//! The demo as `make demo` runs it: its figures, its verdict, and that nothing of it stays behind.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use hullspeed_benches::report::{PROMISED_RATIO_TOTAL, PROMISED_SANDBOX_SHARE, PROMISED_WIRE_SHARE};
use hullspeed_tests::demo_image::{self, DemoImage};
use hullspeed_tests::requirements;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::sweep::{RunNames, mounts_below};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// Keys of each mode in result.json.
const KEYS: [&str; 8] = [
    "create_ms",
    "first_200_ms",
    "pull_ms",
    "requests",
    "sandbox_ms",
    "start_ms",
    "total_ms",
    "wire_bytes",
];

/// A directory for one demo, with the image that other tests and `make demo` use.
async fn directory() -> tempfile::TempDir {
    requirements::check().unwrap();
    let run = RunDir::temporary().unwrap();
    let image = DemoImage::cached(&run, &demo_image::shared_cache()).await.unwrap();
    let cached = image.layout.parent().unwrap().canonicalize().unwrap();
    // Short, for Unix sockets have to fit below it.
    let directory = tempfile::Builder::new().prefix("hs-demo-").tempdir_in("/tmp").unwrap();
    std::os::unix::fs::symlink(&cached, directory.path().join(cached.file_name().unwrap())).unwrap();
    directory
}

/// A demo under way; one that a failing test leaves is interrupted.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = rustix::process::kill_process(self.pid(), Signal::TERM);
            let _ = self.0.wait();
        }
    }
}

impl Demo {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap()).unwrap()
    }
}

/// Starts the demo, a process group of its own as in a terminal. Its standard output goes to a file, for a pipe that
/// nobody reads would stop it.
fn startup(directory: &Path, rounds: u32) -> Demo {
    let child = Command::new(env!("CARGO_BIN_EXE_startup"))
        .arg("--directory")
        .arg(directory)
        .args(["--rounds", &rounds.to_string()])
        .stdin(Stdio::null())
        .stdout(File::create(directory.join("stdout")).unwrap())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    Demo(child)
}

/// Of the run below `directory` nothing is left: no directory, no lock, no process, no mount, no bridge, no cgroup.
fn check_nothing_is_left(directory: &Path) {
    let run: PathBuf = directory.canonicalize().unwrap().join("run");
    assert!(!run.exists(), "{:?} is left", fs::read_dir(&run).map(Iterator::count));
    assert!(!run.with_extension("lock").exists(), "the lock is left");
    assert_eq!(mounts_below(&run).unwrap(), Vec::<PathBuf>::new());
    let names = RunNames::new(&run);
    assert!(!Path::new("/sys/class/net").join(&names.bridge).exists());
    let hierarchies = fs::read_dir("/sys/fs/cgroup")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    for hierarchy in hierarchies.chain([PathBuf::from("/sys/fs/cgroup")]) {
        assert!(
            !hierarchy.join(&names.cgroup).exists(),
            "{} is left",
            hierarchy.display()
        );
    }
    let mark = format!("HULLSPEED_RUN_DIR={}", run.display());
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let environment = fs::read(process.path().join("environ")).unwrap_or_default();
        let marked = environment
            .split(|&byte| byte == 0)
            .any(|variable| variable == mark.as_bytes());
        assert!(!marked, "{} still runs", process.path().display());
    }
}

/// One round of each: the bytes keep their promise, and the demo's own verdict is what its figures say. The ratio of
/// the times is the demo's to judge: this machine may be busy with other tests, and these binaries are not optimised.
#[tokio::test(flavor = "multi_thread")]
async fn a_demo_reports_its_figures_and_judges_them() {
    let directory = directory().await;
    fs::write(directory.path().join("result.json"), "of an earlier demo").unwrap();
    let mut demo = startup(directory.path(), 1);
    let said = std::io::read_to_string(demo.0.stderr.take().unwrap()).unwrap();
    let status = demo.0.wait().unwrap();
    let text =
        fs::read_to_string(directory.path().join("result.json")).unwrap_or_else(|error| panic!("{error}:\n{said}"));
    let result: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}\n{said}"));
    // In which order is no promise.
    let keys = |value: &Value| {
        let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    assert_eq!(
        keys(&result),
        ["compressed_bytes", "modes", "ratio_total", "ratio_total_hulls"]
    );
    assert_eq!(keys(&result["modes"]), ["hulls", "hullspeed", "overlayfs"]);
    for mode in ["hullspeed", "hulls", "overlayfs"] {
        assert_eq!(keys(&result["modes"][mode]), KEYS);
        for key in KEYS {
            assert!(
                result["modes"][mode][key].as_f64().unwrap() > 0.0,
                "{mode}.{key} in {text}"
            );
        }
    }
    let compressed = result["compressed_bytes"].as_f64().unwrap();
    let wire = |mode: &str| result["modes"][mode]["wire_bytes"].as_f64().unwrap();
    assert!(wire("hullspeed") < PROMISED_WIRE_SHARE * compressed, "{text}");
    assert!(wire("overlayfs") >= compressed, "{text}");
    let total = |mode: &str| result["modes"][mode]["total_ms"].as_f64().unwrap();
    let ratio = result["ratio_total"].as_f64().unwrap();
    assert!((ratio - total("hullspeed") / total("overlayfs")).abs() < 1e-3, "{text}");
    let ratio_hulls = result["ratio_total_hulls"].as_f64().unwrap();
    assert!(
        (ratio_hulls - total("hulls") / total("overlayfs")).abs() < 1e-3,
        "{text}"
    );

    let sandbox = |mode: &str| result["modes"][mode]["sandbox_ms"].as_f64().unwrap();
    let share = sandbox("hulls") / sandbox("hullspeed");

    let last = said.lines().last().unwrap_or_default();
    if ratio < PROMISED_RATIO_TOTAL && ratio_hulls < PROMISED_RATIO_TOTAL && share < PROMISED_SANDBOX_SHARE {
        assert_eq!(status.code(), Some(0), "{said}");
        assert!(!said.contains("error:"), "{said}");
    } else {
        assert_eq!(status.code(), Some(1), "{said}");
        assert!(last.starts_with("error: a promise is missed: "), "{said}");
    }
    let table = fs::read_to_string(directory.path().join("stdout")).unwrap();
    assert!(table.contains("total, ms") && table.contains("written: "), "{table}");
    check_nothing_is_left(directory.path());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_demo_leaves_nothing_and_can_run_again() {
    for (signal, begun) in [(Signal::INT, "round 1"), (Signal::HUP, "image: ")] {
        let directory = directory().await;
        let mut demo = startup(directory.path(), 1000);
        let mut lines = BufReader::new(demo.0.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        while !said.last().is_some_and(|line: &String| line.starts_with(begun)) {
            match lines.next() {
                Some(line) => said.push(line.unwrap()),
                None => panic!("{begun:?} did not come: {said:?}"),
            }
        }
        rustix::process::kill_process(demo.pid(), signal).unwrap();
        let rest: Vec<_> = lines.map(Result::unwrap).collect();
        assert_eq!(demo.0.wait().unwrap().code(), Some(130), "{rest:?}");
        assert!(rest.contains(&"interrupted: cleaning up".to_string()), "{rest:?}");
        assert!(
            !rest
                .iter()
                .any(|line| line.contains("warning") || line.contains("panicked")),
            "{rest:?}"
        );
        check_nothing_is_left(directory.path());
        assert!(!directory.path().join("result.json").exists());
        // Nothing is in the way of the next one.
        drop(RunDir::open_near(&directory.path().join("run")).unwrap());
        check_nothing_is_left(directory.path());
    }
}
