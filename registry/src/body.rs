//! Response bodies under a progress timeout and a byte bound.

use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;

use crate::error::Fault;
use crate::limits::{MAX_ERROR_BYTES, MAX_REASON_CHARS};

/// The next piece of a body, or a fault if nothing arrives for `idle`.
pub(crate) async fn next(response: &mut Response, idle: Duration) -> Result<Option<Bytes>, Fault> {
    match tokio::time::timeout(idle, response.chunk()).await {
        Ok(Ok(piece)) => Ok(piece),
        Ok(Err(error)) => Err(Fault::broken(error)),
        Err(_) => Err(Fault::Stalled(idle)),
    }
}

/// A whole body of at most `limit` bytes.
pub(crate) async fn collect(mut response: Response, limit: u64, idle: Duration) -> Result<Bytes, Fault> {
    if response.content_length().is_some_and(|length| length > limit) {
        return Err(Fault::TooLarge { limit });
    }
    let mut body = Vec::new();
    while let Some(piece) = next(&mut response, idle).await? {
        if (body.len() + piece.len()) as u64 > limit {
            return Err(Fault::TooLarge { limit });
        }
        body.extend_from_slice(&piece);
    }
    Ok(body.into())
}

/// What a registry says about a failure: the messages of its error document, or the start of its text.
///
/// Never fails and never waits long: the status alone is enough of an error.
pub(crate) async fn reason(mut response: Response, idle: Duration) -> String {
    let mut body = Vec::new();
    while (body.len() as u64) < MAX_ERROR_BYTES {
        match next(&mut response, idle.min(Duration::from_secs(5))).await {
            Ok(Some(piece)) => body.extend_from_slice(&piece),
            Ok(None) | Err(_) => break,
        }
    }
    let text = messages(&body).unwrap_or_else(|| {
        let text = String::from_utf8_lossy(&body);
        // Error pages of proxies and stores say nothing in one line.
        if text.trim_start().starts_with('<') {
            String::new()
        } else {
            text.into_owned()
        }
    });
    clean(&text)
}

fn messages(body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Document {
        errors: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let document: Document = serde_json::from_slice(body).ok()?;
    let line = |entry: Entry| {
        if entry.message.is_empty() {
            entry.code
        } else {
            entry.message
        }
    };
    Some(document.errors.into_iter().map(line).collect::<Vec<_>>().join("; "))
}

/// One line without control characters, shortened: what servers say ends up on terminals and in logs.
fn clean(text: &str) -> String {
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(MAX_REASON_CHARS).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_documents_are_quoted_in_one_clean_line() {
        let document = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest\u001b[31m unknown","detail":{}},{"code":"X"}]}"#;
        assert_eq!(clean(&messages(document).unwrap()), "manifest [31m unknown; X");
        assert_eq!(messages(b"nonsense"), None);
        assert_eq!(clean(&"x".repeat(1000)).len(), MAX_REASON_CHARS);
    }
}
