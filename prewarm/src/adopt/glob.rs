//! Patterns of annotations' names, matched as containerd matches them: Go's `path.Match`.
//!
//! `*` stands for any text without `/`, `?` for one character that is not `/`, `[a-z]` and `[^a-z]` for one character of
//! a class, `/` among them, and a backslash takes the next character literally. A malformed pattern matches nothing.

/// Whether all of `name` matches `pattern`.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    let (mut pattern, mut name) = (pattern.as_slice(), name.as_slice());
    while !pattern.is_empty() {
        let (star, chunk, rest) = next_chunk(pattern);
        pattern = rest;
        if star && chunk.is_empty() {
            return !name.contains(&'/');
        }
        // The first place that fits is taken for good; only the last chunk has to reach the end.
        let reach = if star {
            name.iter().position(|&c| c == '/').unwrap_or(name.len())
        } else {
            0
        };
        let found = (0..=reach)
            .filter_map(|skipped| match_chunk(chunk, &name[skipped..]))
            .find(|left| !pattern.is_empty() || left.is_empty());
        match found {
            Some(left) => name = left,
            None => return false,
        }
    }
    name.is_empty()
}

/// Splits off the text up to the next `*` outside a class; whether stars stood before it.
fn next_chunk(pattern: &[char]) -> (bool, &[char], &[char]) {
    let stars = pattern.iter().take_while(|&&c| c == '*').count();
    let pattern = &pattern[stars..];
    let (mut in_class, mut at) = (false, 0);
    while at < pattern.len() {
        match pattern[at] {
            '\\' => at += 1,
            '[' => in_class = true,
            ']' => in_class = false,
            '*' if !in_class => break,
            _ => {}
        }
        at += 1;
    }
    let (chunk, rest) = pattern.split_at(at.min(pattern.len()));
    (stars > 0, chunk, rest)
}

/// What is left of `name` behind a match of a chunk without `*`.
fn match_chunk<'a>(mut chunk: &[char], mut name: &'a [char]) -> Option<&'a [char]> {
    while let Some((&first, rest)) = chunk.split_first() {
        let (&character, left) = name.split_first()?;
        name = left;
        chunk = match first {
            '[' => match_class(rest, character)?,
            '?' if character == '/' => return None,
            '?' => rest,
            '\\' => rest.split_first().filter(|(literal, _)| **literal == character)?.1,
            literal if literal == character => rest,
            _ => return None,
        };
    }
    Some(name)
}

/// What is left of the pattern behind a class that `character` is in. `class` is what follows the bracket.
fn match_class(mut class: &[char], character: char) -> Option<&[char]> {
    let negated = class.first() == Some(&'^');
    if negated {
        class = &class[1..];
    }
    let (mut inside, mut ranges) = (false, 0);
    loop {
        if let (Some((']', rest)), true) = (class.split_first(), ranges > 0) {
            return (inside != negated).then_some(rest);
        }
        let (low, rest) = class_character(class)?;
        let (high, rest) = match rest.split_first() {
            Some(('-', rest)) => class_character(rest)?,
            _ => (low, rest),
        };
        class = rest;
        inside |= (low..=high).contains(&character);
        ranges += 1;
    }
}

fn class_character(class: &[char]) -> Option<(char, &[char])> {
    let (&first, rest) = class.split_first()?;
    let (character, rest) = match first {
        '-' | ']' => return None,
        '\\' => {
            let (&literal, rest) = rest.split_first()?;
            (literal, rest)
        }
        other => (other, rest),
    };
    // Nothing may follow but the rest of the class.
    (!rest.is_empty()).then_some((character, rest))
}

#[cfg(test)]
mod tests {
    use super::matches;
    use proptest::prelude::*;

    #[test]
    fn as_go_matches() {
        // From the table of Go's own test of path.Match: pattern, name, whether it matches.
        let table = [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*c", "abc", true),
            ("a*", "a", true),
            ("a*", "abc", true),
            ("a*", "ab/c", false),
            ("a*/b", "abc/b", true),
            ("a*/b", "a/c/b", false),
            ("a*b*c*d*e*/f", "axbxcxdxe/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/f", true),
            ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", false),
            ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", false),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^c]", "abc", false),
            ("ab[^b-d]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "a☺b", true),
            ("a[^a]b", "a☺b", true),
            ("a???b", "a☺b", false),
            ("[a-ζ]*", "α", true),
            ("*[a-ζ]", "A", false),
            ("a?b", "a/b", false),
            ("a*b", "a/b", false),
            ("[\\]a]", "]", true),
            ("[\\-]", "-", true),
            ("[x\\-]", "x", true),
            ("[x\\-]", "-", true),
            ("[x\\-]", "z", false),
            ("[\\-x]", "x", true),
            ("[]a]", "]", false),
            ("[-]", "-", false),
            ("[x-]", "x", false),
            ("[x-]", "-", false),
            ("[-x]", "x", false),
            ("\\", "a", false),
            ("[a-b-c]", "a", false),
            ("[", "a", false),
            ("[^", "a", false),
            ("[^bc", "a", false),
            ("a[", "a", false),
            ("a[", "ab", false),
            ("*x", "xxx", true),
        ];
        for (pattern, name, expected) in table {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
        assert!(matches("a[^b]c", "a/c"), "a class may be a slash");
        assert!(matches("", "") && !matches("", "a"));
    }

    proptest! {
        #[test]
        fn ends_for_any_pattern(pattern in "[ab*?\\[\\]^\\\\/-]{0,24}", name in "[ab/]{0,24}") {
            let _ = matches(&pattern, &name);
        }

        #[test]
        fn literal_text_matches_itself(name in "[a-z./]{0,24}") {
            prop_assert!(matches(&name, &name));
        }
    }
}
