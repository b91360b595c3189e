//! Whether an image is meant by a pattern of the kubelet's: `*.example.com:5000/team`.
//!
//! Domain labels match one by one, with `*`, `?`, `[a-z]` and `\` within a label; the port must be the same; the path is a plain
//! beginning of the image's, not of whole components. These are the kubelet's rules.

/// A pattern or an image in its parts.
struct Parts<'a> {
    labels: Vec<&'a str>,
    port: &'a str,
    path: &'a str,
}

fn parts(text: &str) -> Parts<'_> {
    let at = text.find('/').unwrap_or(text.len());
    let (authority, path) = text.split_at(at);
    // A port is behind the last colon, if what is before it is a host.
    let (host, port) = match authority.rsplit_once(':') {
        // An address in brackets loses them, which would be a class otherwise.
        Some((host, port)) if host.starts_with('[') && host.ends_with(']') => (&host[1..host.len() - 1], port),
        Some((host, port)) if !host.contains(':') => (host, port),
        _ => (authority, ""),
    };
    Parts {
        labels: host.split('.').collect(),
        port,
        path,
    }
}

/// Whether `image` (`host[:port]/repository`) is meant by `pattern`.
pub(super) fn matches(pattern: &str, image: &str) -> bool {
    let (pattern, image) = (parts(pattern), parts(image));
    let labels = || {
        let pairs = pattern.labels.iter().zip(&image.labels);
        pattern.labels.len() == image.labels.len() && { pairs }
            .all(|(pattern, label)| label_matches(pattern.as_bytes(), label.as_bytes()))
    };
    pattern.port == image.port && image.path.starts_with(pattern.path) && labels()
}

/// One label; without recursion, so that no pattern takes longer than the product of the lengths.
fn label_matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut done) = (0, 0);
    // Where the last star was, and what is tried behind it.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at) == Some(&b'*') {
            star = Some((at + 1, done));
            at += 1;
            continue;
        }
        if done == text.len() {
            return at == pattern.len();
        }
        match step(pattern.get(at..).unwrap_or_default(), text[done]) {
            Some(length) => {
                at += length;
                done += 1;
            }
            None => {
                let Some((behind, tried)) = star else { return false };
                star = Some((behind, tried + 1));
                (at, done) = (behind, tried + 1);
            }
        }
    }
}

/// How much of the pattern one character takes, if it fits.
fn step(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => Some(1),
        [b'\\', escaped, ..] => (*escaped == byte).then_some(2),
        [b'[', rest @ ..] => class(rest, byte).map(|length| length + 1),
        [own, ..] => (*own == byte).then_some(1),
        [] => None,
    }
}

/// A class without its opening bracket; none if it does not fit or has no end.
fn class(pattern: &[u8], byte: u8) -> Option<usize> {
    let (negated, mut at) = match pattern.first()? {
        b'^' => (true, 1),
        _ => (false, 0),
    };
    let (mut fits, first) = (false, at);
    loop {
        if pattern.get(at)? == &b']' && at > first {
            return (fits != negated).then_some(at + 1);
        }
        let (low, next) = member(pattern, at)?;
        let (high, next) = if pattern.get(next) == Some(&b'-') {
            member(pattern, next + 1)?
        } else {
            (low, next)
        };
        fits |= (low..=high).contains(&byte);
        at = next;
    }
}

fn member(pattern: &[u8], at: usize) -> Option<(u8, usize)> {
    match pattern.get(at)? {
        b'\\' => Some((*pattern.get(at + 1)?, at + 2)),
        b'-' | b']' => None,
        byte => Some((*byte, at + 1)),
    }
}

/// Whether a pattern is one at all, as far as the kubelet checks.
pub(super) fn is_usable(pattern: &str) -> bool {
    let host = parts(pattern).labels;
    !host.join(".").is_empty() && !pattern.contains(char::is_whitespace) && !pattern.contains("://")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_mean_what_the_kubelet_means() {
        for (pattern, image, wanted) in [
            ("r.io", "r.io/x", true),
            ("r.io", "r.io:5000/x", false),
            ("r.io:5000", "r.io:5000/x", true),
            ("r.io:5000/path", "r.io:5000/path/x", true),
            ("r.io:5000/path", "r.io:5000/pathology", true),
            ("r.io:5000/path", "r.io:5000/x", false),
            ("*.r.io", "a.r.io/x", true),
            ("*.r.io", "r.io/x", false),
            ("*.r.io", "a.b.r.io/x", false),
            ("*.*.r.io", "a.b.r.io/x", true),
            ("*.io", "a.r.io/x", false),
            ("r.*", "r.io/x", true),
            ("app*.r.io", "application.r.io/x", true),
            ("app*.r.io", "my-app.r.io/x", false),
            (
                "*.dkr.ecr.*.amazonaws.com",
                "1234.dkr.ecr.eu-west-1.amazonaws.com/x",
                true,
            ),
            (
                "*.dkr.ecr-fips.*.amazonaws.com",
                "1234.dkr.ecr.eu-west-1.amazonaws.com/x",
                false,
            ),
            ("a?c.io", "abc.io", true),
            ("a[b-d]c.io", "adc.io", true),
            ("a[^b-d]c.io", "adc.io", false),
            ("a[b", "ab", false),
            ("r.io/*", "r.io/x", false),
            ("*:5000", "r:5000/x", true),
            ("[::1]:5000", "[::1]:5000/x", true),
            ("", "r.io/x", false),
        ] {
            assert_eq!(matches(pattern, image), wanted, "{pattern} {image}");
        }
    }

    /// The rules of a label without its classes, written down the short way.
    fn plain(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            ([b'*', rest @ ..], _) => plain(rest, text) || matches!(text, [_, left @ ..] if plain(pattern, left)),
            ([b'?', rest @ ..], [_, left @ ..]) => plain(rest, left),
            ([own, rest @ ..], [byte, left @ ..]) => own == byte && plain(rest, left),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn stars_are_found_wherever_they_can_end(pattern in "[ab*?]{0,8}", text in "[ab]{0,10}") {
            prop_assert_eq!(label_matches(pattern.as_bytes(), text.as_bytes()), plain(pattern.as_bytes(), text.as_bytes()));
        }

        #[test]
        fn nothing_makes_it_panic(pattern in "[\\[\\]a^*?:./\\\\-]{0,30}|\\PC{0,20}", image in "\\PC{0,30}") {
            let _ = matches(&pattern, &image);
            let _ = is_usable(&pattern);
        }
    }
}
