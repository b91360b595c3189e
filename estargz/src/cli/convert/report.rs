//! `--report`: what became of each manifest and layer, as JSON.

use serde::Serialize;

use super::Options;
use super::layers::Layers;
use super::rewrite::Rewritten;
use crate::cli::failure::{Code, Failure};
use crate::cli::image::Node;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    source: String,
    source_digest: String,
    destination: String,
    digest: String,
    media_type: String,
    manifests: Vec<Manifest>,
    layers: Vec<Layer>,
    /// Prioritized paths that no layer has.
    missing_prioritized: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    platform: Option<String>,
    source_digest: String,
    digest: Option<String>,
    layers: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    source_digest: String,
    source_size: u64,
    digest: String,
    size: u64,
    uncompressed_size: u64,
    toc_digest: String,
    diff_id: String,
    seconds: f64,
}

/// The report of a conversion; layers in the order in which the image names them.
pub(super) fn build(options: &Options, new: &Rewritten, layers: &Layers, tree: &Node) -> Result<Vec<u8>, Failure> {
    let images = tree.images();
    let mut ordered: Vec<&super::layers::Converted> = Vec::new();
    for layer in images
        .iter()
        .flat_map(|(_, image)| &image.layers)
        .filter_map(|layer| layers.get(&layer.blob.digest))
    {
        if !ordered.iter().any(|seen| seen.source == layer.source) {
            ordered.push(layer);
        }
    }
    let missing = ordered.first().map(|layer| layer.missing.clone()).unwrap_or_default();
    let nowhere = |path: &Vec<u8>| ordered.iter().all(|layer| layer.missing.contains(path));
    let missing_prioritized = missing.iter().filter(|path| nowhere(path));
    let report = Report {
        source: options.source.to_string(),
        source_digest: tree.digest.to_string(),
        destination: options.destination.to_string(),
        digest: new.root.blob.digest.to_string(),
        media_type: new.root.media_type.clone(),
        manifests: images
            .iter()
            .map(|(node, image)| Manifest {
                platform: image.platform.as_ref().map(ToString::to_string),
                source_digest: node.digest.to_string(),
                digest: new.renamed.get(&node.digest).map(ToString::to_string),
                layers: image.layers.iter().map(|layer| layer.blob.digest.to_string()).collect(),
            })
            .collect(),
        missing_prioritized: missing_prioritized
            .map(|path| String::from_utf8_lossy(path).into_owned())
            .collect(),
        layers: ordered
            .iter()
            .map(|layer| Layer {
                source_digest: layer.source.digest.to_string(),
                source_size: layer.source.size,
                digest: layer.blob.digest.to_string(),
                size: layer.blob.size,
                uncompressed_size: layer.uncompressed_size,
                toc_digest: layer.toc_digest.to_string(),
                diff_id: layer.diff_id.to_string(),
                seconds: layer.took.as_secs_f64(),
            })
            .collect(),
    };
    let mut json = serde_json::to_vec_pretty(&report)
        .map_err(|error| Failure::new(Code::Runtime, format!("cannot write the report: {error}")))?;
    json.push(b'\n');
    Ok(json)
}
