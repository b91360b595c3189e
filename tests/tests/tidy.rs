//! House rules that no lint knows.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};

/// Most lines of production code in a file.
const MAX_PRODUCTION_LINES: usize = 500;

/// Most lines of a file in all, its unit tests included.
const MAX_LINES: usize = 800;

/// Names that say nothing about what is in a module.
const BANNED_NAMES: [&str; 8] = ["utils", "util", "helpers", "helper", "misc", "manager", "stuff", "mod"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .canonicalize()
        .unwrap()
}

fn crates() -> Vec<PathBuf> {
    let entries = fs::read_dir(workspace()).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries.filter(|path| path.join("Cargo.toml").is_file()).collect();
    found.sort();
    assert!(found.len() >= 6, "crates are missing: {found:?}");
    found
}

fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut stack: Vec<_> = crates()
        .into_iter()
        .flat_map(|path| ["src", "tests", "benches", "examples", "fuzz"].map(|name| path.join(name)))
        .collect();
    while let Some(directory) = stack.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                stack.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(workspace()).unwrap().display().to_string()
}

fn check(rule: &str, faults: Vec<String>) {
    assert!(faults.is_empty(), "{rule}:\n  {}", faults.join("\n  "));
}

/// Whether a file is below the directory `tests` of a crate; the crate `tests` itself is code as any other.
fn is_integration_test(path: &Path) -> bool {
    path.strip_prefix(workspace()).unwrap().iter().nth(1).unwrap() == "tests"
}

/// Whether a line begins a function called `get_…` that others see.
fn is_getter(line: &str) -> bool {
    let Some(rest) = line.trim_start().strip_prefix("pub") else {
        return false;
    };
    let rest = match rest.strip_prefix('(') {
        Some(scope) => scope.split_once(')').map_or("", |(_, rest)| rest),
        None => rest,
    };
    let mut words = rest
        .split_whitespace()
        .skip_while(|word| ["const", "async", "unsafe"].contains(word));
    words.next() == Some("fn") && words.next().is_some_and(|name| name.starts_with("get_"))
}

#[test]
fn files_are_short() {
    let faults = sources().into_iter().filter_map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().count();
        let tests_only = path.file_name().unwrap() == "tests.rs" || is_integration_test(&path);
        let production = text.lines().position(|line| line == "#[cfg(test)]").unwrap_or(lines);
        if !tests_only && production > MAX_PRODUCTION_LINES {
            return Some(format!(
                "{}: {production} lines of production code, at most {MAX_PRODUCTION_LINES}",
                shown(&path)
            ));
        }
        (lines > MAX_LINES).then(|| format!("{}: {lines} lines, at most {MAX_LINES}", shown(&path)))
    });
    check("long files", faults.collect());
}

#[test]
fn modules_say_what_they_are_for() {
    let undocumented = |path: &PathBuf| {
        let text = fs::read_to_string(path).unwrap();
        let first = text.lines().find(|line| !line.trim().is_empty());
        !first.is_some_and(|line| line.starts_with("//!"))
    };
    check(
        "no `//!` at the top",
        sources()
            .into_iter()
            .filter(undocumented)
            .map(|path| shown(&path))
            .collect(),
    );
}

#[test]
fn names_say_something() {
    let banned = |path: &PathBuf| {
        let parts = path
            .strip_prefix(workspace())
            .unwrap()
            .iter()
            .map(|part| part.to_string_lossy().into_owned());
        parts
            .map(|part| part.trim_end_matches(".rs").to_string())
            .any(|part| BANNED_NAMES.contains(&part.as_str()))
    };
    check(
        "names that say nothing",
        sources().into_iter().filter(banned).map(|path| shown(&path)).collect(),
    );
}

#[test]
fn every_crate_takes_the_shared_lints() {
    let faults = crates().into_iter().filter(|path| {
        let text = fs::read_to_string(path.join("Cargo.toml")).unwrap();
        !text.contains("[lints]\nworkspace = true")
    });
    check(
        "no `[lints] workspace = true`",
        faults.map(|path| shown(&path)).collect(),
    );
}

#[test]
fn accessors_are_not_called_get() {
    for getter in [
        "pub fn get_a(&self)",
        "    pub(crate) async fn get_b()",
        "pub(in crate::x) const unsafe fn get_c<T>()",
    ] {
        assert!(is_getter(getter), "{getter}");
    }
    for other in [
        "pub fn getter()",
        "fn get_private()",
        "pub struct get_x",
        "pub fn x() { fn get_y() {} }",
    ] {
        assert!(!is_getter(other), "{other}");
    }
    let faults = sources().into_iter().flat_map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text
            .lines()
            .enumerate()
            .map(|(number, line)| (number + 1, line.to_string()))
            .collect();
        let getters = lines.into_iter().filter(|(_, line)| is_getter(line));
        getters
            .map(move |(number, line)| format!("{}:{number}: {}", shown(&path), line.trim()))
            .collect::<Vec<_>>()
    });
    check("getters", faults.collect());
}
