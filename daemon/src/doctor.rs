//! What the `doctor` commands have in common: findings, how they are shown, and looks at what both daemons stand on.
//!
//! A doctor looks at everything its daemon depends on and says, for each thing, how it is and what to do. It changes nothing, works with
//! and without a running daemon, and every question to somebody else has a limit.

pub mod containerd;
pub mod machine;
pub mod processes;

use std::fmt::Write as _;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::answer::Form;

/// Limit on one question to another process.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
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
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it is.
    pub level: Level,
    /// The same in a sentence.
    pub says: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// In the order in which it was.
    pub findings: Vec<Finding>,
}

impl Report {
    fn add(&mut self, check: &'static str, level: Level, says: impl Into<String>, advice: Option<String>) {
        self.findings.push(Finding {
            check,
            level,
            says: one_line(&says.into()),
            advice: advice.map(|advice| one_line(&advice)),
        });
    }

    /// Something is as it should be.
    pub fn ok(&mut self, check: &'static str, says: impl Into<String>) {
        self.add(check, Level::Ok, says, None);
    }

    /// Something could be better.
    pub fn warn(&mut self, check: &'static str, says: impl Into<String>, advice: impl Into<String>) {
        self.add(check, Level::Warn, says, Some(advice.into()));
    }

    /// Something is broken.
    pub fn fail(&mut self, check: &'static str, says: impl Into<String>, advice: impl Into<String>) {
        self.add(check, Level::Fail, says, Some(advice.into()));
    }

    /// Whether anything is.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.findings.iter().any(|finding| finding.level == Level::Fail)
    }

    /// For people: a line for each finding, and one for what to do.
    #[must_use]
    pub fn to_text(&self) -> String {
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

    /// Prints it; the exit code tells whether anything is broken.
    pub fn show(&self, form: Form, out: &mut dyn Write) -> ExitCode {
        let printed: io::Result<()> = form.show(self, Self::to_text, out);
        if printed.is_err() || self.is_broken() {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        }
    }
}

/// What others say is shown in one line, whatever is in it, and without codes that a terminal would obey.
#[must_use]
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_stays_in_its_line() {
        let mut report = Report::default();
        report.ok("x", "a\nfail y\u{1b}[2J");
        assert_eq!(report.to_text().lines().count(), 1);
        assert!(!report.to_text().contains('\u{1b}'));
    }

    #[test]
    fn only_what_is_broken_fails() {
        let mut report = Report::default();
        let mut out = Vec::new();
        report.ok("a", "fine");
        report.warn("b", "so so", "mend it");
        assert!(!report.is_broken());
        report.fail("c", "gone", "bring it back");
        assert!(report.is_broken());
        report.show(Form { json: false }, &mut out);
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(
            text.contains("fail  c            gone") && text.contains("→ bring it back"),
            "{text}"
        );
        let mut out = Vec::new();
        report.show(Form { json: true }, &mut out);
        let shown: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(shown["findings"][2]["level"], "fail");
        assert!(shown["findings"][0].get("advice").is_none());
    }
}
