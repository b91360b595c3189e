//! Image manifests: the sizes and TOC digests of an image's layers, fetched once per image.
//!
//! The labels of a snapshot name a layer and not its size. With the manifest the first request for a layer can ask for
//! exactly the right range, and all layers of the image can be opened at once.

use std::sync::Arc;
use std::time::Duration;

use estargz::digest::Digest;
use estargz::footer::zstd::{POSITION_ANNOTATION, Position, STARGZ_POSITION_ANNOTATION};
use estargz::toc::{BINDING_ANNOTATIONS, TOC_OF_LAYER_ANNOTATION, TOC_OFFSET_ANNOTATION};
use hullspeed_registry::{Client, MANIFEST_ACCEPT, Reference, Version};
use serde::Deserialize;

use super::platform::Platform;
use super::source::SourceError;
use super::source::registry::{registry_digest, source_error};

/// Manifests kept.
const MAX_MANIFESTS: u64 = 256;
/// How long a manifest is kept; it never changes, so this only frees memory.
const KEPT_FOR: Duration = Duration::from_secs(600);
/// Layers of one image looked at; overlayfs can stack no more than 500.
const MAX_LAYERS: usize = 512;
/// The manifest types that have layers.
const ACCEPT: &[&str] = &[
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// A layer as the manifest describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LayerDescriptor {
    pub(super) digest: Digest,
    pub(super) size: u64,
    /// What the manifest calls the layer's TOC.
    pub(super) toc_digest: Option<Digest>,
    /// Where the TOC of a zstd:chunked layer is.
    pub(super) position: Option<Position>,
    /// Where the TOC of an eStargz layer is said to begin.
    pub(super) toc_offset: Option<u64>,
    /// In a TOC image: the layer whose TOC this is.
    pub(super) toc_of: Option<Digest>,
}

/// Manifests by digest.
#[derive(Debug)]
pub(super) struct Manifests {
    kept: moka::future::Cache<Digest, Arc<[LayerDescriptor]>>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Option<Vec<Entry>>,
}

/// An image of an index.
#[derive(Deserialize)]
struct Entry {
    digest: String,
    #[serde(default)]
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

impl Manifests {
    pub(super) fn new() -> Self {
        Self {
            kept: moka::future::Cache::builder()
                .max_capacity(MAX_MANIFESTS)
                .time_to_live(KEPT_FOR)
                .build(),
        }
    }

    /// The layers of the image whose manifest has `digest`; one request for any number of concurrent callers.
    pub(super) async fn layers(
        &self,
        client: &Client,
        image: &Reference,
        digest: &Digest,
    ) -> Result<Arc<[LayerDescriptor]>, Arc<SourceError>> {
        let fetch = async {
            let version = Version::Digest(registry_digest(digest));
            // The client compares the digest, so what is parsed is what containerd resolved.
            let manifest = client.manifest(image, &version, ACCEPT).await.map_err(source_error)?;
            parse(&manifest.bytes)
        };
        self.kept.try_get_with(*digest, fetch).await
    }

