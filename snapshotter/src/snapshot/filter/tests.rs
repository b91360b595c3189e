//! Filters as containerd's clients write them, and texts that are none.

use std::time::UNIX_EPOCH;

use proptest::prelude::*;

use super::*;
use crate::snapshot::{Kind, Labels};

fn info() -> Info {
    let labels = [
        ("foo", "bar"),
        ("a.b/c", "with space"),
        ("more", "x,y"),
        ("q", "say \"hi\""),
    ];
    Info {
        name: "default/1/sha256:abc".to_owned(),
        parent: None,
        kind: Kind::Committed,
        labels: labels
            .into_iter()
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect::<Labels>(),
        created: UNIX_EPOCH,
        updated: UNIX_EPOCH,
    }
}

fn matches(filters: &[&str]) -> Result<bool, FilterErrorKind> {
    let parsed = Filters::parse(filters.iter().copied()).map_err(|(_, error)| error.kind)?;
    Ok(parsed.matches(&info()))
}

#[test]
fn filters_match_as_containerds_do() {
    for (filter, expected) in [
        ("", true),
        ("kind==committed", true),
        ("kind==active", false),
        ("kind", true),
        ("name==default/1/sha256:abc", true),
        ("name == default/1/sha256:abc", true),
        ("  name==default/1/sha256:abc", true),
        ("name!=x", true),
        ("name~=sha256", true),
        ("name~=^sha256", false),
        ("name~=/^default\\/1\\/sha256:[a-c]+$/", true),
        ("name~=|^default/[0-9]+/|", true),
        ("name~=\"^default\"", true),
        ("parent==\"\"", true),
        ("parent", true),
        ("parent!=\"\"", false),
        ("labels", false),
        ("labels.foo", true),
        ("labels.foo==bar", true),
        ("labels.foo==bar,kind==committed", true),
        ("labels.foo==bar,kind==view", false),
        ("labels.foo,labels.more", true),
        ("labels.nope", false),
        ("labels.nope==\"\"", false),
        ("labels.nope!=x", true),
        ("labels.nope!=\"\"", false),
        ("labels.nope~=^$", true),
        ("labels.\"a.b/c\"==\"with space\"", true),
        ("labels.a.\"b/c\"", true),
        ("labels.\"a.b/c\"~=/with\\x20sp/", true),
        ("labels.more==\"x,y\"", true),
        ("labels.q==\"say \\\"hi\\\"\"", true),
        ("labels.foo==\"\\142\\x61\\u0072\"", true),
        ("labels.foo==\"\\xff\"", false),
        ("labels.\"\\xff\"", false),
        ("name~=(", false),
        ("name~=\"\\xff\"", false),
        ("unknown==x", false),
        ("unknown!=x", true),
        ("name==a=b!=c", false),
        ("\"name\"!=x", true),
    ] {
        assert_eq!(matches(&[filter]), Ok(expected), "{filter}");
    }
}

#[test]
fn of_several_filters_one_must_match() {
    assert_eq!(matches(&[]), Ok(true));
    assert_eq!(matches(&["kind==view", "labels.foo==bar"]), Ok(true));
    assert_eq!(matches(&["kind==view", "labels.foo==x"]), Ok(false));
    assert_eq!(matches(&["kind==view", ""]), Ok(true));
}

#[test]
fn faults_are_named_with_their_place() {
    use FilterErrorKind::*;
    for (filter, at, kind) in [
        (" ", 1, Field),
        ("==x", 0, Field),
        ("name==", 6, Value),
        ("name==x,", 8, Field),
        ("name==x ,kind", 7, End),
        ("name==x kind", 7, End),
        ("name=x", 4, Operator),
        ("name=!x", 4, Operator),
        ("name===x", 4, Operator),
        ("name==!x", 4, Operator),
        ("name x", 5, Operator),
        ("name==,", 6, Value),
        ("name==.x", 6, Value),
        ("labels.", 7, Field),
        ("labels..x", 7, Field),
        ("labels.(x", 7, Field),
        ("labels.'x'", 7, Field),
        ("labels./x/", 7, Quote),
        ("name==/x/", 6, Quote),
        ("name==|x|", 6, Quote),
        ("name==\"x", 6, Unterminated),
        ("name==\"x\n\"", 6, Unterminated),
        ("name==\"x\"y", 9, End),
        ("name==\"\\q\"", 6, Escape),
        ("name~=/\\d/", 6, Escape),
        ("name==\"\\08\"", 6, Escape),
        ("name==\"\\400\"", 6, Escape),
        ("name==\"\\xg0\"", 6, Escape),
        ("name==\"\\U00110000\"", 6, Escape),
        ("name==\u{0}", 6, Character),
        ("name\u{fffd}", 4, Character),
        ("(", 0, Field),
        ("näme==x", 1, Operator),
    ] {
        let (shown, error) = Filters::parse([filter]).expect_err(filter);
        assert_eq!((shown, error), (filter, FilterError { at, kind }), "{filter:?}");
    }
}

proptest! {
    #[test]
    fn any_text_parses_or_fails(text in "\\PC{0,40}", noise in "[a-z.,=!~\"/|\\\\x0-9 \\n\u{0}\u{fffd}]{0,40}") {
        for filter in [&text, &noise] {
            if let Ok(filters) = Filters::parse([filter.as_str()]) {
                filters.matches(&info());
            }
        }
    }

    #[test]
    fn any_label_is_found_through_quotes(key in "[^\u{0}\u{fffd}]{1,20}", value in "[^\u{0}\u{fffd}]{1,20}") {
        let quote = |text: &str| {
            let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            format!("\"{escaped}\"")
        };
        let mut info = info();
        info.labels.insert(key.clone(), value.clone());
        let filter = format!("labels.{}=={}", quote(&key), quote(&value));
        prop_assert!(Filters::parse([filter.as_str()]).unwrap().matches(&info));
    }

    #[test]
    fn plain_values_need_no_quotes(value in "[a-zA-Z0-9:@_+(][a-zA-Z0-9:./@_+()=-]{0,30}") {
        let mut info = info();
        info.name = value.clone();
        let filter = format!("name=={value},kind==committed");
        prop_assert!(Filters::parse([filter.as_str()]).unwrap().matches(&info));
    }
}
