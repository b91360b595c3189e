//! Layers: each distinct one is rebuilt once, a few at a time; other blobs are copied.

use std::collections::HashMap;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use estargz::input;
use estargz::writer::{self, BuildError, BuildOptions, BuiltLayer};
use futures_util::StreamExt;
use hullspeed_registry::Digest;
use tempfile::{NamedTempFile, TempPath};

use super::rewrite::Rewritten;
use crate::cli::document::BlobRef;
use crate::cli::failure::{Code, Failure, Side};
use crate::cli::image::{Layer, Node};
use crate::cli::progress::{Progress, size};
use crate::cli::stream::{BlobReader, Cancel, CancelWrite, HashRead};
use crate::cli::transport::{Source, Target};

/// Fewest and most layers in work at once: one is read or pushed while another is compressed.
const LAYERS_AT_ONCE: (usize, usize) = (2, 4);

/// What became of each layer, by the digest of its source.
pub(super) type Layers = HashMap<Digest, Converted>;

/// A rebuilt layer.
#[derive(Debug)]
pub(super) struct Converted {
    pub(super) source: BlobRef,
    pub(super) blob: BlobRef,
    pub(super) toc_digest: Digest,
    pub(super) toc_offset: u64,
    pub(super) diff_id: Digest,
    pub(super) uncompressed_size: u64,
    /// Prioritized paths that it does not have.
    pub(super) missing: Vec<Vec<u8>>,
    pub(super) took: Duration,
}

/// What the steps of a conversion share.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) source: &'a Source,
    pub(super) target: &'a Target,
    pub(super) build: &'a BuildOptions,
    pub(super) progress: &'a Progress,
    pub(super) cancel: &'a Cancel,
}

/// Rebuilds every layer of the tree.
pub(super) async fn convert(work: &Work<'_>, tree: &Node) -> Result<Layers, Failure> {
    let layers = distinct(tree)?;
    let (fewest, most) = LAYERS_AT_ONCE;
    let at_once = work.build.threads.get().clamp(fewest, most);
    let mut running = futures_util::stream::iter(layers)
        .map(|layer| one(work, layer))
        .buffer_unordered(at_once);
    let mut converted = Layers::new();
    let mut fault = None;
    // After a fault the others are told to stop and waited for: their temporary files must be gone at the end.
    while let Some(result) = running.next().await {
        match result {
            Ok(layer) => drop(converted.insert(layer.source.digest.clone(), layer)),
            Err(failure) => {
                work.cancel.set();
                fault.get_or_insert(failure);
            }
        }
    }
    fault.map_or(Ok(converted), Err)
}

/// The layers to convert, each once, in the order in which they are met.
fn distinct(tree: &Node) -> Result<Vec<&Layer>, Failure> {
    let mut seen: HashMap<&Digest, &Layer> = HashMap::new();
    let mut layers = Vec::new();
    for layer in tree
        .images()
        .into_iter()
        .flat_map(|(_, image)| &image.layers)
        .filter(|layer| !layer.foreign)
    {
        match seen.insert(&layer.blob.digest, layer) {
            None => layers.push(layer),
            Some(other) if other.diff_id == layer.diff_id && other.blob == layer.blob => {}
            Some(other) => {
                let (digest, a, b) = (&layer.blob.digest, &other.diff_id, &layer.diff_id);
                let line = format!("the image's manifests disagree about layer {digest}: diffIDs {a} and {b}");
                return Err(Failure::new(Code::Mismatch, line));
            }
        }
    }
    Ok(layers)
}

async fn one(work: &Work<'_>, layer: &Layer) -> Result<Converted, Failure> {
    let during = |failure: Failure| failure.during(format!("layer {}", layer.blob.digest));
    let started = Instant::now();
    let interrupted = |error: io::Error| Failure::new(Code::Interrupted, error.to_string());
    work.cancel.check().map_err(interrupted)?;
    let task = work.progress.layer(&layer.blob.digest, layer.blob.size);
    let reader = work
        .source
        .open_blob(&layer.blob, work.cancel.clone())
        .await
        .map_err(during)?;
    let reader = reader.on_progress(task.counter());
    let (scratch, options) = (work.target.scratch().to_owned(), work.build.clone());
    let (diff_id, cancel) = (layer.diff_id.clone(), work.cancel.clone());
    let rebuild = tokio::task::spawn_blocking(move || rebuild(reader, &diff_id, &scratch, &options, cancel));
    let rebuilt = rebuild
        .await
        .map_err(|error| Failure::new(Code::Runtime, error.to_string()));
    let (built, file) = rebuilt.and_then(|rebuilt| rebuilt).map_err(during)?;
    let digest = Digest::sha256(built.blob_digest.as_bytes());
    let blob = BlobRef {
        digest,
        size: built.blob_size,
    };
    task.phase("storing", blob.size);
    work.target
        .put_file(&blob, file, Some(Arc::new(task.counter())))
        .await
        .map_err(during)?;
    task.finish(&format!(
        "{} -> {} {}",
        size(layer.blob.size),
        size(blob.size),
        blob.digest
    ));
    Ok(Converted {
        source: layer.blob.clone(),
        blob,
        toc_digest: Digest::sha256(built.toc_digest.as_bytes()),
        toc_offset: built.toc_offset,
        diff_id: Digest::sha256(built.diff_id.as_bytes()),
        uncompressed_size: built.uncompressed_size,
        missing: built.missing_prioritized,
        took: started.elapsed(),
    })
}

