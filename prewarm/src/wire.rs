//! Protobuf messages as bytes: walked field by field, edited in place of single fields, everything else kept as it is.
//!
//! The relay changes a handful of fields in messages that newer peers may have extended. Decoding such a message into a
//! struct and encoding it again would drop what the struct does not know; here every byte that is not asked for survives.
//! Pure functions; input is hostile.

use prost::Message;
use prost::encoding::{decode_varint, encode_varint};

/// Why bytes are not a protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends inside a field.
    #[error("the message ends inside field {field} at byte {at}")]
    Truncated {
        /// The field, 0 if its tag is what is cut.
        field: u32,
        /// Where the field begins.
        at: usize,
    },
    /// A tag or a varint that is not one.
    #[error("byte {at} begins no field")]
    Tag {
        /// Where.
        at: usize,
    },
    /// A group, which protobuf 3 does not have.
    #[error("field {field} at byte {at} is a group")]
    Group {
        /// The field.
        field: u32,
        /// Where.
        at: usize,
    },
}

/// A field's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 1.
    Fixed64([u8; 8]),
    /// Wire type 2: text, bytes, a message, a packed list.
    Bytes(&'a [u8]),
    /// Wire type 5.
    Fixed32([u8; 4]),
}

impl<'a> Value<'a> {
    /// The bytes of a field of wire type 2.
    #[must_use]
    pub fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Varint(_) | Self::Fixed64(_) | Self::Fixed32(_) => None,
        }
    }
}

/// One occurrence of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field<'a> {
    /// Its number.
    pub number: u32,
    /// Its value.
    pub value: Value<'a>,
    /// Tag and value as they are in the message.
    pub raw: &'a [u8],
}

/// The fields of a message, in its order. Ends after the first error.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    message: &'a [u8],
    at: usize,
}

/// Walks the fields of `message`, one level deep.
#[must_use]
pub fn fields(message: &[u8]) -> Fields<'_> {
    Fields { message, at: 0 }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.message.len() {
            return None;
        }
        let at = self.at;
        let field = read(self.message, at);
        self.at = match &field {
            Ok(field) => at + field.raw.len(),
            Err(_) => self.message.len(),
        };
        Some(field)
    }
}

fn read(message: &[u8], at: usize) -> Result<Field<'_>, WireError> {
    let mut rest = &message[at..];
    let tag = decode_varint(&mut rest).map_err(|_| WireError::Tag { at })?;
    let number = u32::try_from(tag >> 3)
        .ok()
        .filter(|number| (1..1 << 29).contains(number))
        .ok_or(WireError::Tag { at })?;
    let truncated = WireError::Truncated { field: number, at };
    let value = match tag & 7 {
        0 => Value::Varint(decode_varint(&mut rest).map_err(|_| truncated)?),
        1 => Value::Fixed64(*take(&mut rest).ok_or(truncated)?),
        2 => {
            let length = decode_varint(&mut rest).map_err(|_| truncated)?;
            let length = usize::try_from(length).map_err(|_| truncated)?;
            let (bytes, behind) = rest.split_at_checked(length).ok_or(truncated)?;
            rest = behind;
            Value::Bytes(bytes)
        }
        5 => Value::Fixed32(*take(&mut rest).ok_or(truncated)?),
        3 | 4 => return Err(WireError::Group { field: number, at }),
        _ => return Err(WireError::Tag { at }),
    };
    let raw = &message[at..message.len() - rest.len()];
    Ok(Field { number, value, raw })
}

fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (taken, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(taken)
}

/// What becomes of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// It stays, byte for byte.
    Keep,
    /// It goes.
    Drop,
    /// It becomes a field of wire type 2 with this content, under the same number.
    Bytes(Vec<u8>),
}

