//! What an operator asks of a running snapshotter, with its command line.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::snapshotter;

/// What a command answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// Its exit code.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub error: String,
}

/// Runs the command line against the daemon of this configuration.
pub fn said(config: &Path, arguments: &[&str]) -> Result<Said> {
    let output = snapshotter::command(config)?.args(arguments).output()?;
    Ok(Said {
        code: output.status.code().context("it was killed")?,
        out: String::from_utf8(output.stdout)?,
        error: String::from_utf8(output.stderr)?,
    })
}

/// The answer of a command that has to succeed.
pub fn answer(config: &Path, arguments: &[&str]) -> Result<Value> {
    let Said { code, out, error } = said(config, &[arguments, &["--json"]].concat())?;
    ensure!(code == 0, "{arguments:?}: {code}: {error}");
    ensure!(out.lines().count() == 1, "{arguments:?}: {out}");
    Ok(serde_json::from_str(&out)?)
}

/// What is said of a subject that has to be the only one of its name.
pub fn explained(config: &Path, subject: &str) -> Result<Value> {
    let mut answer = answer(config, &["explain", subject])?;
    let found = answer["found"].as_array_mut().context("nothing was found")?;
    ensure!(found.len() == 1, "{subject}: {found:#?}");
    Ok(found.remove(0))
}