/// Rebuilds one layer into a temporary file. The source's digest and diffID are checked on the way.
fn rebuild(
    mut reader: BlobReader,
    diff_id: &Digest,
    scratch: &Path,
    options: &BuildOptions,
    cancel: Cancel,
) -> Result<(BuiltLayer, TempPath), Failure> {
    let built = build(&mut reader, diff_id, scratch, options, cancel);
    // The rest is read in any case: what looks like a broken archive often is a broken blob, and the digest tells.
    let rest = io::copy(&mut reader, &mut io::sink());
    match (built, rest) {
        (Ok(built), Ok(_)) => Ok(built),
        (Err(failure), Ok(_)) => Err(failure),
        (Ok(_), Err(error)) => Err(Failure::layer(&error)),
        (Err(failure), Err(error)) => {
            let rest = Failure::layer(&error);
            Err(if rest.code == Code::Mismatch { rest } else { failure })
        }
    }
}

fn build(
    reader: &mut BlobReader,
    diff_id: &Digest,
    scratch: &Path,
    options: &BuildOptions,
    cancel: Cancel,
) -> Result<(BuiltLayer, TempPath), Failure> {
    let unwritable = |error: io::Error| Failure::file(Side::Destination, "write to", scratch, &error);
    let mut file = NamedTempFile::new_in(scratch).map_err(unwritable)?;
    let mut tar = HashRead::new(input::decompress(reader).map_err(|error| Failure::layer(&error))?);
    let mut out = BufWriter::new(CancelWrite {
        inner: file.as_file_mut(),
        cancel,
    });
    let built = writer::build(&mut tar, &mut out, options).map_err(|error| match error {
        BuildError::Write(error) | BuildError::Spool(error) => unwritable(error),
        error => Failure::layer(&error),
    })?;
    out.flush().map_err(unwritable)?;
    drop(out);
    let actual = tar.finish().map_err(|error| Failure::layer(&error))?;
    if actual != *diff_id {
        let line = format!("its uncompressed digest is {actual}, the image's configuration says {diff_id}");
        return Err(Failure::new(Code::Mismatch, line));
    }
    Ok((built, file.into_temp_path()))
}

/// Copies what is not converted: artefacts' blobs, and layers that may not be distributed if the source has them.
pub(super) async fn copy_others(work: &Work<'_>, new: &Rewritten) -> Result<(), Failure> {
    for blob in &new.copies {
        copy(work, blob).await?;
    }
    for blob in &new.foreign {
        if work.source.has(blob).await? {
            copy(work, blob).await?;
        } else {
            work.progress.note(&format!(
                "note: layer {} is fetched from its own place; left as it is",
                blob.digest
            ));
        }
    }
    Ok(())
}

async fn copy(work: &Work<'_>, blob: &BlobRef) -> Result<(), Failure> {
    if work.target.mount(blob, work.source).await? {
        return Ok(());
    }
    let mut reader = work.source.open_blob(blob, work.cancel.clone()).await?;
    let scratch = work.target.scratch().to_owned();
    let copy = tokio::task::spawn_blocking(move || {
        let unwritable = |error: io::Error| Failure::file(Side::Destination, "write to", &scratch, &error);
        let mut file = NamedTempFile::new_in(&scratch).map_err(unwritable)?;
        io::copy(&mut reader, file.as_file_mut()).map_err(|error| Failure::layer(&error))?;
        Ok(file.into_temp_path())
    });
    let file = copy
        .await
        .map_err(|error| Failure::new(Code::Runtime, error.to_string()))??;
    work.target.put_file(blob, file, None).await
}
