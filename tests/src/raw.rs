//! gRPC calls with messages as bytes, and those bytes as trees: what a test compares is then all that was answered, not
//! only the fields that our own definitions know.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use bytes::{Buf as _, BufMut as _, Bytes};
use http::uri::PathAndQuery;
use serde_json::{Map, Value, json};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

/// No single call of a test should take longer.
pub const CALL_LIMIT: Duration = Duration::from_secs(60);

/// The longest message that is read or sent.
const MAX_MESSAGE: usize = 128 << 20;

/// Messages within messages; deeper bytes are shown as such.
const MAX_DEPTH: usize = 16;

/// The runtime service.
pub const RUNTIME: &str = "runtime.v1.RuntimeService";

/// Messages as they are on the wire.
#[derive(Debug, Clone, Copy, Default)]
struct BytesCodec;

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

/// A client of any service on a socket.
#[derive(Debug, Clone)]
pub struct RawClient {
    grpc: Grpc<Channel>,
}

impl RawClient {
    /// Connects.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let channel = crate::cri::connect(socket).await?;
        let grpc = Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE);
        Ok(Self { grpc })
    }

    async fn ready(&mut self, method: &str) -> Result<PathAndQuery, Status> {
        let gone = |error: tonic::transport::Error| Status::unavailable(error.to_string());
        self.grpc.ready().await.map_err(gone)?;
        let path = format!("/{method}");
        PathAndQuery::from_maybe_shared(path).map_err(|error| Status::internal(error.to_string()))
    }

    /// One answer of `method` (`package.Service/Method`).
    pub async fn call(&mut self, method: &str, request: impl Into<Bytes>) -> Result<Bytes, Status> {
        let path = self.ready(method).await?;
        let mut request = Request::new(request.into());
        request.set_timeout(CALL_LIMIT);
        let answer = self.grpc.unary(request, path, BytesCodec);
        // A server that forgets the deadline should not stop the test.
        match tokio::time::timeout(CALL_LIMIT + CALL_LIMIT / 4, answer).await {
            Ok(answer) => Ok(answer?.into_inner()),
            Err(_) => Err(Status::deadline_exceeded(
                "no answer, not even an error, at the deadline",
            )),
        }
    }

    /// The stream of answers of `method`.
    pub async fn stream(&mut self, method: &str, request: impl Into<Bytes>) -> Result<Streaming<Bytes>, Status> {
        let path = self.ready(method).await?;
        let request = Request::new(request.into());
        let answer = self.grpc.server_streaming(request, path, BytesCodec).await?;
        Ok(answer.into_inner())
    }

    /// What `method` of the runtime service answers a message, as a tree; an error is one, too.
    pub async fn observe(&mut self, method: &str, request: &impl prost::Message) -> Value {
        match self.call(&format!("{RUNTIME}/{method}"), request.encode_to_vec()).await {
            Ok(answer) => tree(&answer),
            Err(status) => error(&status),
        }
    }
}

/// A status as a client sees it.
#[must_use]
pub fn error(status: &Status) -> Value {
    let details = tree(status.details());
    json!({"code": Code::description(&status.code()), "message": status.message(), "details": details})
}

/// A message as a tree: the values of each field by its number, in order; entries of maps sorted. Bytes are a text if
/// they read as one, JSON if they read as that, a message if they read as one, else hexadecimal. That is a guess, but the
/// same one for the same bytes.
#[must_use]
pub fn tree(message: &[u8]) -> Value {
    fields(message, 0).unwrap_or_else(|| Value::from(hex::encode(message)))
}

fn fields(mut rest: &[u8], depth: usize) -> Option<Value> {
    let mut found = Map::new();
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        let value = match key & 7 {
            0 => Value::from(varint(&mut rest)?),
            1 => Value::from(u64::from_le_bytes(take(&mut rest, 8)?.try_into().ok()?)),
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                bytes_value(take(&mut rest, length)?, depth)
            }
            5 => Value::from(u32::from_le_bytes(take(&mut rest, 4)?.try_into().ok()?)),
            _ => return None,
        };
        let number = key >> 3;
        if number == 0 || number > 536_870_911 {
            return None;
        }
        let values = found.entry(number.to_string()).or_insert_with(|| json!([]));
        values.as_array_mut()?.push(value);
    }
    for values in found.values_mut() {
        sort_entries(values);
    }
    Some(Value::Object(found))
}

