//! Progress on stderr: bars on a terminal, one line per event elsewhere, nothing if asked.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hullspeed_registry::Digest;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle as BarStyle};

use super::ProgressStyle;

/// Where events go.
#[derive(Debug, Clone)]
pub(super) struct Progress(Mode);

#[derive(Debug, Clone)]
enum Mode {
    Bars(MultiProgress),
    Lines,
    Nothing,
}

impl Progress {
    pub(super) fn new(style: ProgressStyle, quiet: bool) -> Self {
        Self(match style {
            _ if quiet => Mode::Nothing,
            ProgressStyle::None => Mode::Nothing,
            ProgressStyle::Auto if std::io::stderr().is_terminal() => Mode::Bars(MultiProgress::new()),
            ProgressStyle::Auto | ProgressStyle::Plain => Mode::Lines,
        })
    }

    /// One line about something that is done.
    pub(super) fn note(&self, line: &str) {
        match &self.0 {
            // Without a terminal behind it a bar set drops its lines.
            Mode::Bars(bars) => drop(bars.println(line)),
            Mode::Lines => eprintln!("{line}"),
            Mode::Nothing => {}
        }
    }

    /// Begins the work on one layer.
    pub(super) fn layer(&self, digest: &Digest, size: u64) -> Task {
        let name = short(digest);
        let bar = match &self.0 {
            Mode::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(size));
                let style = BarStyle::with_template(
                    "{prefix} {msg:10} [{bar:30}] {bytes:>11}/{total_bytes:11} {bytes_per_sec}",
                );
                bar.set_style(style.unwrap_or_else(|_| BarStyle::default_bar()));
                bar.set_prefix(name.clone());
                bar.set_message("converting");
                Some(bar)
            }
            Mode::Lines | Mode::Nothing => None,
        };
        Task {
            progress: self.clone(),
            name,
            bar,
            started: Instant::now(),
        }
    }
}

/// One layer's progress.
#[derive(Debug)]
pub(super) struct Task {
    progress: Progress,
    name: String,
    bar: Option<ProgressBar>,
    started: Instant,
}

impl Task {
    /// A closure that counts bytes, for use on any thread.
    pub(super) fn counter(&self) -> impl Fn(u64) + Send + Sync + use<> {
        let bar = self.bar.clone();
        move |bytes| {
            if let Some(bar) = &bar {
                bar.inc(bytes);
            }
        }
    }

    /// Starts the count again for another kind of work.
    pub(super) fn phase(&self, message: &'static str, size: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(size);
            bar.set_position(0);
            bar.set_message(message);
        }
    }

    pub(super) fn finish(self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().max(Duration::from_millis(1)).as_secs_f64();
        self.progress.note(&format!("{} {what} ({seconds:.1} s)", self.name));
    }
}

/// A digest as people tell layers apart.
pub(super) fn short(digest: &Digest) -> String {
    let text = digest.as_str();
    text.split_once(':').map_or(text, |(_, hex)| &hex[..12]).to_owned()
}

/// A size for people.
pub(super) fn size(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}
