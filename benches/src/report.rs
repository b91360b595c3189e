//! From samples to medians, one table and `result.json`.

use std::cmp::Ordering;
use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

/// Hullspeed's total has to stay below this part of overlayfs's.
pub const PROMISED_RATIO_TOTAL: f64 = 0.5;

/// RunPodSandbox in a hull has to stay below this part of what it takes without one.
pub const PROMISED_SANDBOX_SHARE: f64 = 1.0;

/// Hullspeed's bytes on the wire have to stay below this part of the plain image's compressed size.
pub const PROMISED_WIRE_SHARE: f64 = 0.25;

/// How an image is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// The plain image, pulled and unpacked.
    Overlayfs,
    /// The converted image, mounted.
    Hullspeed,
    /// The same, in a pod hull.
    Hulls,
}

impl Mode {
    /// All, in the order they are reported.
    pub const ALL: [Self; 3] = [Self::Overlayfs, Self::Hullspeed, Self::Hulls];

    /// As in result.json.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Hullspeed => "hullspeed",
            Self::Hulls => "hulls",
        }
    }
}

/// One start.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// PullImage.
    pub pull: Duration,
    /// RunPodSandbox, and the status call that tells the address.
    pub sandbox: Duration,
    /// CreateContainer.
    pub create: Duration,
    /// StartContainer.
    pub start: Duration,
    /// From the end of StartContainer to the first 200.
    pub first_200: Duration,
    /// Bytes on the wire until then, both directions, HTTP headers included.
    pub wire_bytes: u64,
    /// Requests until then.
    pub requests: u64,
}

impl Sample {
    /// From the pull's begin to the first 200.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.pull + self.sandbox + self.create + self.start + self.first_200
    }
}

/// Medians of one mode. Each is taken by itself, so the phases need not add up to the total.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Medians {
    /// See [`Sample::pull`].
    pub pull_ms: f64,
    /// See [`Sample::sandbox`].
    pub sandbox_ms: f64,
    /// See [`Sample::create`].
    pub create_ms: f64,
    /// See [`Sample::start`].
    pub start_ms: f64,
    /// See [`Sample::first_200`].
    pub first_200_ms: f64,
    /// See [`Sample::total`].
    pub total_ms: f64,
    /// See [`Sample::wire_bytes`].
    pub wire_bytes: u64,
    /// See [`Sample::requests`].
    pub requests: u64,
}

impl Medians {
    /// The medians of a mode's samples; `None` without samples.
    #[must_use]
    pub fn of(samples: &[Sample]) -> Option<Self> {
        let millis = |phase: fn(&Sample) -> Duration| {
            let values = samples.iter().map(|sample| phase(sample).as_secs_f64() * 1e3).collect();
            median(values).map(|value: f64| (value * 10.0).round() / 10.0)
        };
        let count = |field: fn(&Sample) -> u64| {
            let mut values: Vec<u64> = samples.iter().map(field).collect();
            values.sort_unstable();
            values.get(values.len() / 2).copied()
        };
        Some(Self {
            pull_ms: millis(|sample| sample.pull)?,
            sandbox_ms: millis(|sample| sample.sandbox)?,
            create_ms: millis(|sample| sample.create)?,
            start_ms: millis(|sample| sample.start)?,
            first_200_ms: millis(|sample| sample.first_200)?,
            total_ms: millis(Sample::total)?,
            wire_bytes: count(|sample| sample.wire_bytes)?,
            requests: count(|sample| sample.requests)?,
        })
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len() % 2 == 1 {
        upper
    } else {
        f64::midpoint(values[middle - 1], upper)
    })
}

/// `result.json`.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Medians by mode.
    pub modes: Modes,
    /// Compressed size of the plain image's layers.
    pub compressed_bytes: u64,
    /// Hullspeed's total by overlayfs's.
    pub ratio_total: f64,
    /// The total with hulls by overlayfs's.
    pub ratio_total_hulls: f64,
}

/// Medians by mode.
#[derive(Debug, Clone, Serialize)]
pub struct Modes {
    /// The plain image on overlayfs.
    pub overlayfs: Medians,
    /// The converted image on Hullspeed.
    pub hullspeed: Medians,
    /// The converted image on Hullspeed, in a pod hull.
    pub hulls: Medians,
}

