//! Times as Go programs write them, for the files that containerd and the kubelet read too: `1h30m`, `500ms`, `0`.

use std::time::Duration;

/// Longest time that is taken as it is; longer ones are cut to it.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The time that `text` means; none for what is no time, or a negative one.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if text == "0" {
        return Some(Duration::ZERO);
    }
    if text.is_empty() || text.len() > 64 {
        return None;
    }
    let (mut rest, mut nanoseconds) = (text, 0.0_f64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "ns" => 1.0,
            "us" | "µs" | "μs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        nanoseconds += number * unit;
        rest = &rest[letters..];
    }
    let time = Duration::try_from_secs_f64(nanoseconds / 1e9).unwrap_or(LONGEST);
    Some(time.min(LONGEST))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_those_of_go() {
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("1s", 1000),
            ("1.5s", 1500),
            ("+2m", 120_000),
            ("1h2m3s", 3_723_000),
            ("250ms", 250),
            ("5m0s", 300_000),
            ("1000us", 1),
            ("1000µs", 1),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        assert_eq!(parse("99999999999h"), Some(LONGEST));
        for bad in [
            "", "1", "s", "-1s", "1 s", "1d", "..s", ".", "1s2", "1e3s", "NaNs", "infs",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(text in "[0-9.hmsnuµ+-]{0,40}|\\PC{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_was_written_is_read(hours in 0_u32..1000, minutes in 0_u32..60, seconds in 0_u32..60) {
            let time = parse(&format!("{hours}h{minutes}m{seconds}s")).unwrap();
            prop_assert_eq!(time, Duration::from_secs(u64::from(hours * 3600 + minutes * 60 + seconds)));
        }
    }
}
