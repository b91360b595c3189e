//! The JSON of a sandbox's record: `{"Version":"v1","Metadata":{"ID":…,"Name":…,"Config":{…},…}}`. Pure functions.
//!
//! `Name` and the whole `Config` become the pod's, its cgroup among them: containerd uses that for nothing but a pod's
//! statistics (and, since 2.0, as an argument of CNI's DEL, where it is the plugin's word against the ADD's). Natively
//! both are the pod's. `RuntimeHandler` stays: it chooses the CNI configuration that takes the interface down, which
//! must be the one that put it up. Everything else is about the sandbox itself.

use std::collections::{BTreeMap, HashMap};

use hullspeed_proto::cri::v1::PodSandboxConfig;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::adopt::gojson::{self, GoJsonError};
use crate::ledger::{Adoption, sandbox_name};

/// The label of every record of CRI's, and its value for sandboxes.
pub const KIND_LABEL: &str = "io.cri-containerd.kind";
/// Its value for sandboxes.
pub const KIND_SANDBOX: &str = "sandbox";

/// The version of records that every containerd until now writes.
const VERSION: &str = "v1";

/// Why a record cannot be read or rewritten.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// There is no metadata of CRI's in it.
    #[error("there is no metadata in it")]
    Missing,
    /// It is not JSON, or a value in it is of another type.
    #[error("{what} is not as expected")]
    Syntax {
        /// What.
        what: &'static str,
        /// How.
        #[source]
        source: serde_json::Error,
    },
    /// A configuration that is not one.
    #[error("its configuration is not as expected")]
    Config(#[source] GoJsonError),
    /// Written by a containerd that we do not know.
    #[error("its version is {found:?}")]
    Version {
        /// The version.
        found: String,
    },
    /// It is about another sandbox.
    #[error("it is about sandbox {found:?}")]
    Id {
        /// Which.
        found: String,
    },
    /// The pod has no name.
    #[error("the adoption has no metadata")]
    Nameless,
}

type Raw = BTreeMap<String, Box<RawValue>>;

fn syntax(what: &'static str) -> impl Fn(serde_json::Error) -> RecordError {
    move |source| RecordError::Syntax { what, source }
}

/// An edited record.
pub(super) struct Edited {
    /// The record.
    pub(super) json: Vec<u8>,
    /// The labels of the configuration that it had before.
    pub(super) labels_before: HashMap<String, String>,
}

fn open(json: &[u8]) -> Result<(Raw, Raw), RecordError> {
    let top: Raw = serde_json::from_slice(json).map_err(syntax("the record"))?;
    let version = text(&top, "Version")?;
    if version != VERSION {
        return Err(RecordError::Version { found: version });
    }
    let metadata = top.get("Metadata").ok_or(RecordError::Missing)?;
    let metadata: Raw = serde_json::from_str(metadata.get()).map_err(syntax("Metadata"))?;
    Ok((top, metadata))
}

fn text(of: &Raw, key: &'static str) -> Result<String, RecordError> {
    let value = of.get(key).ok_or(RecordError::Missing)?;
    serde_json::from_str(value.get()).map_err(syntax(key))
}

fn config(metadata: &Raw) -> Result<PodSandboxConfig, RecordError> {
    let config = metadata.get("Config").ok_or(RecordError::Missing)?;
    gojson::decode(config.get()).map_err(RecordError::Config)
}

/// The record with the pod's name and configuration.
pub(super) fn edit(json: &[u8], adoption: &Adoption) -> Result<Edited, RecordError> {
    let (mut top, mut metadata) = open(json)?;
    let id = text(&metadata, "ID")?;
    if id != adoption.sandbox_id {
        return Err(RecordError::Id { found: id });
    }
    let labels_before = config(&metadata)?.labels;
    let pod = adoption.config.metadata.as_ref().ok_or(RecordError::Nameless)?;
    let raw = |what, text| RawValue::from_string(text).map_err(syntax(what));
    let name = serde_json::to_string(&sandbox_name(pod)).map_err(syntax("Name"))?;
    metadata.insert("Name".into(), raw("Name", name)?);
    let config = gojson::encode(&adoption.config).map_err(RecordError::Config)?;
    metadata.insert("Config".into(), raw("Config", config)?);
    let metadata = serde_json::to_string(&metadata).map_err(syntax("Metadata"))?;
    top.insert("Metadata".into(), raw("Metadata", metadata)?);
    let json = serde_json::to_vec(&top).map_err(syntax("the record"))?;
    Ok(Edited { json, labels_before })
}

/// The record's labels: those of the pause image stay, the pod's take the place of those that its configuration had
/// before. That is what containerd writes for a new sandbox.
pub(super) fn labels(
    now: &HashMap<String, String>,
    before: &HashMap<String, String>,
    adoption: &Adoption,
) -> HashMap<String, String> {
    let kept = now.iter().filter(|(key, _)| !before.contains_key(*key));
    let pods = adoption.config.labels.iter();
    let mut labels: HashMap<_, _> = kept
        .chain(pods)
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    labels.insert(KIND_LABEL.into(), KIND_SANDBOX.into());
    labels
}

/// What our own extension says.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    adopted_at: i64,
    runtime_handler: String,
}

/// The note of a sandbox that was taken from its pod: it is not to be handed out, whoever reads it.
pub(super) const NOTE_OF_NOBODY: &[u8] = b"null";

/// Whether the note says so.
pub(in crate::adopt) fn is_nobodys(note: &[u8]) -> bool {
    note == NOTE_OF_NOBODY
}

