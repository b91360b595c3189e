//! What differs from pod to pod and from moment to moment, written as what it is.

use serde_json::Value;

/// Nanoseconds since the epoch of the years 2017 to 2039.
const TIMES: std::ops::Range<u64> = 1_500_000_000_000_000_000..2_200_000_000_000_000_000;

/// Texts replaced by their names (those named first, first), times by `<time>`.
#[must_use]
pub fn normalised(value: Value, names: &[(String, &'static str)]) -> Value {
    match value {
        Value::String(text) => Value::from(renamed(text, names)),
        Value::Number(number) if number.as_u64().is_some_and(|number| TIMES.contains(&number)) => "<time>".into(),
        Value::Array(list) => {
            let mut list: Vec<_> = list.into_iter().map(|value| normalised(value, names)).collect();
            // Sandboxes, containers and their statistics come in any order.
            if list.iter().all(is_message) {
                list.sort_by_key(ToString::to_string);
            }
            list.into()
        }
        Value::Object(map) => map
            .into_iter()
            .map(|(key, value)| match value {
                Value::Number(_) if key == "pid" => (key, "<pid>".into()),
                value => (renamed(key, names), normalised(value, names)),
            })
            .collect(),
        other => other,
    }
}

/// Characters of an id of a sandbox or container.
const ID_LENGTH: usize = 64;

/// What random names begin with, what they are made of, and how long they are (0: as long as it goes on).
const RANDOM: [(&str, &str, usize); 4] = [
    ("/proc/", "0123456789", 0),
    ("containerd-mount", "0123456789", 0),
    ("veth", "0123456789abcdef", 8),
    ("cni-", "0123456789abcdef-", 36),
];

/// Whether it is a message's tree, whose keys are numbers.
fn is_message(value: &Value) -> bool {
    let keys = value.as_object().map(|object| object.keys());
    keys.is_some_and(|mut keys| keys.all(|key| key.parse::<u32>().is_ok()))
}

fn renamed(mut text: String, names: &[(String, &'static str)]) -> String {
    for (from, to) in names {
        text = replaced(&text, from, to);
        // Ids are shown by their beginnings, too.
        if let Some(beginning) = from.get(..16).filter(|_| from.len() == ID_LENGTH) {
            text = text.replace(beginning, &format!("{to}*"));
        }
    }
    text = without_ids(&text);
    for (prefix, alphabet, length) in RANDOM {
        text = without_random(&text, prefix, alphabet, length);
    }
    if is_mac(&text) { "<mac>".into() } else { text }
}

/// Replaces `from` where no digit follows: one address may begin as another one.
fn replaced(text: &str, from: &str, to: &str) -> String {
    let mut parts = text.split(from);
    let mut found = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        found.push_str(if part.starts_with(|c: char| c.is_ascii_digit()) {
            from
        } else {
            to
        });
        found.push_str(part);
    }
    found
}

/// Names ids that are not known, such as that of a sandbox that could not be made; digests stay.
fn without_ids(text: &str) -> String {
    let mut found = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_hexdigit()) {
        let (before, from) = rest.split_at(start);
        let end = from.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(from.len());
        found.push_str(before);
        let is_id = end == ID_LENGTH && !found.ends_with("sha256:");
        found.push_str(if is_id { "<id>" } else { &from[..end] });
        rest = &from[end..];
    }
    found.push_str(rest);
    found
}

fn without_random(text: &str, prefix: &str, alphabet: &str, length: usize) -> String {
    let mut parts = text.split(prefix);
    let mut found = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c| !alphabet.contains(c)).unwrap_or(part.len());
        found.push_str(prefix);
        if end > 0 && (length == 0 || end == length) {
            found.push('*');
            found.push_str(&part[end..]);
        } else {
            found.push_str(part);
        }
    }
    found
}

fn is_mac(text: &str) -> bool {
    let mut bytes = text.split(':');
    text.len() == 17 && bytes.all(|byte| byte.len() == 2 && byte.chars().all(|c| c.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_random_is_named() {
        let id = "0123456789abcdef".repeat(4);
        let names = [(id.clone(), "<sandbox>"), ("10.0.0.7".to_owned(), "<address>")];
        let value = json!({
            "pid": 7, "mac": "ae:b3:74:e7:16:e3", "veth93437b5d": [1_700_000_000_000_000_000_u64, 7],
            "path": format!("/a/{id}/b"), "short": &id[..16], "proc": "/proc/12/ns/net", "self": "/proc/self",
            "other": format!("no {} but sha256:{}", "f".repeat(64), "e".repeat(64)), "like": "10.0.0.77",
            "netns": "/x/cni-5672e71c-f837-9f69-4baf-62209b610f3d", "address": "10.0.0.7/24", "cni": "cni-conf",
        });
        let expected = json!({
            "pid": "<pid>", "mac": "<mac>", "veth*": ["<time>", 7],
            "path": "/a/<sandbox>/b", "short": "<sandbox>*", "proc": "/proc/*/ns/net", "self": "/proc/self",
            "other": format!("no <id> but sha256:{}", "e".repeat(64)), "like": "10.0.0.77",
            "netns": "/x/cni-*", "address": "<address>/24", "cni": "cni-conf",
        });
        assert_eq!(normalised(value, &names), expected);
    }
}
