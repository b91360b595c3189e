//! Writes an OCI image layout: one image, its layers given as plain tar archives.
//!
//! The same layers give the same bytes: gzip by one pinned implementation without names or times, JSON with sorted keys.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// gzip's usual level, which most images in registries have.
const GZIP_LEVEL: u32 = 6;

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A blob in the layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// `sha256:…`
    pub digest: String,
    /// Bytes.
    pub size: u64,
}

/// A layer in the layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The compressed blob.
    pub blob: Blob,
    /// Digest of the tar archive.
    pub diff_id: String,
    /// Bytes of the tar archive.
    pub uncompressed: u64,
}

/// How the image is run.
#[derive(Debug, Clone, Default)]
pub struct ImageConfig {
    /// The command.
    pub entrypoint: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Directory the command starts in.
    pub working_dir: String,
}

/// A layout being written.
pub struct LayoutWriter {
    directory: PathBuf,
    layers: Vec<Layer>,
}

impl LayoutWriter {
    /// Begins a layout in `directory`, which has to be new or empty.
    pub fn create(directory: &Path) -> Result<Self> {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).with_context(|| format!("cannot create {}", blobs.display()))?;
        Ok(Self {
            directory: directory.into(),
            layers: Vec::new(),
        })
    }

    /// Adds the next layer; `write` writes its tar archive.
    pub fn add_layer(&mut self, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<Layer> {
        let part = self.directory.join("layer.part");
        let file = File::create(&part).with_context(|| format!("cannot create {}", part.display()))?;
        let blob = HashingWriter::new(BufWriter::new(file));
        let mut tar = HashingWriter::new(GzEncoder::new(blob, Compression::new(GZIP_LEVEL)));
        write(&mut tar)?;
        let (encoder, diff_id, uncompressed) = tar.finish();
        let (mut file, digest, size) = encoder.finish().context("cannot compress a layer")?.finish();
        file.flush().context("cannot write a layer")?;
        fs::rename(&part, self.blob_path(&digest)).context("cannot name a layer")?;
        let layer = Layer {
            blob: Blob { digest, size },
            diff_id,
            uncompressed,
        };
        self.layers.push(layer.clone());
        Ok(layer)
    }

    /// Writes the configuration, the manifest and the index, which names the image `tag`.
    pub fn finish(self, config: &ImageConfig, tag: &str) -> Result<Vec<Layer>> {
        let diff_ids: Vec<_> = self.layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = self.json_blob(&json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {"Entrypoint": config.entrypoint, "Env": config.env, "WorkingDir": config.working_dir},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }))?;
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|layer| descriptor(LAYER_TYPE, &layer.blob))
            .collect();
        let manifest = self.json_blob(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor(CONFIG_TYPE, &config),
            "layers": layers,
        }))?;
        let mut entry = descriptor(MANIFEST_TYPE, &manifest);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        self.write("index.json", &index)?;
        self.write("oci-layout", &json!({"imageLayoutVersion": "1.0.0"}))?;
        Ok(self.layers)
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        blob_path(&self.directory, digest)
    }

    fn json_blob(&self, value: &Value) -> Result<Blob> {
        let bytes = value.to_string().into_bytes();
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        fs::write(self.blob_path(&digest), &bytes).context("cannot write a blob")?;
        Ok(Blob {
            digest,
            size: bytes.len() as u64,
        })
    }

    fn write(&self, name: &str, value: &Value) -> Result<()> {
        fs::write(self.directory.join(name), value.to_string()).with_context(|| format!("cannot write {name}"))
    }
}

