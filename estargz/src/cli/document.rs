//! Manifests, indices and configurations as documents whose untouched parts keep their very bytes.
//!
//! Conversion changes a few members and must not disturb the rest: unknown members, their order and the spelling of
//! numbers survive, because every value stays the text it was.

use std::fmt;

use hullspeed_registry::Digest;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(super) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(super) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// Annotation of a manifest in an OCI layout's `index.json`.
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation by which BuildKit binds an attestation to the manifest that it describes.
pub(super) const REFERENCE_DIGEST: &str = "vnd.docker.reference.digest";

/// A JSON object with its members in order and as text.
#[derive(Debug, Clone, Default)]
pub(super) struct Document(Vec<(String, Box<RawValue>)>);

impl Document {
    pub(super) fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// A member; `None` if it is absent or `null`.
    pub(super) fn find<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, serde_json::Error> {
        match self.0.iter().find(|(name, _)| name == key) {
            Some((_, value)) => serde_json::from_str::<Option<T>>(value.get()),
            None => Ok(None),
        }
    }

    /// A member that must be there.
    pub(super) fn need<T: DeserializeOwned>(&self, key: &str) -> Result<T, serde_json::Error> {
        self.find(key)?
            .ok_or_else(|| serde::de::Error::custom(format!("{key} is missing")))
    }

    /// Replaces a member in its place, or adds it at the end.
    pub(super) fn set(&mut self, key: &str, value: &impl Serialize) -> Result<(), serde_json::Error> {
        let value = serde_json::value::to_raw_value(value)?;
        match self.0.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, key: &str) {
        self.0.retain(|(name, _)| name != key);
    }

    pub(super) fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// The value of an annotation.
    pub(super) fn annotation(&self, key: &str) -> Option<String> {
        self.find::<Self>("annotations").ok()??.find(key).ok()?
    }

    /// Adds or replaces annotations and keeps the others.
    pub(super) fn annotate(&mut self, pairs: &[(&str, &str)]) -> Result<(), serde_json::Error> {
        let mut annotations = self.find::<Self>("annotations")?.unwrap_or_default();
        for (key, value) in pairs {
            annotations.set(key, value)?;
        }
        self.set("annotations", &annotations)
    }
}

/// A blob as its descriptor describes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct BlobRef {
    pub(super) digest: Digest,
    pub(super) size: u64,
}

impl BlobRef {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self {
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
        }
    }

    /// What a descriptor points to.
    pub(super) fn from_descriptor(descriptor: &Document) -> Result<Self, serde_json::Error> {
        let digest: String = descriptor.need("digest")?;
        let digest = digest.parse().map_err(serde::de::Error::custom)?;
        Ok(Self {
            digest,
            size: descriptor.need("size")?,
        })
    }

    /// Makes a descriptor point here; data that it had inlined goes.
    pub(super) fn point(&self, descriptor: &mut Document, media_type: &str) -> Result<(), serde_json::Error> {
        descriptor.remove("data");
        descriptor.set("mediaType", &media_type)?;
        descriptor.set("digest", &self.digest.as_str())?;
        descriptor.set("size", &self.size)
    }
}

/// Whether a media type is an index's.
pub(super) fn is_index(media_type: &str) -> bool {
    matches!(media_type, OCI_INDEX | DOCKER_LIST)
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut members: Vec<(String, Box<RawValue>)> = Vec::new();
                let mut names = std::collections::HashSet::new();
                while let Some((key, value)) = map.next_entry::<String, _>()? {
                    // Readers differ in which of two they believe; a digest must not depend on that.
                    if !names.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("member {key:?} is there twice")));
                    }
                    members.push((key, value));
                }
                Ok(Document(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn untouched_members_keep_their_bytes_and_order() {
        let json = br#"{"z":1.50,"x":{"b": 1,"a":[1e3]},"n":123456789012345678901234567890,"a":"\u00e9"}"#;
        let mut document = Document::parse(json).unwrap();
        assert_eq!(document.to_json().unwrap(), json);
        document.set("x", &7).unwrap();
        document.set("new", &"v").unwrap();
        document.remove("z");
        let wanted = br#"{"x":7,"n":123456789012345678901234567890,"a":"\u00e9","new":"v"}"#;
        assert_eq!(document.to_json().unwrap(), wanted);
        assert!(Document::parse(br#"{"a":1,"a":2}"#).is_err());
        assert!(Document::parse(b"[1]").is_err());
    }

    #[test]
    fn annotations_are_added_to_those_there() {
        let mut document = Document::parse(br#"{"annotations":{"k":"v","old":"1"}}"#).unwrap();
        document.annotate(&[("old", "2"), ("new", "3")]).unwrap();
        assert_eq!(
            document.to_json().unwrap(),
            br#"{"annotations":{"k":"v","old":"2","new":"3"}}"#
        );
        assert_eq!(document.annotation("new").as_deref(), Some("3"));
        let mut null = Document::parse(br#"{"annotations":null}"#).unwrap();
        null.annotate(&[("k", "v")]).unwrap();
        assert_eq!(null.to_json().unwrap(), br#"{"annotations":{"k":"v"}}"#);
    }
}
