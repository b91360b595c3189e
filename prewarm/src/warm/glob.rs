//! Patterns of image names: `*` is any text without a slash, `**` any text, `?` one character that is no slash.

/// Whether a name is a pattern.
#[must_use]
pub fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?'])
}

/// Whether `pattern` fits `name` as a whole. Takes time in proportion to the product of both lengths at most.
#[must_use]
pub fn fits(pattern: &str, name: &str) -> bool {
    let name = name.as_bytes();
    // `reached[n]`: what was read of the pattern fits the first `n` bytes of the name.
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    let mut rest = pattern.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        let many = first == b'*';
        let all = many && others.first() == Some(&b'*');
        rest = if all { &others[1..] } else { others };
        let mut before = false;
        for end in 0..=name.len() {
            let own = reached[end];
            let last = end.checked_sub(1).map(|last| name[last]);
            reached[end] = if many {
                own || (end > 0 && reached[end - 1] && (all || last != Some(b'/')))
            } else {
                before && last.is_some_and(|last| if first == b'?' { last != b'/' } else { last == first })
            };
            before = own;
        }
    }
    reached[name.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn patterns_fit_whole_names() {
        for (pattern, name, expected) in [
            ("r.io/a:1", "r.io/a:1", true),
            ("r.io/a:1", "r.io/a:12", false),
            ("r.io/*:1", "r.io/a:1", true),
            ("r.io/*:1", "r.io/a/b:1", false),
            ("r.io/**:1", "r.io/a/b:1", true),
            ("r.io/**", "r.io/", true),
            ("**/app:v?", "r.io/team/app:v2", true),
            ("**/app:v?", "r.io/team/app:v22", false),
            ("a?b", "a/b", false),
            ("", "", true),
            ("*", "", true),
            ("***", "a/b", true),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }

    /// The definition, word by word.
    fn fits_slowly(pattern: &[u8], name: &[u8]) -> bool {
        match pattern {
            [] => name.is_empty(),
            [b'*', b'*', rest @ ..] => (0..=name.len()).any(|n| fits_slowly(rest, &name[n..])),
            [b'*', rest @ ..] => (0..=name.len())
                .take_while(|&n| !name[..n].contains(&b'/'))
                .any(|n| fits_slowly(rest, &name[n..])),
            [b'?', rest @ ..] => matches!(name, [first, others @ ..] if *first != b'/' && fits_slowly(rest, others)),
            [letter, rest @ ..] => matches!(name, [first, others @ ..] if first == letter && fits_slowly(rest, others)),
        }
    }

    proptest! {
        #[test]
        fn the_fast_way_is_the_definition(pattern in "[ab/*?]{0,8}", name in "[ab/]{0,8}") {
            prop_assert_eq!(fits(&pattern, &name), fits_slowly(pattern.as_bytes(), name.as_bytes()));
        }
    }
}
