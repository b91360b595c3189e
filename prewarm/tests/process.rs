//! The binary as an operator and a service manager meet it: exit codes, messages, inherited sockets, signals.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_hullspeed-prewarm");
const LIMIT: Duration = Duration::from_secs(20);

fn output(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// Runs the program, which has to end with `code` and one line that has `word` in it.
fn refused(arguments: &[&str], code: i32, word: &str) {
    let output = output(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?} wrote a result");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("hullspeed-prewarm: ") && said.contains(word), "{said}");
}

/// A directory with a configuration whose every path is in it.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        let at = |name: &str| place.path(name).display().to_string();
        let text = format!(
            "root = {:?}\nstate = {:?}\nsocket = {:?}\ncontrol_socket = {:?}\nstop_timeout = \"2s\"\n\
            metrics.address = \"\"\ncontainerd.address = {:?}\nwarm.snapshotter = {:?}\n",
            at("root"),
            at("state"),
            at("cri.sock"),
            at("control.sock"),
            at("containerd.sock"),
            at("snapshotter.sock"),
        );
        fs::write(place.path("prewarm.toml"), text).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn config(&self) -> String {
        self.path("prewarm.toml").display().to_string()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--config", &self.config()]).stdin(Stdio::null());
        command
    }
}

/// A daemon; killed if it is still there at the end.
struct Daemon(Child);

impl Daemon {
    fn start(command: &mut Command) -> Self {
        Self(command.stderr(Stdio::piped()).spawn().unwrap())
    }

    fn wait_for(&mut self, socket: &Path) {
        let end = Instant::now() + LIMIT;
        while UnixStream::connect(socket).is_err() {
            let ended = self.0.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < end, "{ended:?}: {:?}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// All log lines; only when it has ended, or the test fails anyway.
    fn said(&mut self) -> Vec<String> {
        let _ = self.0.kill();
        let log = BufReader::new(self.0.stderr.take().unwrap());
        log.lines().map(Result::unwrap).collect()
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        let status = self.0.wait().unwrap();
        assert!(status.success(), "{status}: {:?}", self.said());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn mistakes_are_one_line_each_and_code_64() {
    refused(&["--no-such-flag"], 64, "--no-such-flag");
    refused(&["pool", "fill"], 64, "fill");
    refused(&["--config", "/nonexistent/file.toml"], 64, "/nonexistent/file.toml");
    let place = Place::new();
    fs::write(place.path("prewarm.toml"), "[pool]\nmin = 5\nmax = 4\n").unwrap();
    for command in ["serve", "status", "check-config", "doctor"] {
        refused(
            &[command, "--config", &place.config()],
            64,
            "pool.min = 5 must be at most pool.max",
        );
    }
}

#[test]
fn commands_without_a_daemon_say_so() {
    let place = Place::new();
    for command in ["status", "pool", "drain"] {
        refused(&[command, "--config", &place.config()], 69, "control.sock");
    }
    let doctor = output(&["doctor", "--json", "--config", &place.config()]);
    assert_eq!(doctor.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    assert!(
        findings
            .iter()
            .any(|finding| finding["check"] == "containerd" && finding["level"] == "fail")
    );
}

#[test]
fn the_configuration_is_printed_whole() {
    let place = Place::new();
    let printed = output(&["check-config", "--config", &place.config(), "--log-format", "text"]);
    assert!(printed.status.success());
    let text = String::from_utf8(printed.stdout).unwrap();
    assert!(
        text.contains("format = \"text\"") && text.contains("refill_quiet = \"1s\""),
        "{text}"
    );
    fs::write(place.path("prewarm.toml"), &text).unwrap();
    let again = output(&["check-config", "--strict-config", "--config", &place.config()]);
    assert_eq!(String::from_utf8(again.stdout).unwrap(), text);
}

#[test]
fn the_daemon_answers_its_commands_and_tells_the_service_manager() {
    let place = Place::new();
    let notices = UnixDatagram::bind(place.path("notify.sock")).unwrap();
    notices.set_read_timeout(Some(LIMIT)).unwrap();
    let notice = || {
        let mut text = [0; 64];
        let length = notices.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    let daemon = Daemon::start(place.command().env("NOTIFY_SOCKET", place.path("notify.sock")));
    assert_eq!(notice(), "READY=1");
    // Ready means that nobody is refused.
    UnixStream::connect(place.path("cri.sock")).unwrap();
    let ask = |arguments: &[&str]| {
        let output = output(&[arguments, &["--json", "--config", &place.config()]].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        let lines: Vec<serde_json::Value> = output
            .stdout
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        lines
    };
    let status = &ask(&["status"])[0];
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["pool"]["handlers"][0]["max"], 10);
    // Without containerd nobody can tell whether hulls are left.
    let drained = ask(&["drain"]);
    assert_eq!((&drained[0]["left"], &drained[0]["done"]), (&0.into(), &false.into()));
    assert_eq!(ask(&["pool"])[0]["state"], "drained");
    assert_ne!(ask(&["pool", "resume"])[0]["state"], "drained");
    let text = output(&["status", "--config", &place.config()]);
    assert!(String::from_utf8(text.stdout).unwrap().contains("(default)"));

    let second = place.command().output().unwrap();
    assert_eq!(second.status.code(), Some(75), "{second:?}");
    daemon.stop();
    assert_eq!(notice(), "STOPPING=1");
    assert!(!place.path("cri.sock").exists() && !place.path("control.sock").exists());
}

#[test]
fn an_inherited_listener_is_served_and_outlives_the_daemon() {
    let place = Place::new();
    let socket = place.path("cri.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    // As systemd does it: descriptor 3, and the number of the very process that becomes the daemon.
    let script = format!(
        "exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=cri exec {PROGRAM} serve --config {}",
        listener.as_raw_fd(),
        place.config()
    );
    for _ in 0..2 {
        // A client that comes before the daemon waits for it.
        let early = UnixStream::connect(&socket).unwrap();
        let mut daemon = Daemon::start(Command::new("sh").args(["-c", &script]).stdin(Stdio::null()));
        daemon.wait_for(&place.path("control.sock"));
        answered(&early);
        daemon.stop();
        assert!(socket.exists(), "the service manager's socket is removed");
        assert!(!place.path("control.sock").exists());
    }
}

/// The relay speaks first: an HTTP/2 server sends its settings without being asked.
fn answered(mut client: &UnixStream) {
    use std::io::{Read as _, Write as _};
    client.set_read_timeout(Some(LIMIT)).unwrap();
    client
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .unwrap();
    let mut frame = [0; 9];
    client.read_exact(&mut frame).unwrap();
    assert_eq!(frame[3], 4, "not a settings frame: {frame:?}");
}
