//! `estargz inspect`: what each layer is, from its footer and TOC alone; layers are not downloaded.

use comfy_table::{CellAlignment, ContentArrangement, Table, TableStyle};
use estargz::footer::FooterKind;
use estargz::reader::{LayerBlob, ReadError};
use estargz::toc::{
    BINDING_ANNOTATIONS, EntryType, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_DIGEST_ANNOTATION, Toc,
};
use serde::Serialize;

use super::failure::{Code, Failure, chain};
use super::image::{Image, Layer, Node};
use super::location::Location;
use super::progress::{short, size};
use super::transport::Source;
use super::{PlatformArgs, RegistryArgs};

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Image to look at.
    #[arg(value_name = "SRC", value_parser = Location::parse)]
    source: Location,
    #[command(flatten)]
    platforms: PlatformArgs,
    /// Prints JSON instead of tables.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    registry: RegistryArgs,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ImageView {
    source: String,
    digest: String,
    media_type: String,
    manifests: Vec<ManifestView>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ManifestView {
    digest: String,
    platform: Option<String>,
    layers: Vec<LayerView>,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct LayerView {
    digest: String,
    media_type: String,
    size: u64,
    /// A snapshotter can mount it lazily.
    estargz: bool,
    /// Which form of the format it has.
    form: Option<&'static str>,
    /// Why not.
    reason: Option<String>,
    toc_digest: Option<String>,
    /// Regular files.
    files: Option<u64>,
    /// All entries of the file tree.
    entries: Option<u64>,
    chunks: Option<u64>,
    /// Compressed bytes before the landmark, fetched ahead of the first start.
    prioritized_bytes: Option<u64>,
    /// Sum of the sizes of the regular files.
    content_size: Option<u64>,
}

/// Prints what the image's layers are.
pub(super) async fn run(options: Options) -> Result<(), Failure> {
    let client = options.registry.client()?;
    let source = Source::open(&options.source, &client)?;
    let tree = Node::load(&source, &options.platforms.platforms).await?;
    let mut manifests = Vec::new();
    for (node, image) in tree.images() {
        manifests.push(manifest(&source, node, image).await?);
    }
    let view = ImageView {
        source: options.source.to_string(),
        digest: tree.digest.to_string(),
        media_type: tree.media_type.clone(),
        manifests,
    };
    if options.json {
        let json =
            serde_json::to_string_pretty(&view).map_err(|error| Failure::new(Code::Runtime, error.to_string()))?;
        return super::print(&json);
    }
    super::print(&tables(&view))
}

async fn manifest(source: &Source, node: &Node, image: &Image) -> Result<ManifestView, Failure> {
    let mut layers = Vec::new();
    for layer in &image.layers {
        layers.push(
            view(source, layer)
                .await
                .map_err(|failure| failure.during(format!("layer {}", layer.blob.digest)))?,
        );
    }
    let platform = image.platform.as_ref().map(ToString::to_string);
    Ok(ManifestView {
        digest: node.digest.to_string(),
        platform,
        layers,
    })
}

async fn view(source: &Source, layer: &Layer) -> Result<LayerView, Failure> {
    let media_type = layer
        .descriptor
        .find::<String>("mediaType")
        .ok()
        .flatten()
        .unwrap_or_default();
    let digest = layer.blob.digest.to_string();
    let mut view = LayerView {
        digest,
        media_type,
        size: layer.blob.size,
        ..LayerView::default()
    };
    if layer.foreign {
        view.reason = Some("may not be distributed: it is fetched from its own place".to_owned());
        return Ok(view);
    }
    let blob = source.random(&layer.blob)?;
    // Reading blocks, over the network too.
    let opened = tokio::task::spawn_blocking(move || {
        LayerBlob::open(&*blob).map(|layer| {
            let digests = [layer.toc_document.digest, layer.compressed_toc_digest];
            (layer.footer.kind, digests, layer.toc)
        })
    });
    let opened = opened
        .await
        .map_err(|error| Failure::new(Code::Runtime, error.to_string()))?;
    match opened {
        Ok((kind, digests, toc)) => {
            let [toc_digest, compressed] = digests.map(|digest| digest.to_string());
            let bound = BINDING_ANNOTATIONS
                .iter()
                .find_map(|key| layer.descriptor.annotation(key));
            view.reason = match bound {
                _ if kind == FooterKind::LegacyGzip => Some("legacy form without digests".to_owned()),
                None => Some(format!("annotation {TOC_DIGEST_ANNOTATION} is missing")),
                Some(bound) if ![&toc_digest, &compressed].contains(&&bound) => {
                    Some(format!("the annotation names another TOC, {bound}"))
                }
                Some(_) => None,
            };
            view.estargz = view.reason.is_none();
            view.form = Some(kind.name());
            view.toc_digest = Some(toc_digest);
            view.count(&toc);
        }
        Err(error @ ReadError::Io { .. }) => return Err(Failure::layer(&error)),
        Err(error) => view.reason = Some(chain(&error)),
    }
    Ok(view)
}

impl LayerView {
    fn count(&mut self, toc: &Toc) {
        let landmark = |name: &str| matches!(name.trim_start_matches("./"), PREFETCH_LANDMARK | NO_PREFETCH_LANDMARK);
        let (mut files, mut entries, mut chunks, mut content) = (0, 0, 0, 0_u64);
        let mut prioritized = None;
        for entry in &toc.entries {
            match entry.kind {
                EntryType::Chunk => chunks += 1,
                EntryType::Reg if landmark(&entry.name) => {
                    if entry.name.trim_start_matches("./") == PREFETCH_LANDMARK {
                        prioritized = Some(entry.offset);
                    }
                }
                kind => {
                    entries += 1;
                    if kind == EntryType::Reg {
                        files += 1;
                        chunks += u64::from(entry.size > 0);
                        content = content.saturating_add(entry.size);
                    }
                }
            }
        }
        self.files = Some(files);
        self.entries = Some(entries);
        self.chunks = Some(chunks);
        self.content_size = Some(content);
        self.prioritized_bytes = Some(prioritized.unwrap_or(0));
    }
}

fn tables(view: &ImageView) -> String {
    let mut text = format!("{} {}", view.source, view.digest);
    for manifest in &view.manifests {
        let mut table = Table::new();
        table
            .load_style(TableStyle::new())
            .set_content_arrangement(ContentArrangement::Disabled);
        table.set_header([
            "LAYER",
            "SIZE",
            "ESTARGZ",
            "TOC",
            "FILES",
            "CHUNKS",
            "PRIORITIZED",
            "CONTENT",
        ]);
        for column in [1, 4, 5, 6, 7] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut reasons = Vec::new();
        for layer in &manifest.layers {
            let name = |digest: &str| {
                digest
                    .parse()
                    .map_or_else(|_| digest.to_owned(), |digest| short(&digest))
            };
            let number = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
            let bytes = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), size);
            table.add_row([
                name(&layer.digest),
                size(layer.size),
                if layer.estargz { "yes" } else { "no" }.to_owned(),
                layer.toc_digest.as_deref().map_or_else(|| "-".to_owned(), name),
                number(layer.files),
                number(layer.chunks),
                bytes(layer.prioritized_bytes),
                bytes(layer.content_size),
            ]);
            reasons.extend(
                layer
                    .reason
                    .as_ref()
                    .map(|reason| format!("\n{}: {reason}", name(&layer.digest))),
            );
        }
        let platform = manifest.platform.as_deref().unwrap_or("unknown platform");
        text.push_str(&format!("\n\n{platform} {}\n{}", manifest.digest, table.trim_fmt()));
        text.extend(reasons);
    }
    if view.manifests.is_empty() {
        text.push_str("\n\nno image in here (an artefact of another kind)");
    }
    text
}
