//! `estargz convert`: every layer of an image rebuilt as eStargz, and the documents that name them rewritten.
//!
//! The order of work keeps faults cheap and results whole: the tree is read first, then each distinct layer is converted
//! once, at last documents are written from the leaves up. The result depends on the source and the options alone.

mod layers;
mod report;
mod rewrite;

use std::io::{Read as _, Write as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use estargz::writer::{BuildOptions, DEFAULT_CHUNK_SIZE, DEFAULT_LEVEL};

use super::failure::{Code, Failure, Side};
use super::image::Node;
use super::location::Location;
use super::progress::Progress;
use super::stream::Cancel;
use super::transport::oci_layout::{parent, readable};
use super::transport::{Source, Target};
use super::{PlatformArgs, ProgressStyle, RegistryArgs};
use layers::Layers;
use rewrite::Rewritten;

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
    let work = layers::Work {
        source: &source,
        target: &target,
        build: &build,
        progress: &progress,
        cancel: &cancel,
    };
    let converted = layers::convert(&work, &tree).await?;
    note_missing(&progress, &converted, &build.prioritized);

    let new = rewrite::rewrite(&tree, &converted)
        .map_err(|error| Failure::new(Code::Runtime, format!("cannot write the new documents: {error}")))?;
    if converted.is_empty() {
        progress.note("note: nothing here has layers to convert; everything is copied as it is");
    }
    layers::copy_others(&work, &new).await?;
    let report = report::build(&options, &new, &converted, &tree);
    let digest = new.root.blob.digest.to_string();
    put_documents(target, new, &cancel).await?;
    if let Some(path) = &options.digest_file {
        write_file(path, format!("{digest}\n").as_bytes())?;
    }
    if let Some(path) = &options.report {
        write_file(path, &report?)?;
    }
    super::print(&digest)
}

/// Hands the documents over, what is referred to before what refers to it, the root at last.
async fn put_documents(target: Target, new: Rewritten, cancel: &Cancel) -> Result<(), Failure> {
    let interrupted = |error: std::io::Error| Failure::new(Code::Interrupted, error.to_string());
    for output in new.documents {
        cancel.check().map_err(interrupted)?;
        match output.media_type {
            Some(media_type) => target.put_manifest(output.bytes, &media_type).await?,
            None => target.put_bytes(output.bytes).await?,
        }
    }
    cancel.check().map_err(interrupted)?;
    target.finish(new.root.bytes, &new.root.media_type).await
}

fn read_list(path: &Path) -> Result<Vec<Vec<u8>>, Failure> {
    let failed = |error: std::io::Error| {
        let failure = Failure::file(Side::Source, "read", path, &error);
        failure.during("--prioritize")
    };
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_PRIORITIZE_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_PRIORITIZE_BYTES {
        let line = format!(
            "--prioritize: {} has more than {MAX_PRIORITIZE_BYTES} bytes",
            path.display()
        );
        return Err(Failure::new(Code::Usage, line));
    }
    let lines = text
        .split(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    Ok(lines.filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect())
}

/// Names the prioritized paths that no layer has: they are usually typing errors.
fn note_missing(progress: &Progress, layers: &Layers, prioritized: &[Vec<u8>]) {
    if layers.is_empty() {
        return;
    }
    let missing = |path: &&Vec<u8>| layers.values().all(|layer| layer.missing.contains(*path));
    let missing: Vec<_> = prioritized
        .iter()
        .filter(missing)
        .map(|path| String::from_utf8_lossy(path))
        .collect();
    if !missing.is_empty() {
        let more = missing.len().saturating_sub(NAMED_MISSING);
        let more = if more > 0 {
            format!(" and {more} more")
        } else {
            String::new()
        };
        let named = missing
            .iter()
            .take(NAMED_MISSING)
            .map(AsRef::as_ref)
            .collect::<Vec<&str>>()
            .join(", ");
        progress.note(&format!("note: in no layer: {named}{more}"));
    }
}

/// Writes a small file in one step.
fn write_file(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let write = || {
        let mut file = tempfile::NamedTempFile::new_in(parent(path))?;
        file.write_all(bytes)?;
        readable(file.path())?;
        file.persist(path).map_err(|error| error.error)
    };
    write()
        .map(|_| ())
        .map_err(|error| Failure::file(Side::Destination, "write to", path, &error))
}