/// The note for an adoption.
pub(super) fn note(adoption: &Adoption) -> Vec<u8> {
    let note = Note {
        adopted_at: adoption.adopted_at,
        runtime_handler: adoption.runtime_handler.clone(),
    };
    serde_json::to_vec(&note).unwrap_or_default()
}

/// The adoption that a record tells of, from its metadata and our note.
pub(in crate::adopt) fn adoption(metadata: &[u8], note: &[u8]) -> Result<Adoption, RecordError> {
    let (_, metadata) = open(metadata)?;
    let note: Note = serde_json::from_slice(note).map_err(syntax("the note of its adoption"))?;
    Ok(Adoption {
        sandbox_id: text(&metadata, "ID")?,
        config: config(&metadata)?,
        runtime_handler: note.runtime_handler,
        adopted_at: note.adopted_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adopt::samples::any_config;
    use crate::adopt::testing;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn adoption_of(config: PodSandboxConfig) -> Adoption {
        Adoption {
            sandbox_id: "abc".into(),
            config,
            runtime_handler: "runc".into(),
            adopted_at: 1_700_000_000_123_456_789,
        }
    }

    /// As containerd writes it, with keys of a version to come.
    fn record() -> Value {
        json!({
            "Version": "v1",
            "Future": [1, {"a": null}],
            "Metadata": {
                "ID": "abc",
                "Name": "hull-1_hullspeed_hull-1_0",
                "Config": {"metadata": {"name": "hull-1"}, "labels": {"io.hullspeed.hull": "mark"}, "future": 1},
                "NetNSPath": "/var/run/netns/cni-1",
                "IP": "10.1.2.3",
                "AdditionalIPs": null,
                "RuntimeHandler": "",
                "CNIResult": {"Interfaces": {"eth0": {"Mac": "<&>", "Number": 1.5}}},
                "ProcessLabel": "",
                "Future": 18_446_744_073_709_551_615_u64,
            },
        })
    }

    #[test]
    fn name_and_configuration_become_the_pods_and_nothing_else_changes() {
        let adoption = adoption_of(testing::pod("web"));
        let edited = edit(record().to_string().as_bytes(), &adoption).unwrap();
        let mut after: Value = serde_json::from_slice(&edited.json).unwrap();
        assert_eq!(after["Metadata"]["Name"], "web_default_web-uid_0");
        assert_eq!(
            after["Metadata"]["Config"]["linux"]["cgroup_parent"],
            "/kubepods/besteffort/pod1"
        );
        let before = record();
        for key in ["Name", "Config"] {
            after["Metadata"][key] = before["Metadata"][key].clone();
        }
        assert_eq!(after, before);
        assert_eq!(edited.labels_before["io.hullspeed.hull"], "mark");
        // Numbers are kept as they are written, however large.
        let exact = r#"{"Version":"v1","Metadata":{"ID":"abc","Config":{},"N":1.000000000000000000001e999}}"#;
        let kept = edit(exact.as_bytes(), &adoption).unwrap().json;
        assert!(String::from_utf8(kept).unwrap().contains("1.000000000000000000001e999"));
    }

    #[test]
    fn labels_are_those_of_image_pod_and_kind() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let adoption = adoption_of(testing::pod("web"));
        let hulls = map(&[("io.hullspeed.hull", "mark")]);
        let record = map(&[
            ("image", "pause"),
            ("io.hullspeed.hull", "mark"),
            (KIND_LABEL, KIND_SANDBOX),
        ]);
        let once = labels(&record, &hulls, &adoption);
        let expected = [
            ("image", "pause"),
            ("io.kubernetes.pod.name", "web"),
            (KIND_LABEL, KIND_SANDBOX),
        ];
        assert_eq!(once, map(&expected));
        assert_eq!(
            labels(&once, &adoption.config.labels, &adoption),
            once,
            "again changes nothing"
        );
    }

    #[test]
    fn records_that_are_not_ours_to_edit_are_refused() {
        let adoption = adoption_of(testing::pod("web"));
        let refused = |change: &dyn Fn(&mut Value)| {
            let mut record = record();
            change(&mut record);
            edit(record.to_string().as_bytes(), &adoption).err().unwrap()
        };
        assert!(matches!(
            refused(&|of| of["Version"] = "v2".into()),
            RecordError::Version { .. }
        ));
        assert!(matches!(
            refused(&|of| of["Metadata"]["ID"] = "x".into()),
            RecordError::Id { .. }
        ));
        assert!(matches!(
            refused(&|of| of["Metadata"] = 1.into()),
            RecordError::Syntax { .. }
        ));
        assert!(matches!(
            refused(&|of| of["Metadata"]["Config"] = 1.into()),
            RecordError::Config(_)
        ));
        assert!(matches!(edit(b"", &adoption), Err(RecordError::Syntax { .. })));
        let nameless = adoption_of(PodSandboxConfig::default());
        assert!(matches!(
            edit(record().to_string().as_bytes(), &nameless),
            Err(RecordError::Nameless)
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_adoption_can_be_read_from_the_record(config in any_config()) {
            prop_assume!(config.metadata.is_some());
            let adoption = adoption_of(config);
            let edited = edit(record().to_string().as_bytes(), &adoption).unwrap();
            let read = super::adoption(&edited.json, &note(&adoption)).unwrap();
            prop_assert_eq!(&read, &adoption);
            let again = edit(&edited.json, &adoption).unwrap();
            prop_assert_eq!(again.json, edited.json);
        }

        #[test]
        fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(edit(&bytes, &adoption_of(testing::pod("web"))).is_err());
        }
    }
}
