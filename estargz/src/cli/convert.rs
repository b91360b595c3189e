//! `estargz convert`: every layer of an image rebuilt as eStargz, and the documents that name them rewritten.
//!
//! The order of work keeps faults cheap and results whole: the tree is read first, then each distinct layer is converted
//! once, at last documents are written from the leaves up. The result depends on the source and the options alone.

mod layers;
mod report;
mod rewrite;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use estargz::writer::{BuildOptions, DEFAULT_CHUNK_SIZE, DEFAULT_LEVEL};

use super::failure::{Code, Failure, Side};
use super::image::{Content, Node};
use super::location::Location;
use super::progress::Progress;
use super::stream::Cancel;
use super::transport::{Source, Target};
use super::{PlatformArgs, ProgressStyle, RegistryArgs};
use rewrite::Rewriter;

/// Largest list of prioritized paths.
const MAX_PRIORITIZE_BYTES: u64 = 64 << 20;
/// Missing prioritized paths that are named one by one.
const NAMED_MISSING: usize = 10;

/// Arguments of `convert`.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Image to convert.
    #[arg(value_name = "SRC", value_parser = Location::parse)]
    source: Location,
    /// Where the result goes.
    #[arg(value_name = "DST", value_parser = Location::parse)]
    destination: Location,
    #[command(flatten)]
    platforms: PlatformArgs,
    /// File of paths to put first in their layers for prefetching, one a line, in order of need.
    #[arg(long, value_name = "FILE")]
    prioritize: Option<PathBuf>,
    /// Compression level, 1 (fast) to 12 (small).
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LEVEL)]
    level: u32,
    /// Largest uncompressed chunk in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_CHUNK_SIZE)]
    chunk_size: u32,
    /// Compressing threads; all processors by default. The result does not depend on it.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    #[command(flatten)]
    registry: RegistryArgs,
    /// Writes the digest of the result to a file as well.
    #[arg(long, value_name = "FILE")]
    digest_file: Option<PathBuf>,
    /// Writes what became of each manifest and layer as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// How progress is shown on stderr.
    #[arg(long, value_enum, default_value = "auto")]
    progress: ProgressStyle,
    /// No progress and no notes.
    #[arg(short, long)]
    quiet: bool,
}

/// Converts an image and prints the digest of the result.
pub(super) async fn run(options: Options, cancel: Cancel) -> Result<(), Failure> {
    let client = options.registry.client()?;
    let progress = Progress::new(options.progress, options.quiet);
    let prioritized = match &options.prioritize {
        Some(path) => read_list(path)?,
        None => Vec::new(),
    };
    let source = Source::open(&options.source, &client)?;
    let tree = Node::load(&source, &options.platforms.platforms).await?;
    let target = Target::open(&options.destination, &client).await?;
    let threads = options.threads.unwrap_or_else(super::processors);
    let build = BuildOptions {
        chunk_size: options.chunk_size,
        level: options.level,
        threads,
        prioritized,
        spool_dir: Some(target.scratch().to_owned()),
    };
    let work = layers::Work { source: &source, target: &target, build: &build, progress: &progress, cancel: &cancel };
    let converted = layers::convert(&work, &tree).await?;
    note_missing(&progress, &converted, &build.prioritized);

    let mut rewriter = Rewriter::new(&converted);
    let root = rewriter.node(&tree).map_err(|error| {
        Failure::new(Code::Runtime, format!("cannot write the new documents: {error}"))
    })?;
    if converted.is_empty() {
        progress.note("note: nothing here is an image; everything is copied as it is");
    }
    let Rewriter { outputs, copies, .. } = rewriter;
    for blob in copies {
        layers::copy(&work, &blob).await?;
    }
    let mut outputs = outputs.into_iter();
    let top = outputs.next_back().expect("the root is the last document written");
    for output in outputs {
        cancel.check().map_err(|error| Failure::new(Code::Interrupted, error.to_string()))?;
        match output.media_type {
            Some(media_type) => target.put_manifest(output.bytes, &media_type).await?,
            None => target.put_bytes(output.bytes).await?,
        }
    }
    cancel.check().map_err(|error| Failure::new(Code::Interrupted, error.to_string()))?;
    let digest = root.blob.digest.to_string();
    let media_type = root.media_type;
    let report = report::build(&options.source, &options.destination, &tree, &converted, &rewriter_digests(&tree, &root.renamed, &digest));
    target.finish(top.bytes, &media_type).await?;
    if let Some(path) = &options.digest_file {
        write_file(path, format!("{digest}\n").as_bytes())?;
    }
    if let Some(path) = &options.report {
        write_file(path, &report::to_json(&report)?)?;
    }
    super::print(&digest)
}
