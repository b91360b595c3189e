//! The binary's answer to what it cannot start with: the exit code of the documentation, a line per fault on stderr,
//! nothing on stdout, and no trace in the file system.
#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs the daemon, which has to end with `code`; the lines it said.
fn refused(arguments: &[&str], code: i32) -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_hullspeed-snapshotter"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(output.stdout.is_empty(), "{arguments:?} wrote a result");
    said.lines().map(str::to_owned).collect()
}

/// The only line, which has to hold each of `words`.
fn one_line(lines: &[String], words: &[&str]) {
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].starts_with("hullspeed-snapshotter: "), "{lines:?}");
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is not in {lines:?}");
    }
}

fn written(directory: &Path, text: &str) -> String {
    let path = directory.join("snapshotter.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn mistakes_on_the_command_line() {
    for (arguments, word) in [
        (&["--no-such-flag"][..], "--no-such-flag"),
        (&["check-config", "--log-format", "xml"], "xml"),
        (&["serfe"], "serfe"),
        (&["--config", "/nonexistent/file.toml"], "/nonexistent/file.toml"),
    ] {
        one_line(&refused(arguments, 64), &[word]);
    }
}

#[test]
fn mistakes_in_the_file() {
    let place = tempfile::tempdir().unwrap();
    let text = place.path().join("no.pem").display().to_string();
    fs::write(&text, "not PEM").unwrap();
    for command in ["serve", "check-config"] {
        let config = written(place.path(), "root = \n");
        one_line(
            &refused(&[command, "--config", &config], 64),
            &[&format!("{config}:1:8: ")],
        );
        for file in ["/nonexistent/ca.pem", &text] {
            let config = written(place.path(), &format!("[registry]\nca_file = {file:?}\n"));
            let lines = refused(&[command, "--config", &config], 64);
            one_line(&lines, &[&config, "registry.ca_file", file]);
        }
        let config = written(
            place.path(),
            "root = \"relative\"\n[log]\nformat = \"xml\"\n[registry]\nca_file = \"/nonexistent/ca.pem\"\n[fuse]\nworkers = 0\n",
        );
        let lines = refused(&[command, "--config", &config], 64);
        assert_eq!(lines.len(), 4, "{lines:#?}");
        for (line, key) in lines
            .iter()
            .zip(["root", "log.format", "registry.ca_file", "fuse.workers"])
        {
            assert!(line.contains(&format!("{config}: {key} = ")), "{lines:#?}");
        }
    }
}

#[test]
fn a_socket_in_use_leaves_no_root() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("socket");
    let _other = UnixListener::bind(&socket).unwrap();
    let root = place.path().join("new/root");
    let config = format!("root = {root:?}\nsocket = {socket:?}\n[layers]\nlazy = false\n[log]\nlevel = \"warn\"\n");
    let config = written(place.path(), &config);
    one_line(&refused(&["--config", &config], 75), &[socket.to_str().unwrap()]);
    assert!(!place.path().join("new").exists(), "the refused daemon left its root");
    assert!(socket.exists());
}