impl Report {
    /// Puts the modes side by side.
    #[must_use]
    pub fn new(modes: Modes, compressed_bytes: u64) -> Self {
        let ratio = |mode: &Medians| (mode.total_ms / modes.overlayfs.total_ms * 1e4).round() / 1e4;
        Self {
            compressed_bytes,
            ratio_total: ratio(&modes.hullspeed),
            ratio_total_hulls: ratio(&modes.hulls),
            modes,
        }
    }

    /// Hullspeed's bytes on the wire by the compressed size of the plain image.
    #[must_use]
    pub fn wire_share(&self) -> f64 {
        self.modes.hullspeed.wire_bytes as f64 / self.compressed_bytes as f64
    }

    /// What the figures miss of the promises, in one line; `None` when all are kept.
    #[must_use]
    pub fn missed(&self) -> Option<String> {
        let figures = [
            (
                "total with hullspeed",
                self.ratio_total,
                PROMISED_RATIO_TOTAL,
                "overlayfs's",
            ),
            (
                "total with hulls",
                self.ratio_total_hulls,
                PROMISED_RATIO_TOTAL,
                "overlayfs's",
            ),
            (
                "the sandbox phase with hulls",
                self.modes.hulls.sandbox_ms / self.modes.hullspeed.sandbox_ms,
                PROMISED_SANDBOX_SHARE,
                "the one with hullspeed alone",
            ),
            (
                "bytes on the wire with hullspeed",
                self.wire_share(),
                PROMISED_WIRE_SHARE,
                "the image's compressed size",
            ),
        ];
        // Negated, so that a figure that is no number is a miss, too.
        let missed = figures
            .into_iter()
            .filter(|(_, value, limit, _)| !matches!(value.partial_cmp(limit), Some(Ordering::Less)));
        let said: Vec<_> = missed
            .map(|(what, value, limit, of)| {
                format!(
                    "{what} is {:.1} % of {of}, not below {:.0} %",
                    value * 100.0,
                    limit * 100.0
                )
            })
            .collect();
        (!said.is_empty()).then(|| format!("a promise is missed: {}", said.join("; ")))
    }
}