/// Copies `message`, each field as `edit` says.
pub fn edit<E: From<WireError>>(
    message: &[u8],
    mut edit: impl FnMut(&Field<'_>) -> Result<Edit, E>,
) -> Result<Vec<u8>, E> {
    let mut out = Vec::with_capacity(message.len());
    for field in fields(message) {
        let field = field?;
        match edit(&field)? {
            Edit::Keep => out.extend_from_slice(field.raw),
            Edit::Drop => {}
            Edit::Bytes(content) => put_bytes(&mut out, field.number, &content),
        }
    }
    Ok(out)
}

/// Appends a field of wire type 2.
pub fn put_bytes(out: &mut Vec<u8>, number: u32, content: &[u8]) {
    encode_varint(u64::from(number) << 3 | 2, out);
    encode_varint(content.len() as u64, out);
    out.extend_from_slice(content);
}

/// Appends a message, even an empty one.
pub fn put_message(out: &mut Vec<u8>, number: u32, message: &impl Message) {
    put_bytes(out, number, &message.encode_to_vec());
}

/// Appends a varint, unless it is 0, which protobuf 3 leaves out.
pub fn put_varint(out: &mut Vec<u8>, number: u32, value: u64) {
    if value != 0 {
        encode_varint(u64::from(number) << 3, out);
        encode_varint(value, out);
    }
}

/// The last occurrence of a field of wire type 2, which is the one that counts for text.
pub fn last_bytes(message: &[u8], number: u32) -> Result<Option<&[u8]>, WireError> {
    let mut found = None;
    for field in fields(message) {
        let field = field?;
        if field.number == number {
            found = field.value.bytes().or(found);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hullspeed_proto::cri::v1::{PodSandbox, PodSandboxMetadata};
    use proptest::prelude::*;

    fn sandbox() -> Vec<u8> {
        let sandbox = PodSandbox {
            id: "abc".into(),
            metadata: Some(PodSandboxMetadata {
                name: "n".into(),
                ..Default::default()
            }),
            created_at: 1 << 60,
            ..Default::default()
        };
        sandbox.encode_to_vec()
    }

    #[test]
    fn what_is_not_edited_survives_and_so_does_an_unknown_field() {
        let mut message = sandbox();
        put_bytes(&mut message, 4000, b"from the future");
        message.extend_from_slice(&[0x7d, 1, 2, 3, 4]);
        let same = edit::<WireError>(&message, |_| Ok(Edit::Keep)).unwrap();
        assert_eq!(same, message);
        let edited = edit::<WireError>(&message, |field| {
            Ok(if field.number == 1 {
                Edit::Bytes(b"other".to_vec())
            } else {
                Edit::Keep
            })
        })
        .unwrap();
        assert_eq!(last_bytes(&edited, 1).unwrap(), Some(b"other".as_slice()));
        assert_eq!(last_bytes(&edited, 4000).unwrap(), Some(b"from the future".as_slice()));
        assert_eq!(PodSandbox::decode(edited.as_slice()).unwrap().created_at, 1 << 60);
    }

    #[test]
    fn damage_is_named() {
        let message = sandbox();
        for end in 1..message.len() {
            let walked: Result<Vec<_>, _> = fields(&message[..end]).collect();
            if let Ok(walked) = walked {
                let length: usize = walked.iter().map(|field| field.raw.len()).sum();
                assert_eq!(length, end);
            }
        }
        let errors = |bytes: &[u8]| fields(bytes).find_map(Result::err);
        assert_eq!(errors(&[0x0a, 5, 1]), Some(WireError::Truncated { field: 1, at: 0 }));
        assert_eq!(errors(&[0x0b]), Some(WireError::Group { field: 1, at: 0 }));
        assert_eq!(errors(&[0x02, 0]), Some(WireError::Tag { at: 0 }));
        assert_eq!(errors(&[0xff; 11]), Some(WireError::Tag { at: 0 }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_walked_to_their_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let walked: Vec<_> = fields(&bytes).collect();
            let good: usize = walked.iter().flatten().map(|field| field.raw.len()).sum();
            prop_assert!(walked.iter().any(Result::is_err) || good == bytes.len());
            if let Ok(same) = edit::<WireError>(&bytes, |_| Ok(Edit::Keep)) {
                prop_assert_eq!(same, bytes);
            }
        }
    }
}
