//! The documents of the converted image, from the configurations up to the root.
//!
//! Only what must change does: digests, sizes, media types, `diff_ids`, two annotations of each layer, and the
//! annotation that binds an attestation to its manifest.

use std::collections::BTreeMap;

use bytes::Bytes;
use estargz::toc::{TOC_DIGEST_ANNOTATION, TOC_OFFSET_ANNOTATION, UNCOMPRESSED_SIZE_ANNOTATION};
use hullspeed_registry::Digest;
use serde_json::Error;

use super::layers::{Converted, Layers};
use crate::cli::document::{BlobRef, Document, OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST, REFERENCE_DIGEST};
use crate::cli::image::{Content, Image, Layer, Node};

/// Everything to be stored besides the converted layers.
#[derive(Debug)]
pub(super) struct Rewritten {
    /// Configurations and manifests, what is referred to before what refers to it, without the root.
    pub(super) documents: Vec<Output>,
    pub(super) root: Root,
    /// Blobs of artefacts, to be copied.
    pub(super) copies: Vec<BlobRef>,
    /// Layers that may not be distributed.
    pub(super) foreign: Vec<BlobRef>,
    /// Manifest digests before and after.
    pub(super) renamed: BTreeMap<Digest, Digest>,
}

/// A document to be stored: a manifest with its type, or a plain blob.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) bytes: Bytes,
    pub(super) media_type: Option<String>,
}

/// A manifest or index as its parent describes it.
#[derive(Debug, Clone)]
pub(super) struct Root {
    pub(super) bytes: Bytes,
    pub(super) blob: BlobRef,
    pub(super) media_type: String,
}

/// Writes the documents of `tree` anew.
pub(super) fn rewrite(tree: &Node, layers: &Layers) -> Result<Rewritten, Error> {
    let mut rewriter = Rewriter {
        layers,
        documents: Vec::new(),
        copies: Vec::new(),
        foreign: Vec::new(),
        renamed: BTreeMap::new(),
    };
    let root = rewriter.node(tree)?;
    let Rewriter {
        documents,
        copies,
        foreign,
        renamed,
        ..
    } = rewriter;
    Ok(Rewritten {
        documents,
        root,
        copies,
        foreign,
        renamed,
    })
}

struct Rewriter<'a> {
    layers: &'a Layers,
    documents: Vec<Output>,
    copies: Vec<BlobRef>,
    foreign: Vec<BlobRef>,
    renamed: BTreeMap<Digest, Digest>,
}

impl Rewriter<'_> {
    fn node(&mut self, node: &Node) -> Result<Root, Error> {
        let (bytes, media_type) = match &node.content {
            Content::Index { document, children } => self.index(node, document, children)?,
            Content::Image(image) => (self.image(image)?, OCI_MANIFEST.to_owned()),
            Content::Artefact { blobs } => {
                self.copies.extend(blobs.iter().cloned());
                (node.bytes.clone(), node.media_type.clone())
            }
        };
        // A document that did not change keeps its digest, whatever the algorithm.
        let digest = if bytes == node.bytes {
            node.digest.clone()
        } else {
            Digest::of(&bytes)
        };
        let blob = BlobRef {
            digest,
            size: bytes.len() as u64,
        };
        self.renamed.insert(node.digest.clone(), blob.digest.clone());
        Ok(Root {
            bytes,
            blob,
            media_type,
        })
    }

    fn index(&mut self, node: &Node, old: &Document, children: &[(Document, Node)]) -> Result<(Bytes, String), Error> {
        let mut entries = Vec::new();
        for (descriptor, child) in children {
            let new = self.node(child)?;
            let mut descriptor = descriptor.clone();
            if new.blob.digest != child.digest {
                new.blob.point(&mut descriptor, &new.media_type)?;
                descriptor.remove("urls");
            }
            self.documents.push(Output {
                bytes: new.bytes,
                media_type: Some(new.media_type),
            });
            entries.push(descriptor);
        }
        if node.images().is_empty() {
            // A collection of other things stays what it is.
            return Ok((node.bytes.clone(), node.media_type.clone()));
        }
        for descriptor in &mut entries {
            let described = descriptor
                .annotation(REFERENCE_DIGEST)
                .and_then(|text| text.parse::<Digest>().ok());
            if let Some(new) = described.and_then(|digest| self.renamed.get(&digest)) {
                descriptor.annotate(&[(REFERENCE_DIGEST, new.as_str())])?;
            }
        }
        let mut index = old.clone();
        index.set("mediaType", &OCI_INDEX)?;
        index.set("manifests", &entries)?;
        Ok((index.to_json()?.into(), OCI_INDEX.to_owned()))
    }

    fn image(&mut self, image: &Image) -> Result<Bytes, Error> {
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &image.layers {
            match self.layers.get(&layer.blob.digest).filter(|_| !layer.foreign) {
                Some(converted) => {
                    descriptors.push(descriptor(layer, converted)?);
                    diff_ids.push(converted.diff_id.as_str());
                }
                None => {
                    self.foreign.push(layer.blob.clone());
                    descriptors.push(foreign_descriptor(layer)?);
                    diff_ids.push(layer.diff_id.as_str());
                }
            }
        }
        let mut config = Document::parse(&image.config)?;
        let mut rootfs: Document = config.need("rootfs")?;
        rootfs.set("diff_ids", &diff_ids)?;
        config.set("rootfs", &rootfs)?;
        let config = Bytes::from(config.to_json()?);

        let mut manifest = image.document.clone();
        let mut config_descriptor: Document = manifest.need("config")?;
        BlobRef::of(&config).point(&mut config_descriptor, OCI_CONFIG)?;
        config_descriptor.remove("urls");
        manifest.set("mediaType", &OCI_MANIFEST)?;
        manifest.set("config", &config_descriptor)?;
        manifest.set("layers", &descriptors)?;
        self.documents.push(Output {
            bytes: config,
            media_type: None,
        });
        manifest.to_json().map(Bytes::from)
    }
}

fn descriptor(layer: &Layer, converted: &Converted) -> Result<Document, Error> {
    let mut descriptor = layer.descriptor.clone();
    converted.blob.point(&mut descriptor, OCI_LAYER_GZIP)?;
    // They lead to the old bytes.
    descriptor.remove("urls");
    descriptor.annotate(&[
        (TOC_DIGEST_ANNOTATION, converted.toc_digest.as_str()),
        (TOC_OFFSET_ANNOTATION, &converted.toc_offset.to_string()),
        (UNCOMPRESSED_SIZE_ANNOTATION, &converted.uncompressed_size.to_string()),
    ])?;
    Ok(descriptor)
}

/// The descriptor of a layer that stays, under the OCI name of its type.
fn foreign_descriptor(layer: &Layer) -> Result<Document, Error> {
    let mut descriptor = layer.descriptor.clone();
    let media_type: String = descriptor.need("mediaType")?;
    let oci = match media_type.as_str() {
        "application/vnd.docker.image.rootfs.foreign.diff.tar" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar"
        }
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        }
        other => other,
    };
    descriptor.set("mediaType", &oci)?;
    Ok(descriptor)
}
