//! `doctor`: looks at everything the daemon depends on and says, for each thing, how it is and what to do.
//!
//! It changes nothing, works with and without a running daemon, and every question to somebody else has a limit.

use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::config::Config;

mod containerd;
mod hulls;
mod kubelet;
mod node;
mod sockets;
#[cfg(test)]
mod tests;

/// Limit on one question to another process.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could, or it is not known.
    Warn,
    /// Broken.
    Fail,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    check: &'static str,
    /// How it is.
    level: Level,
    /// The same in a sentence.
    says: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Default, Serialize)]
struct Report {
    findings: Vec<Finding>,
}

impl Report {
    fn add(&mut self, check: &'static str, level: Level, says: impl Into<String>, advice: Option<String>) {
        self.findings.push(Finding {
            check,
            level,
            says: one_line(&says.into()),
            advice,
        });
    }

    fn ok(&mut self, check: &'static str, says: impl Into<String>) {
        self.add(check, Level::Ok, says, None);
    }

    fn warn(&mut self, check: &'static str, says: impl Into<String>, advice: impl Into<String>) {
        self.add(check, Level::Warn, says, Some(advice.into()));
    }

    fn fail(&mut self, check: &'static str, says: impl Into<String>, advice: impl Into<String>) {
        self.add(check, Level::Fail, says, Some(advice.into()));
    }

    fn is_broken(&self) -> bool {
        self.findings.iter().any(|finding| finding.level == Level::Fail)
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        for Finding {
            check,
            level,
            says,
            advice,
        } in &self.findings
        {
            // Writing to a string never fails.
            let _ = writeln!(text, "{:<5} {check:<12} {says}", level.name());
            if let Some(advice) = advice {
                let _ = writeln!(text, "{:19}→ {advice}", "");
            }
        }
        text
    }
}

/// What others say is shown in one line, whatever is in it, and without codes that a terminal would obey.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Where things are on a node; tests have them elsewhere.
#[derive(Debug, Clone)]
struct Places {
    proc: PathBuf,
    kubelet: PathBuf,
    cgroup: PathBuf,
    selinux: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            kubelet: "/var/lib/kubelet".into(),
            cgroup: "/sys/fs/cgroup".into(),
            selinux: "/sys/fs/selinux".into(),
        }
    }
}

/// Looks at this node and prints what it finds.
pub async fn run(config: &Config, json: bool, out: &mut dyn Write) -> ExitCode {
    let report = examine(config, &Places::default()).await;
    let printed = if json {
        serde_json::to_writer(&mut *out, &report)
            .map_err(std::io::Error::from)
            .and_then(|()| writeln!(out))
    } else {
        out.write_all(report.to_text().as_bytes())
    };
    if printed.is_err() || report.is_broken() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

async fn examine(config: &Config, places: &Places) -> Report {
    let mut report = Report::default();
    node::examine(config, places, &mut report);
    let facts = containerd::examine(config, &mut report).await;
    if let Some(facts) = &facts {
        node::examine_cgroup(config, places, facts.systemd_cgroup, &mut report);
    }
    let daemon = sockets::examine(config, places, &mut report).await;
    kubelet::examine(config, places, &mut report);
    hulls::examine(config, facts.is_some(), daemon, &mut report).await;
    report
}