    /// The manifest that `image` means for `platform`, and its layers.
    pub(super) async fn resolve(
        &self,
        client: &Client,
        image: &Reference,
        platform: &Platform,
    ) -> Result<(Digest, Arc<[LayerDescriptor]>), Arc<SourceError>> {
        if let Some(digest) = image.digest().and_then(estargz_digest)
            && let Some(layers) = self.kept.get(&digest).await
        {
            return Ok((digest, layers));
        }
        let manifest = client.manifest(image, &image.version(), MANIFEST_ACCEPT).await;
        let manifest = manifest.map_err(source_error)?;
        if let Some(entries) = document(&manifest.bytes)?.manifests {
            let entry = entries
                .into_iter()
                .find(|entry| entry.platform.as_ref().is_some_and(|own| platform.accepts(own)));
            let chosen = entry.ok_or_else(|| permanent("not_found", format!("the image is not for {platform}")))?;
            let digest = chosen.digest.parse().map_err(|_| {
                let what = format!("the image's index names a manifest by {:?}", shortened(&chosen.digest));
                permanent("protocol", what)
            })?;
            return Ok((digest, self.layers(client, image, &digest).await?));
        }
        let digest = estargz_digest(&manifest.digest)
            .ok_or_else(|| permanent("protocol", "the image's manifest is not named by SHA-256".to_owned()))?;
        let layers = parse(&manifest.bytes)?;
        self.kept.insert(digest, layers.clone()).await;
        Ok((digest, layers))
    }
}

fn permanent(class: &'static str, what: String) -> SourceError {
    let cause = None;
    SourceError::Permanent { what, class, cause }
}

fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

fn estargz_digest(digest: &hullspeed_registry::Digest) -> Option<Digest> {
    digest.to_string().parse().ok()
}

fn document(bytes: &[u8]) -> Result<Document, SourceError> {
    serde_json::from_slice(bytes).map_err(|error| SourceError::Permanent {
        what: "the image's manifest is not one".to_owned(),
        class: "protocol",
        cause: Some(Box::new(error)),
    })
}

fn parse(bytes: &[u8]) -> Result<Arc<[LayerDescriptor]>, SourceError> {
    let document = document(bytes)?;
    // A layer named by another algorithm is never asked for, as the labels could not name it either.
    let describe = |layer: Descriptor| {
        let annotation = |keys: &[&str]| keys.iter().find_map(|key| layer.annotations.get(*key));
        let digest = |keys: &[&str]| annotation(keys).and_then(|digest| digest.parse().ok());
        Some(LayerDescriptor {
            digest: layer.digest.parse().ok()?,
            size: layer.size,
            toc_digest: digest(&BINDING_ANNOTATIONS),
            position: annotation(&[POSITION_ANNOTATION, STARGZ_POSITION_ANNOTATION])
                .and_then(|position| Position::parse(position).ok()),
            toc_offset: annotation(&[TOC_OFFSET_ANNOTATION]).and_then(|offset| offset.parse().ok()),
            toc_of: digest(&[TOC_OF_LAYER_ANNOTATION]),
        })
    };
    Ok(document
        .layers
        .into_iter()
        .take(MAX_LAYERS)
        .filter_map(describe)
        .collect())
}

#[cfg(test)]
mod tests {
    use estargz::footer::zstd::CHECKSUM_ANNOTATION;
    use estargz::toc::TOC_DIGEST_ANNOTATION;

    use super::*;

    #[test]
    fn layers_without_a_usable_toc_digest_have_none_and_nonsense_is_an_error() {
        let digest = Digest::of(b"layer");
        let toc = Digest::of(b"toc");
        let text = format!(
            r#"{{"schemaVersion":2,"layers":[
                {{"digest":"{digest}","size":7,"annotations":{{"{TOC_DIGEST_ANNOTATION}":"{toc}"}}}},
                {{"digest":"{digest}","size":8,"annotations":{{
                    "{TOC_DIGEST_ANNOTATION}":"nonsense","{TOC_OFFSET_ANNOTATION}":"-1"}}}},
                {{"digest":"{digest}","size":8,"annotations":{{
                    "{TOC_DIGEST_ANNOTATION}":"{toc}","{TOC_OFFSET_ANNOTATION}":"5"}}}},
                {{"digest":"{digest}","size":9,"annotations":{{
                    "{CHECKSUM_ANNOTATION}":"{toc}","{POSITION_ANNOTATION}":"9:8:7:1","{TOC_OF_LAYER_ANNOTATION}":"{digest}"}}}},
                {{"digest":"sha512:00","size":9}}]}}"#
        );
        let plain = |size, toc_digest| LayerDescriptor {
            digest,
            size,
            toc_digest,
            position: None,
            toc_offset: None,
            toc_of: None,
        };
        let layers = parse(text.as_bytes()).unwrap();
        assert_eq!(
            &layers[..],
            [
                plain(7, Some(toc)),
                plain(8, None),
                LayerDescriptor {
                    toc_offset: Some(5),
                    ..plain(8, Some(toc))
                },
                LayerDescriptor {
                    position: Some(Position::parse("9:8:7:1").unwrap()),
                    toc_of: Some(digest),
                    ..plain(9, Some(toc))
                },
            ]
        );
        for bad in [
            "",
            "7",
            r#"{"layers":[{"digest":1}]}"#,
            r#"{"layers":[{"digest":"x","size":-1}]}"#,
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse(br#"{"manifests":[]}"#).unwrap().is_empty());
    }
}
