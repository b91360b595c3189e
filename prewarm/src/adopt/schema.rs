//! Whether we know every field of a request, at every depth. A field that we do not know may ask for something that a
//! hull is not; such a request is containerd's.

use crate::wire::{self, Value, WireError};

/// A field that is not ours to judge.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// It is not a protobuf message.
    #[error("{message}")]
    Wire {
        /// The message.
        message: &'static str,
        /// What is wrong with it.
        #[source]
        source: WireError,
    },
    /// A field that CRI had not when this was written.
    #[error("{message} has an unknown field {number}")]
    Unknown {
        /// The message.
        message: &'static str,
        /// The field.
        number: u32,
    },
    /// A field of another type than CRI's.
    #[error("field {number} of {message} has another type")]
    Type {
        /// The message.
        message: &'static str,
        /// The field.
        number: u32,
    },
}

/// What a field holds.
#[derive(Clone, Copy)]
enum Kind {
    /// A number, a truth value or one of an enumeration.
    Number,
    /// Any count of numbers, each on its own or packed.
    Numbers,
    /// Text.
    Text,
    /// A message.
    Message(&'static Schema),
    /// A message of which only its presence counts.
    Opaque,
}

/// The fields of a message.
struct Schema {
    name: &'static str,
    fields: &'static [(u32, Kind)],
}

use Kind::{Message, Number, Numbers, Opaque, Text};

static ENTRY: Schema = Schema {
    name: "map entry",
    fields: &[(1, Text), (2, Text)],
};

static REQUEST: Schema = Schema {
    name: "RunPodSandboxRequest",
    fields: &[(1, Message(&CONFIG)), (2, Text)],
};

static CONFIG: Schema = Schema {
    name: "PodSandboxConfig",
    fields: &[
        (1, Message(&METADATA)),
        (2, Text),
        (3, Text),
        (4, Message(&DNS)),
        (5, Message(&PORT)),
        (6, Message(&ENTRY)),
        (7, Message(&ENTRY)),
        (8, Message(&LINUX)),
        (9, Opaque),
    ],
};

static METADATA: Schema = Schema {
    name: "PodSandboxMetadata",
    fields: &[(1, Text), (2, Text), (3, Text), (4, Number)],
};

static DNS: Schema = Schema {
    name: "DNSConfig",
    fields: &[(1, Text), (2, Text), (3, Text)],
};

static PORT: Schema = Schema {
    name: "PortMapping",
    fields: &[(1, Number), (2, Number), (3, Number), (4, Text)],
};

static LINUX: Schema = Schema {
    name: "LinuxPodSandboxConfig",
    fields: &[
        (1, Text),
        (2, Message(&SECURITY)),
        (3, Message(&ENTRY)),
        (4, Message(&RESOURCES)),
        (5, Message(&RESOURCES)),
    ],
};

static SECURITY: Schema = Schema {
    name: "LinuxSandboxSecurityContext",
    fields: &[
        (1, Message(&NAMESPACES)),
        (2, Message(&SELINUX)),
        (3, Message(&INTEGER)),
        (4, Number),
        (5, Numbers),
        (6, Number),
        (7, Text),
        (8, Message(&INTEGER)),
        (9, Message(&PROFILE)),
        (10, Message(&PROFILE)),
        (11, Number),
    ],
};

static NAMESPACES: Schema = Schema {
    name: "NamespaceOption",
    fields: &[(1, Number), (2, Number), (3, Number), (4, Text), (5, Message(&USERNS))],
};

static USERNS: Schema = Schema {
    name: "UserNamespace",
    fields: &[(1, Number), (2, Message(&MAPPING)), (3, Message(&MAPPING))],
};

static MAPPING: Schema = Schema {
    name: "IDMapping",
    fields: &[(1, Number), (2, Number), (3, Number)],
};

static SELINUX: Schema = Schema {
    name: "SELinuxOption",
    fields: &[(1, Text), (2, Text), (3, Text), (4, Text)],
};

static INTEGER: Schema = Schema {
    name: "Int64Value",
    fields: &[(1, Number)],
};

static PROFILE: Schema = Schema {
    name: "SecurityProfile",
    fields: &[(1, Number), (2, Text)],
};

static RESOURCES: Schema = Schema {
    name: "LinuxContainerResources",
    fields: &[
        (1, Number),
        (2, Number),
        (3, Number),
        (4, Number),
        (5, Number),
        (6, Text),
        (7, Text),
        (8, Message(&HUGEPAGES)),
        (9, Message(&ENTRY)),
        (10, Number),
    ],
};

static HUGEPAGES: Schema = Schema {
    name: "HugepageLimit",
    fields: &[(1, Text), (2, Number)],
};

/// Walks a RunPodSandboxRequest to its last field.
pub fn check(request: &[u8]) -> Result<(), SchemaError> {
    walk(request, &REQUEST)
}

/// The schema has no cycle, so its depth bounds the recursion.
fn walk(message: &[u8], schema: &'static Schema) -> Result<(), SchemaError> {
    for field in wire::fields(message) {
        let field = field.map_err(|source| SchemaError::Wire {
            message: schema.name,
            source,
        })?;
        let known = schema.fields.iter().find(|(number, _)| *number == field.number);
        let Some((_, kind)) = known else {
            return Err(SchemaError::Unknown {
                message: schema.name,
                number: field.number,
            });
        };
        match (kind, field.value) {
            (Number | Numbers, Value::Varint(_)) | (Numbers | Text | Opaque, Value::Bytes(_)) => {}
            (Message(inner), Value::Bytes(bytes)) => walk(bytes, inner)?,
            _ => {
                return Err(SchemaError::Type {
                    message: schema.name,
                    number: field.number,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adopt::samples::any_request;
    use crate::wire::put_bytes;
    use proptest::prelude::*;
    use prost::Message as _;

    /// Every message of the request, as the path of field numbers that leads to it.
    fn messages(bytes: &[u8], schema: &'static Schema, path: &[usize], found: &mut Vec<Vec<usize>>) {
        found.push(path.to_vec());
        for (index, field) in wire::fields(bytes).flatten().enumerate() {
            let kind = schema.fields.iter().find(|(number, _)| *number == field.number);
            if let Some((_, Message(inner))) = kind {
                let inside = [path, &[index]].concat();
                messages(field.value.bytes().unwrap(), inner, &inside, found);
            }
        }
    }

    /// The message with `extra` behind the last field of the message at `path`.
    fn grown(bytes: &[u8], path: &[usize], extra: &[u8]) -> Vec<u8> {
        let Some((&at, rest)) = path.split_first() else {
            return [bytes, extra].concat();
        };
        let mut out = Vec::new();
        for (index, field) in wire::fields(bytes).flatten().enumerate() {
            if index == at {
                put_bytes(
                    &mut out,
                    field.number,
                    &grown(field.value.bytes().unwrap(), rest, extra),
                );
            } else {
                out.extend_from_slice(field.raw);
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_prost_encodes_is_known_and_a_field_more_is_not(request in any_request(), which: prop::sample::Index) {
            let bytes = request.encode_to_vec();
            prop_assert_eq!(check(&bytes), Ok(()));
            let mut found = Vec::new();
            messages(&bytes, &REQUEST, &[], &mut found);
            let path = &found[which.index(found.len())];
            let mut text = Vec::new();
            put_bytes(&mut text, 77, b"x");
            for extra in [text.as_slice(), &[0xe8, 0x07, 1], &[0xed, 0x07, 1, 2, 3, 4]] {
                let refused = check(&grown(&bytes, path, extra));
                prop_assert!(matches!(refused, Err(SchemaError::Unknown { .. })), "{:?} at {:?}", refused, path);
            }
        }

        #[test]
        fn any_bytes_are_walked(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = check(&bytes);
        }
    }

    #[test]
    fn a_known_number_of_another_type_is_refused() {
        let refused = check(&[0x08, 1]);
        let message = "RunPodSandboxRequest";
        assert_eq!(refused, Err(SchemaError::Type { message, number: 1 }));
        assert!(matches!(check(&[0x0a, 9, 1]), Err(SchemaError::Wire { .. })));
    }
}
