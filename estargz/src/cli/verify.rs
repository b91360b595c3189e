//! `estargz verify`: every manifest, configuration, blob, TOC, chunk and diffID of an image.
//!
//! The check goes on after a fault, so that one run shows them all.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use estargz::toc::{BINDING_ANNOTATIONS, TOC_DIGEST_ANNOTATION};
use estargz::verify::{Report, verify_layer};
use hullspeed_registry::Digest;
use tempfile::NamedTempFile;

use super::failure::{Code, Failure, Side, chain};
use super::image::{Layer, Node};
use super::location::Location;
use super::progress::Progress;
use super::stream::{Cancel, CancelReadAt};
use super::transport::Source;
use super::{PlatformArgs, ProgressStyle, RegistryArgs};

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Image to check.
    #[arg(value_name = "SRC", value_parser = Location::parse)]
    source: Location,
    #[command(flatten)]
    platforms: PlatformArgs,
    #[command(flatten)]
    registry: RegistryArgs,
    /// How progress is shown on stderr.
    #[arg(long, value_enum, default_value = "auto")]
    progress: ProgressStyle,
    /// No progress.
    #[arg(short, long)]
    quiet: bool,
}

/// What tells one check of a layer from another: the same blob under another annotation is another check.
type Key = (Digest, Option<String>, Digest);

/// Checks an image; prints each fault and a summary.
pub(super) async fn run(options: Options, cancel: Cancel) -> Result<(), Failure> {
    let client = options.registry.client()?;
    let progress = Progress::new(options.progress, options.quiet);
    let source = Source::open(&options.source, &client)?;
    let tree = Node::load(&source, &options.platforms.platforms).await?;
    let scratch = tempfile::Builder::new().prefix("estargz-").tempdir();
    let here = std::env::temp_dir();
    let scratch = scratch.map_err(|error| Failure::file(Side::Destination, "write to", &here, &error))?;
    let mut found = Found::default();
    for (node, image) in tree.images() {
        let platform = image
            .platform
            .as_ref()
            .map_or_else(|| "unknown platform".to_owned(), ToString::to_string);
        for (number, layer) in image.layers.iter().enumerate() {
            if layer.foreign {
                found.skipped += 1;
                continue;
            }
            let annotation = BINDING_ANNOTATIONS
                .iter()
                .find_map(|key| layer.descriptor.annotation(key));
            let key = (layer.blob.digest.clone(), annotation.clone(), layer.diff_id.clone());
            if !found.done.contains_key(&key) {
                let task = progress.layer(&layer.blob.digest, layer.blob.size);
                let result = check(&source, layer, annotation, scratch.path(), &cancel).await;
                cancel
                    .check()
                    .map_err(|error| Failure::new(Code::Interrupted, error.to_string()))?;
                task.finish(if result.is_ok() { "good" } else { "BAD" });
                found.done.insert(key.clone(), result);
            }
            if let Some(Err(failure)) = found.done.get(&key) {
                found.faults += 1;
                let (manifest, digest) = (&node.digest, &layer.blob.digest);
                super::print(&format!(
                    "BAD {platform} manifest {manifest} layer {number} {digest}: {}",
                    failure.line
                ))?;
            }
        }
    }
    super::print(&found.summary(&options.source, tree.images().len())?)
}

/// What a run has found so far.
#[derive(Default)]
struct Found {
    done: HashMap<Key, Result<Report, Failure>>,
    faults: usize,
    skipped: usize,
}

impl Found {
    fn summary(self, source: &Location, images: usize) -> Result<String, Failure> {
        if self.faults > 0 {
            // What cannot be read is another matter than what is wrong.
            let codes = self
                .done
                .values()
                .filter_map(|result| result.as_ref().err().map(|failure| failure.code));
            let code = codes
                .max_by_key(|code| *code == Code::Mismatch)
                .unwrap_or(Code::Mismatch);
            return Err(Failure::new(
                code,
                format!("{source} has {} bad layers (named on stdout)", self.faults),
            ));
        }
        if images == 0 {
            return Err(Failure::new(Code::Mismatch, format!("{source} holds no image")));
        }
        let skipped = match self.skipped {
            0 => String::new(),
            skipped => format!(", {skipped} not distributable and not checked"),
        };
        let chunks: u64 = self.done.values().flatten().map(|report| report.chunks).sum();
        Ok(format!(
            "good: {images} manifests, {} layers, {chunks} chunks{skipped}",
            self.done.len()
        ))
    }
}

async fn check(
    source: &Source,
    layer: &Layer,
    annotation: Option<String>,
    scratch: &Path,
    cancel: &Cancel,
) -> Result<Report, Failure> {
    let mismatch = |line: String| Failure::new(Code::Mismatch, line);
    let mut reader = source.open_blob(&layer.blob, cancel.clone()).await?;
    let (scratch, cancel, diff_id) = (scratch.to_owned(), cancel.clone(), layer.diff_id.clone());
    let local = if let Source::Docker(_) = source {
        None
    } else {
        Some(source.random(&layer.blob)?)
    };
    let work = tokio::task::spawn_blocking(move || {
        let unwritable = |error: io::Error| Failure::file(Side::Destination, "write to", &scratch, &error);
        // The blob's own digest first: it tells damage from a badly made layer.
        let blob = match local {
            Some(blob) => {
                io::copy(&mut reader, &mut io::sink()).map_err(|error| Failure::layer(&error))?;
                blob
            }
            None => {
                let mut file = NamedTempFile::new_in(&scratch).map_err(unwritable)?;
                io::copy(&mut reader, file.as_file_mut()).map_err(|error| Failure::layer(&error))?;
                Box::new(estargz::reader::FileBlob::new(file.into_file()).map_err(unwritable)?)
            }
        };
        let annotation = annotation.ok_or_else(|| mismatch(format!("it has no annotation {TOC_DIGEST_ANNOTATION}")))?;
        let toc = annotation
            .parse()
            .map_err(|error| mismatch(format!("annotation {TOC_DIGEST_ANNOTATION}: {error}")))?;
        let diff_id = diff_id
            .as_str()
            .parse()
            .map_err(|error| mismatch(format!("its diffID: {error}")))?;
        let blob = CancelReadAt { inner: &*blob, cancel };
        verify_layer(blob, Some(toc), Some(diff_id)).map_err(|error| mismatch(chain(&error)))
    });
    work.await
        .map_err(|error| Failure::new(Code::Runtime, error.to_string()))?
}
