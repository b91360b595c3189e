//! Log lines as JSON objects: time, level, the event's fields, target.
//!
//! The library's own form tells of an error what it says itself, and not its causes; these are what matters most.

use std::error::Error;
use std::fmt::{self, Debug};

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::error::chain;

/// Fields in which records of the crate `log` say where they are from.
const OF_LOG: &str = "log.";

/// Names in every line that are no fields of the event.
const OWN: [&str; 3] = ["timestamp", "level", "target"];
/// Name of the event's text.
const MESSAGE: &str = "message";
/// Put before a field's name that the line has already.
const COLLIDING: &str = "field.";

/// One object per line; spans are not told.
pub(super) struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut line = Line {
            text: String::from("{"),
            target: None,
            has_message: false,
        };
        line.add("timestamp", time);
        line.add("level", event.metadata().level().as_str());
        event.record(&mut line);
        let target = line.target.take();
        line.add("target", target.as_deref().unwrap_or(event.metadata().target()));
        writeln!(writer, "{}}}", line.text)
    }
}

/// A line as far as it is written.
struct Line {
    text: String,
    /// The target, if it is not the event's own.
    target: Option<String>,
    has_message: bool,
}

impl Line {
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        if self.text.len() > 1 {
            self.text.push(',');
        }
        // The display of a value is compact JSON.
        self.text += &format!("{}:{}", Value::from(name), value.into());
    }

    fn field(&mut self, field: &Field, value: impl Into<Value>) {
        let name = field.name();
        if !name.starts_with(OF_LOG) {
            let name = name.strip_prefix("r#").unwrap_or(name);
            // The event's text comes before its fields.
            let is_taken = OWN.contains(&name) || name == MESSAGE && self.has_message;
            self.has_message |= name == MESSAGE;
            if is_taken {
                self.add(&format!("{COLLIDING}{name}"), value);
            } else {
                self.add(name, value);
            }
        } else if name == "log.target"
            && let Value::String(target) = value.into()
        {
            self.target = Some(target);
        }
    }
}

impl Visit for Line {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.field(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.field(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.field(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.field(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.field(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.field(field, chain(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.field(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use serde_json::json;
    use tracing::subscriber::with_default;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The lines that `log` writes.
    fn written(log: impl FnOnce()) -> String {
        let kept = Kept::default();
        let writer = kept.clone();
        let lines = tracing_subscriber::fmt().with_writer(move || writer.clone());
        with_default(lines.event_format(JsonLines).finish(), log);
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
    }

    #[derive(Debug, thiserror::Error)]
    #[error("outer \"{0}\"")]
    struct Outer(&'static str, #[source] io::Error);

    #[test]
    fn no_name_is_twice_in_a_line() {
        let text = written(|| {
            tracing::info!(target = "a", level = 1, timestamp = "now", "said");
        });
        let names = ["timestamp", "level", "target", "message"];
        assert!(
            names
                .iter()
                .all(|name| text.matches(&format!("\"{name}\":")).count() == 1),
            "{text}"
        );
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&line["level"], &line["target"]),
            (&json!("INFO"), &json!(module_path!()))
        );
        assert_eq!(
            (&line["field.target"], &line["field.level"], &line["field.timestamp"]),
            (&json!("a"), &json!(1), &json!("now"))
        );
    }

    #[test]
    fn a_line_is_an_object_and_tells_the_causes_of_errors() {
        let text = written(|| {
            let error = Outer("x\n", io::Error::other("inner"));
            let (none, some) = (None::<&str>, Some(3_u64));
            tracing::warn!(error = &error as &dyn Error, none, some, shown = %Outer("y", io::Error::other("z")), flag = true,
                negative = -1, "dotted.name" = ?[1], "what {} said", "it");
            tracing::info!("");
        });
        assert_eq!(text.lines().count(), 2);
        let mut line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let time = line["timestamp"].take();
        assert!(time.as_str().unwrap().ends_with('Z'), "{time}");
        let expected = json!({
            "timestamp": null, "level": "WARN", "message": "what it said", "error": "outer \"x\n\": inner", "some": 3,
            "shown": "outer \"y\"", "flag": true, "negative": -1, "dotted.name": "[1]", "target": module_path!(),
        });
        assert_eq!(line, expected);
    }
}
