//! Labels that clients and this daemon attach to snapshots.
//!
//! containerd passes what is known of a layer in labels of `Prepare`: CRI under `cri.*`, other clients under the names
//! that stargz-snapshotter introduced. Everything in a label is input from outside.

use estargz::digest::{Digest, DigestError};

use super::{Error, Labels, store};
use crate::layer::LayerRequest;

/// containerd's limit on the bytes of one label's key and value together.
pub const MAX_LABEL_BYTES: usize = 4096;

/// Name of the snapshot that a `Prepare` is for; its presence offers the layer for lazy use.
pub const TARGET: &str = "containerd.io/snapshot.ref";

/// Marks the committed snapshot of a lazy layer; the value is [`REMOTE_VALUE`].
pub const REMOTE: &str = "containerd.io/snapshot/remote";

/// Value of [`REMOTE`].
pub const REMOTE_VALUE: &str = "remote snapshot";

const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";

/// Names of the same fact from the CRI plugin and from other clients; the first that is present counts.
const IMAGE: [&str; 2] = [
    "containerd.io/snapshot/cri.image-ref",
    "containerd.io/snapshot/remote/stargz.reference",
];
const LAYER: [&str; 2] = [
    "containerd.io/snapshot/cri.layer-digest",
    "containerd.io/snapshot/remote/stargz.digest",
];
const LAYERS: [&str; 2] = [
    "containerd.io/snapshot/cri.image-layers",
    "containerd.io/snapshot/remote/stargz.layers",
];

/// Why a layer offered for lazy use is not even asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The client does not tell which image and layer it is.
    #[error(
        "the client passes no labels about the image; for CRI set disable_snapshot_annotations = false in \
         containerd's configuration"
    )]
    Missing,
    /// A label should be a digest and is not.
    #[error("label {key}")]
    Digest {
        /// The label's key.
        key: &'static str,
        /// What its value is.
        #[source]
        source: DigestError,
    },
}

impl LabelError {
    /// Short stable name, as [`crate::layer::NotLazy::reason`].
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "no_labels",
            Self::Digest { .. } => "bad_labels",
        }
    }
}

/// What the labels of a `Prepare` tell of the layer.
pub fn layer_request(labels: &Labels) -> Result<LayerRequest, LabelError> {
    let (_, image) = first(labels, &IMAGE).ok_or(LabelError::Missing)?;
    let (key, layer) = first(labels, &LAYER).ok_or(LabelError::Missing)?;
    let layer_digest = digest(key, layer)?;
    let optional = |key| labels.get(key).map(|value| digest(key, value)).transpose();
    // The list ends where the label's limit cut it off, possibly within a digest.
    let siblings = match first(labels, &LAYERS) {
        None => Vec::new(),
        Some((_, list)) => list.split(',').map_while(|item| item.trim().parse().ok()).collect(),
    };
    Ok(LayerRequest {
        image: image.to_owned(),
        manifest_digest: optional(MANIFEST_DIGEST)?,
        layer_digest,
        toc_digest: optional(TOC_DIGEST)?,
        siblings,
    })
}

fn first<'a>(labels: &'a Labels, keys: &[&'static str]) -> Option<(&'static str, &'a str)> {
    keys.iter()
        .find_map(|key| labels.get(*key).map(|value| (*key, value.as_str())))
}

fn digest(key: &'static str, value: &str) -> Result<Digest, LabelError> {
    value.parse().map_err(|source| LabelError::Digest { key, source })
}

/// Refuses labels over containerd's limit.
pub fn check(labels: &Labels) -> Result<(), Error> {
    match labels
        .iter()
        .find(|(key, value)| key.len() + value.len() > MAX_LABEL_BYTES)
    {
        None => Ok(()),
        Some((key, value)) => Err(Error::LabelTooLong {
            key: key.chars().take(64).collect(),
            length: key.len() + value.len(),
        }),
    }
}

/// Refuses a key, name or parent that is empty or too long.
pub fn check_name(what: &'static str, name: &str) -> Result<(), Error> {
    match name.len() {
        1..=store::MAX_NAME_BYTES => Ok(()),
        length => Err(Error::BadName { what, length }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn cri_and_stargz_labels_tell_the_same() {
        let (a, b) = (Digest::of("a"), Digest::of("b"));
        let list = format!("{a},{b},sha256:cut");
        for [image, layer, layers] in [[IMAGE[0], LAYER[0], LAYERS[0]], [IMAGE[1], LAYER[1], LAYERS[1]]] {
            let text = a.to_string();
            let toc = b.to_string();
            let labels = labels(&[
                (image, "reg/img:1"),
                (layer, &text),
                (layers, &list),
                (TOC_DIGEST, &toc),
            ]);
            let expected = LayerRequest {
                image: "reg/img:1".to_owned(),
                manifest_digest: None,
                layer_digest: a,
                toc_digest: Some(b),
                siblings: vec![a, b],
            };
            assert_eq!(layer_request(&labels), Ok(expected));
        }
    }

    #[test]
    fn missing_and_malformed_labels_are_told_apart() {
        let digest = Digest::of("a").to_string();
        let reason = |pairs: &[(&str, &str)]| layer_request(&labels(pairs)).map_err(|error| error.reason());
        assert_eq!(reason(&[]), Err("no_labels"));
        assert_eq!(reason(&[(LAYER[0], &digest)]), Err("no_labels"));
        assert_eq!(reason(&[(IMAGE[0], "i"), (LAYER[0], "md5:1")]), Err("bad_labels"));
        assert_eq!(
            reason(&[(IMAGE[0], "i"), (LAYER[0], &digest), (TOC_DIGEST, "")]),
            Err("bad_labels")
        );
        assert_eq!(
            reason(&[(IMAGE[0], "i"), (LAYER[0], &digest), (MANIFEST_DIGEST, "x")]),
            Err("bad_labels")
        );
        assert!(reason(&[(IMAGE[0], "i"), (LAYER[0], &digest), (LAYERS[0], ",,")]).is_ok());
    }

    #[test]
    fn a_label_may_have_4096_bytes_with_its_key() {
        let value = "v".repeat(MAX_LABEL_BYTES - 1);
        assert!(check(&labels(&[("k", &value)])).is_ok());
        assert!(matches!(
            check(&labels(&[("kk", &value)])),
            Err(Error::LabelTooLong { length: 4097, .. })
        ));
        assert!(check_name("key", &"n".repeat(store::MAX_NAME_BYTES)).is_ok());
        assert!(matches!(check_name("key", ""), Err(Error::BadName { length: 0, .. })));
        assert!(check_name("key", &"n".repeat(store::MAX_NAME_BYTES + 1)).is_err());
    }
}