/// A row's name, its value, and how many digits follow the point.
type Row = (&'static str, fn(&Medians) -> f64, usize);

/// The table: a row a phase, a column a mode, and the ratio of each further mode to the first.
#[must_use]
pub fn table(columns: &[(Mode, Medians)]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let names = columns.iter().map(|(mode, _)| mode.name().to_string());
    let ratios = columns
        .iter()
        .skip(1)
        .map(|(mode, _)| format!("{}, ratio", mode.name()));
    table.set_header(["median".to_string()].into_iter().chain(names).chain(ratios));
    let rows: [Row; 8] = [
        ("pull, ms", |medians| medians.pull_ms, 1),
        ("sandbox, ms", |medians| medians.sandbox_ms, 1),
        ("create, ms", |medians| medians.create_ms, 1),
        ("start, ms", |medians| medians.start_ms, 1),
        ("first HTTP 200, ms", |medians| medians.first_200_ms, 1),
        ("total, ms", |medians| medians.total_ms, 1),
        ("on the wire, MB", |medians| medians.wire_bytes as f64 / 1e6, 2),
        ("requests", |medians| medians.requests as f64, 0),
    ];
    for (name, value, digits) in rows {
        let values: Vec<f64> = columns.iter().map(|(_, medians)| value(medians)).collect();
        let cells = values.iter().map(|value| format!("{value:.digits$}"));
        let ratios = values.iter().skip(1).map(|value| format!("{:.3}", value / values[0]));
        table.add_row([name.to_string()].into_iter().chain(cells).chain(ratios));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(milliseconds: u64) -> Sample {
        let phase = Duration::from_millis(milliseconds);
        let requests = milliseconds;
        Sample {
            pull: phase,
            sandbox: phase,
            create: phase,
            start: phase,
            first_200: phase,
            wire_bytes: milliseconds * 1000,
            requests,
        }
    }

    #[test]
    fn medians_ignore_order_and_outliers() {
        let medians = Medians::of(&[sample(900), sample(10), sample(20)]).unwrap();
        assert_eq!(
            (medians.pull_ms, medians.total_ms, medians.wire_bytes, medians.requests),
            (20.0, 100.0, 20_000, 20)
        );
        assert_eq!(median(vec![4.0, 1.0]), Some(2.5));
        assert_eq!(Medians::of(&[]), None);
    }

    #[test]
    fn the_report_has_the_promised_shape() {
        let medians = |milliseconds| Medians::of(&[sample(milliseconds)]).unwrap();
        let modes = Modes {
            overlayfs: medians(1000),
            hullspeed: medians(250),
            hulls: medians(125),
        };
        let report = serde_json::to_value(Report::new(modes, 77)).unwrap();
        assert_eq!(report["ratio_total"], 0.25);
        assert_eq!(report["ratio_total_hulls"], 0.125);
        assert_eq!(report["compressed_bytes"], 77);
        assert_eq!(report.as_object().unwrap().len(), 4);
        let keys: Vec<_> = report["modes"]["hullspeed"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        let mut wanted = [
            "pull_ms",
            "sandbox_ms",
            "create_ms",
            "start_ms",
            "first_200_ms",
            "total_ms",
            "wire_bytes",
            "requests",
        ]
        .map(String::from);
        wanted.sort();
        let mut keys = keys;
        keys.sort();
        assert_eq!(keys, wanted);
    }

    #[test]
    fn a_missed_promise_is_named() {
        let medians = |milliseconds| Medians::of(&[sample(milliseconds)]).unwrap();
        // In a hull the sandbox takes a tenth of the time, unless said otherwise.
        let modes = |overlayfs, hullspeed, hulls| {
            let hullspeed: Medians = medians(hullspeed);
            let sandbox_ms = hullspeed.sandbox_ms / 10.0;
            Modes {
                overlayfs: medians(overlayfs),
                hullspeed,
                hulls: Medians {
                    sandbox_ms,
                    ..medians(hulls)
                },
            }
        };
        // 250 ms beside 1000 ms; 250 000 bytes on the wire.
        let report = |fast, compressed| Report::new(modes(1000, fast, 100), compressed);
        assert_eq!(report(250, 1_000_001).missed(), None);
        let wire = report(250, 1_000_000).missed().unwrap();
        assert!(wire.contains("bytes on the wire") && wire.contains("25.0 %") && !wire.contains("total"));
        let total = report(500, 10_000_000).missed().unwrap();
        assert!(total.contains("total with hullspeed is 50.0 %") && !total.contains("wire"));
        let both = report(900, 0).missed().unwrap();
        assert!(both.contains("total") && both.contains("wire") && both.lines().count() == 1);
        let hulls = Report::new(modes(1000, 100, 600), 1 << 40).missed().unwrap();
        assert!(hulls.contains("total with hulls is 60.0 %") && !hulls.contains("with hullspeed"));
        let with_sandbox = |sandbox_ms| {
            let mut modes = modes(1000, 250, 100);
            modes.hulls.sandbox_ms = sandbox_ms;
            Report::new(modes, 1 << 40).missed()
        };
        // 250 ms without a hull.
        assert_eq!(with_sandbox(249.9), None);
        let sandbox = with_sandbox(250.0).unwrap();
        assert!(sandbox.contains("the sandbox phase with hulls is 100.0 %") && !sandbox.contains("total"));
        assert!(with_sandbox(f64::NAN).is_some());
        assert!(Report::new(modes(0, 0, 0), 1).missed().unwrap().contains("total"));
    }

    #[test]
    fn the_table_has_a_ratio_for_each_mode_but_the_first() {
        let medians = Medians::of(&[sample(10)]).unwrap();
        let all = table(&Mode::ALL.map(|mode| (mode, medians))).to_string();
        assert!(all.contains("hulls, ratio") && all.contains("1.000"));
        assert!(!table(&[(Mode::Overlayfs, medians)]).to_string().contains("ratio"));
    }
}