/// Entries of maps come in any order; they are the repeated messages with a text for a key and one value.
fn sort_entries(values: &mut Value) {
    let Some(list) = values.as_array_mut() else { return };
    let is_entry = |value: &Value| {
        let Some(object) = value.as_object() else { return false };
        object.keys().all(|key| key == "1" || key == "2") && object.get("1").is_some_and(|key| key[0].is_string())
    };
    if list.len() > 1 && list.iter().all(is_entry) {
        list.sort_by_key(ToString::to_string);
    }
}

fn bytes_value(bytes: &[u8], depth: usize) -> Value {
    if let Ok(text) = std::str::from_utf8(bytes)
        && !text
            .chars()
            .any(|c| c.is_control() && c != '\t' && (c != '\n' || text.len() < 16))
    {
        return match serde_json::from_str::<Value>(text) {
            Ok(json) if json.is_object() => json!({ "json": json }),
            _ => Value::from(text),
        };
    }
    let message = if depth < MAX_DEPTH {
        fields(bytes, depth + 1)
    } else {
        None
    };
    message.unwrap_or_else(|| Value::from(hex::encode(bytes)))
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (&byte, tail) = rest.split_first()?;
        *rest = tail;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(head)
}

/// Where two trees differ: path, left, right.
#[must_use]
pub fn differences(left: &Value, right: &Value) -> Vec<(String, Value, Value)> {
    let mut found = Vec::new();
    compare("", left, right, &mut found);
    found
}

fn compare(path: &str, left: &Value, right: &Value, found: &mut Vec<(String, Value, Value)>) {
    match (left, right) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<_> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let (a, b) = (a.get(key), b.get(key));
                let absent = Value::from("(absent)");
                let path = format!("{path}/{key}");
                compare(&path, a.unwrap_or(&absent), b.unwrap_or(&absent), found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                let path = format!("{path}[{index}]");
                compare(&path, a, b, found);
            }
        }
        _ if left == right => {}
        _ => found.push((path.into(), left.clone(), right.clone())),
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_proto::cri::v1::{PodSandbox, PodSandboxMetadata, PodSandboxStatusResponse};
    use prost::Message as _;

    use super::*;

    #[test]
    fn messages_become_trees_whatever_the_order_of_their_maps() {
        let sandbox = |labels: &[(&str, &str)]| PodSandbox {
            id: "abc".into(),
            metadata: Some(PodSandboxMetadata {
                name: "n".into(),
                attempt: 3,
                ..Default::default()
            }),
            labels: labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect(),
            ..Default::default()
        };
        let left = tree(&sandbox(&[("a", "1"), ("b", "2"), ("c", "3")]).encode_to_vec());
        let right = tree(&sandbox(&[("c", "3"), ("b", "2"), ("a", "1")]).encode_to_vec());
        assert_eq!(left, right);
        assert_eq!(left["1"], json!(["abc"]));
        assert_eq!(left["2"], json!([{"1": ["n"], "4": [3]}]));
        let other = tree(&sandbox(&[("c", "3"), ("b", "2"), ("a", "x")]).encode_to_vec());
        let found = differences(&left, &other);
        assert_eq!(found, [("/5[0]/2[0]".into(), json!("1"), json!("x"))]);
    }

    #[test]
    fn texts_of_json_are_taken_apart_and_anything_else_is_survived() {
        let status = PodSandboxStatusResponse {
            info: [("info".to_string(), "{\"pid\":7}".to_string())].into(),
            ..Default::default()
        };
        let tree = tree(&status.encode_to_vec());
        assert_eq!(tree["2"][0]["2"], json!([{"json": {"pid": 7}}]));
        for garbage in [&[0xff_u8, 0xff][..], &[0x0a], &[0x07], &[0; 3]] {
            assert_eq!(super::tree(garbage), Value::from(hex::encode(garbage)));
        }
    }
}