fn descriptor(media_type: &str, blob: &Blob) -> Value {
    json!({"mediaType": media_type, "digest": blob.digest, "size": blob.size})
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The file of a blob in a layout.
#[must_use]
pub fn blob_path(layout: &Path, digest: &str) -> PathBuf {
    layout
        .join("blobs/sha256")
        .join(digest.strip_prefix("sha256:").unwrap_or(digest))
}

/// An image read back from a layout: the first manifest that the index names with `tag`, through nested indexes.
#[derive(Debug, Clone)]
pub struct LayoutImage {
    /// Digest of the manifest.
    pub manifest_digest: String,
    /// The manifest.
    pub manifest: Value,
    /// The image configuration.
    pub config: Value,
}

impl LayoutImage {
    /// Reads `tag` of a layout.
    pub fn read(layout: &Path, tag: &str) -> Result<Self> {
        let index = json_file(&layout.join("index.json"))?;
        let manifests = index["manifests"].as_array().context("an index without manifests")?;
        let named = |entry: &&Value| entry["annotations"]["org.opencontainers.image.ref.name"] == tag;
        let entry = manifests
            .iter()
            .find(named)
            .with_context(|| format!("{} has no image {tag}", layout.display()))?;
        let mut descriptor = entry.clone();
        let mut manifest = Self::blob(layout, &descriptor)?;
        if let Some(inner) = manifest["manifests"].as_array() {
            descriptor = inner.first().context("an empty image index")?.clone();
            manifest = Self::blob(layout, &descriptor)?;
        }
        let config = Self::blob(layout, &manifest["config"])?;
        let digest = descriptor["digest"].as_str().context("a descriptor without a digest")?;
        Ok(Self {
            manifest_digest: digest.into(),
            manifest,
            config,
        })
    }

    fn blob(layout: &Path, descriptor: &Value) -> Result<Value> {
        json_file(&blob_path(
            layout,
            descriptor["digest"].as_str().context("a descriptor without a digest")?,
        ))
    }

    /// Layer descriptors, lowest first.
    #[must_use]
    pub fn layers(&self) -> Vec<Value> {
        self.manifest["layers"].as_array().cloned().unwrap_or_default()
    }

    /// Layer digests, lowest first.
    #[must_use]
    pub fn layer_digests(&self) -> Vec<String> {
        self.layers()
            .iter()
            .filter_map(|layer| layer["digest"].as_str().map(Into::into))
            .collect()
    }

    /// Sum of the layers' compressed sizes.
    #[must_use]
    pub fn compressed_bytes(&self) -> u64 {
        self.layers().iter().filter_map(|layer| layer["size"].as_u64()).sum()
    }

    /// Diff ids, lowest first.
    #[must_use]
    pub fn diff_ids(&self) -> Vec<String> {
        let ids = self.config["rootfs"]["diff_ids"].as_array();
        ids.into_iter()
            .flatten()
            .filter_map(|id| id.as_str().map(Into::into))
            .collect()
    }
}

fn json_file(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// A writer that digests and counts what passes.
struct HashingWriter<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> HashingWriter<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    fn finish(self) -> (W, String, u64) {
        (
            self.inner,
            format!("sha256:{}", hex::encode(self.hash.finalize())),
            self.bytes,
        )
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// `sha256:…` of what a reader gives.
pub fn digest_of(mut input: impl Read) -> Result<String> {
    let mut writer = HashingWriter::new(io::sink());
    io::copy(&mut input, &mut writer).context("cannot read")?;
    Ok(writer.finish().1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_layers_give_the_same_bytes() {
        let write = |directory: &Path| {
            let mut layout = LayoutWriter::create(directory).unwrap();
            layout.add_layer(|tar| Ok(tar.write_all(&[0; 1024])?)).unwrap();
            layout.finish(&ImageConfig::default(), "one").unwrap()
        };
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(write(a.path()), write(b.path()));
        assert_eq!(
            fs::read(a.path().join("index.json")).unwrap(),
            fs::read(b.path().join("index.json")).unwrap()
        );
        let image = LayoutImage::read(a.path(), "one").unwrap();
        assert_eq!(image.layer_digests().len(), 1);
        let blob = blob_path(a.path(), &image.layer_digests()[0]);
        assert_eq!(digest_of(File::open(&blob).unwrap()).unwrap(), image.layer_digests()[0]);
        assert_eq!(image.compressed_bytes(), fs::metadata(&blob).unwrap().len());
        assert_eq!(
            digest_of(flate2::read::GzDecoder::new(File::open(blob).unwrap())).unwrap(),
            image.diff_ids()[0]
        );
    }
}
