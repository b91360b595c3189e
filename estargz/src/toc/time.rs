//! Modification times: RFC 3339 texts, as Go reads and writes them.

const SECONDS_PER_DAY: i64 = 86_400;

/// A point in time: seconds since the epoch, and nanoseconds towards the future.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Whole seconds since 1970-01-01T00:00:00Z, negative before.
    pub seconds: i64,
    /// 0 to 999 999 999.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// Reads `2024-02-29T12:00:00Z`, also with a fraction and with an offset such as `+05:30`; the empty text is the
    /// epoch. `None` for anything else, dates that do not exist included. Digits below the nanosecond are dropped.
    pub fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::default());
        }
        let (date_time, rest) = text.as_bytes().split_at_checked(19)?;
        let [
            y3,
            y2,
            y1,
            y0,
            b'-',
            mo1,
            mo0,
            b'-',
            d1,
            d0,
            b'T' | b't',
            h1,
            h0,
            b':',
            mi1,
            mi0,
            b':',
            s1,
            s0,
        ] = date_time
        else {
            return None;
        };
        let year = number(&[*y3, *y2, *y1, *y0])?;
        let month = number(&[*mo1, *mo0]).filter(|m| (1..=12).contains(m))?;
        let day = number(&[*d1, *d0]).filter(|d| (1..=days_in_month(year, month)).contains(d))?;
        let hour = number(&[*h1, *h0]).filter(|h| *h < 24)?;
        let minute = number(&[*mi1, *mi0]).filter(|m| *m < 60)?;
        let second = number(&[*s1, *s0]).filter(|s| *s < 60)?;
        let (nanoseconds, zone) = fraction(rest)?;
        let seconds = days_since_epoch(year, month, day) * SECONDS_PER_DAY + hour * 3600 + minute * 60 + second;
        Some(Self {
            seconds: seconds - zone_offset(zone)?,
            nanoseconds,
        })
    }

    /// The text that the reference writer gives for whole seconds: UTC, no fraction; empty for the epoch itself.
    ///
    /// `None` outside the years 0 to 9999, which RFC 3339 cannot say.
    pub fn format_seconds(seconds: i64) -> Option<String> {
        if seconds == 0 {
            return Some(String::new());
        }
        let (year, month, day) = date_of(seconds.div_euclid(SECONDS_PER_DAY))?;
        let second = seconds.rem_euclid(SECONDS_PER_DAY);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        Some(format!(
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z"
        ))
    }
}

fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |n, digit| {
        digit.is_ascii_digit().then(|| n * 10 + i64::from(digit - b'0'))
    })
}

/// Nanoseconds of an optional fraction, and what follows it.
fn fraction(rest: &[u8]) -> Option<(u32, &[u8])> {
    let [b'.' | b',', digits @ ..] = rest else {
        return Some((0, rest));
    };
    let len = digits.iter().take_while(|b| b.is_ascii_digit()).count();
    let (digits, zone) = digits.split_at_checked(len).filter(|(digits, _)| !digits.is_empty())?;
    let nanoseconds = (0..9).fold(0, |n, at| {
        n * 10 + digits.get(at).map_or(0, |digit| u32::from(digit - b'0'))
    });
    Some((nanoseconds, zone))
}

fn zone_offset(zone: &[u8]) -> Option<i64> {
    match zone {
        b"Z" | b"z" => Some(0),
        [sign @ (b'+' | b'-'), h1, h0, b':', m1, m0] => {
            let hours = number(&[*h1, *h0]).filter(|h| *h <= 24)?;
            let minutes = number(&[*m1, *m0]).filter(|m| *m < 60)?;
            let offset = hours * 3600 + minutes * 60;
            Some(if *sign == b'-' { -offset } else { offset })
        }
        _ => None,
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_in_month(year: i64, month: i64) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days before 1 January of `year`, counted from year 0.
fn days_before_year(year: i64) -> i64 {
    let before = year - 1;
    // Year 0 is a leap year.
    if year <= 0 {
        0
    } else {
        year * 365 + before / 4 - before / 100 + before / 400 + 1
    }
}

fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let before_month: i64 = (1..month).map(|m| days_in_month(year, m)).sum();
    days_before_year(year) - days_before_year(1970) + before_month + day - 1
}

fn date_of(days_since_epoch: i64) -> Option<(i64, i64, i64)> {
    let days = days_since_epoch.checked_add(days_before_year(1970))?;
    if !(0..days_before_year(10_000)).contains(&days) {
        return None;
    }
    // Never too late, and at most 22 years too early.
    let mut year = days / 366;
    while days_before_year(year + 1) <= days {
        year += 1;
    }
    let mut day = days - days_before_year(year);
    let mut month = 1;
    while day >= days_in_month(year, month) {
        day -= days_in_month(year, month);
        month += 1;
    }
    Some((year, month, day + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_the_format_knows() {
        for (text, seconds, nanoseconds) in [
            ("", 0, 0),
            ("1970-01-01T00:00:00Z", 0, 0),
            ("1969-12-31T23:59:59Z", -1, 0),
            ("2024-02-29T12:34:56Z", 1_709_210_096, 0),
            ("2024-02-29T12:34:56.5Z", 1_709_210_096, 500_000_000),
            ("2024-02-29T12:34:56.1234567899Z", 1_709_210_096, 123_456_789),
            ("2024-02-29T18:04:56+05:30", 1_709_210_096, 0),
            ("2024-02-29T04:34:56.000000001-08:00", 1_709_210_096, 1),
            ("0001-01-01T00:00:00Z", -62_135_596_800, 0),
            ("0000-01-01T00:00:00Z", -62_167_219_200, 0),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
        ] {
            assert_eq!(
                Timestamp::parse(text),
                Some(Timestamp { seconds, nanoseconds }),
                "{text}"
            );
        }
    }

    #[test]
    fn texts_that_are_no_times() {
        for text in [
            "2024",
            "2024-02-30T00:00:00Z",
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-00-01T00:00:00Z",
            "2024-01-00T00:00:00Z",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:60:00Z",
            "2024-01-01T00:00:60Z",
            "2024-01-01 00:00:00Z",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00.Z",
            "2024-01-01T00:00:00+5:30",
            "2024-01-01T00:00:00+25:00",
            "2024-01-01T00:00:00+00:60",
            "2024-01-01T00:00:00Zjunk",
            "-024-01-01T00:00:00Z",
            "20240-1-01T00:00:00Z",
            "2024-01-01T00:00:0é",
        ] {
            assert_eq!(Timestamp::parse(text), None, "{text}");
        }
    }

    #[test]
    fn days_of_ten_millennia_come_back() {
        for day in (days_since_epoch(0, 1, 1)..=days_since_epoch(9999, 12, 31)).step_by(13) {
            let seconds = day * SECONDS_PER_DAY + 86_399;
            let text = Timestamp::format_seconds(seconds).unwrap();
            assert_eq!(
                Timestamp::parse(&text),
                Some(Timestamp {
                    seconds,
                    nanoseconds: 0
                }),
                "{text}"
            );
        }
        assert_eq!(Timestamp::format_seconds(253_402_300_800), None);
        assert_eq!(Timestamp::format_seconds(-62_167_219_201), None);
        assert_eq!(Timestamp::format_seconds(i64::MIN), None);
        assert_eq!(Timestamp::format_seconds(i64::MAX), None);
    }
}
