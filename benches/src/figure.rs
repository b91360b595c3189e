//! Figures: one promise each, measured then and there, printed as one JSON object per line.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// Stable name, `area.what_unit`.
    pub figure: &'static str,
    /// The value.
    pub value: f64,
    /// Unit: `ms`, `ratio`, `MiB`, `count`.
    pub unit: &'static str,
    /// What was compared with what, or how it was measured.
    pub against: String,
    /// Samples behind the value.
    pub n: usize,
    /// The containerd that it was measured on, if one has a part in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub containerd: Option<String>,
    /// What the value has to stay at or below, or to reach; absent where nothing is promised.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<f64>,
    /// On which side of the bound the promise is; only said where it is not the usual one.
    #[serde(skip_serializing_if = "Side::is_usual")]
    pub side: Side,
}

/// On which side of its bound a figure has to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// A cost: at the bound or below it.
    #[default]
    AtMost,
    /// A yield: at the bound or above it.
    AtLeast,
}

impl Side {
    fn is_usual(&self) -> bool {
        *self == Self::AtMost
    }
}

impl Figure {
    /// Whether the promise is kept; one without a bound always is.
    #[must_use]
    pub fn holds(&self) -> bool {
        // A value that is no number keeps nothing.
        self.bound.is_none_or(|bound| match self.side {
            Side::AtMost => self.value <= bound,
            Side::AtLeast => self.value >= bound,
        })
    }
}

/// Writes a figure as one line.
pub fn print(out: &mut impl Write, figure: &Figure) -> Result<()> {
    let text = serde_json::to_string(figure).context("cannot write a figure as JSON")?;
    writeln!(out, "{text}").context("cannot print a figure")
}

/// Durations of one thing done again and again.
#[derive(Debug, Clone, Default)]
pub struct Times(Vec<f64>);

impl Times {
    /// Adds one.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1e3);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// All of them together, in milliseconds.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.0.iter().sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value, in milliseconds, that `part` of the samples do not exceed (nearest rank).
    pub fn quantile(&self, part: f64) -> Result<f64> {
        ensure!(!self.0.is_empty(), "no samples");
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (part * sorted.len() as f64).ceil().max(1.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a small positive rank"
        )]
        let index = (rank as usize).min(sorted.len()) - 1;
        Ok(sorted[index])
    }

    /// The median, in milliseconds.
    pub fn median(&self) -> Result<f64> {
        self.quantile(0.5)
    }
}

/// The middle one of these values; of two in the middle the lower one, as with [`Times`].
pub fn median(values: &[f64]) -> Result<f64> {
    let mut times = Times::default();
    times.0.extend(values);
    times.median()
}

/// Rounds for people: four digits behind the point are more than any of these measurements carries.
#[must_use]
pub fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let mut times = Times::default();
        assert!(times.median().is_err() && times.is_empty());
        for value in [5, 1, 4, 2, 3] {
            times.push(Duration::from_millis(value));
        }
        let at = |part| times.quantile(part).unwrap();
        assert_eq!((at(0.5), at(0.99), at(0.2), at(0.0)), (3.0, 5.0, 1.0, 1.0));
    }

    #[test]
    fn a_figure_is_one_line_and_knows_its_bound() {
        let mut figure = Figure {
            figure: "hulls.leaks",
            value: 0.0,
            unit: "count",
            against: "before".into(),
            n: 1000,
            containerd: Some("2.1.9".into()),
            bound: Some(0.0),
            side: Side::AtMost,
        };
        let mut out = Vec::new();
        print(&mut out, &figure).unwrap();
        let line = String::from_utf8(out).unwrap();
        assert_eq!(line.lines().count(), 1);
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&line).unwrap()["figure"],
            "hulls.leaks"
        );
        assert!(figure.holds() && !line.contains("side"));
        figure.value = 1.0;
        assert!(!figure.holds());
        figure.side = Side::AtLeast;
        assert!(figure.holds());
        figure.value = f64::NAN;
        assert!(!figure.holds());
        figure.bound = None;
        assert!(figure.holds());
    }
}
