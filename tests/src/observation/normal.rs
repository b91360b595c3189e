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
        Value::Array(list) => list.into_iter().map(|value| normalised(value, names)).collect(),
        Value::Object(map) => map
            .into_iter()
            .map(|(key, value)| (renamed(key, names), normalised(value, names)))
            .collect(),
        other => other,
    }
}

fn renamed(mut text: String, names: &[(String, &'static str)]) -> String {
    for (from, to) in names {
        if text.contains(from.as_str()) {
            text = text.replace(from.as_str(), to);
        }
        // Ids are shown by their beginnings, too.
        let beginning = from.get(..16).filter(|_| from.len() == 64);
        if let Some(beginning) = beginning
            && text.contains(beginning)
        {
            text = text.replace(beginning, &format!("{to}*"));
        }
    }
    text
}
