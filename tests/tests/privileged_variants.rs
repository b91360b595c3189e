//! The other forms of the format, written by the programs that brought them up: zstd:chunked by Debian's `ctr-remote` and by
//! skopeo, TOCs in an image of their own. All of them mount lazily, look like the plain image, and stay after a restart.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use estargz::reader::{FileBlob, LayerBlob, ReadAt as _};
use hullspeed_tests::layout::{ImageConfig, LayoutImage, LayoutWriter, blob_path};
use hullspeed_tests::operator;
use hullspeed_tests::scenario::{Node, Scenario};
use hullspeed_tests::tree::{self, Tree};
use hullspeed_tests::{fixture, process};
use serde_json::{Value, json};

/// containerd dials a snapshotter that was away only every few seconds.
const REDIAL_LIMIT: Duration = Duration::from_secs(30);
const TOC_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
const CHECKSUM_SUFFIX: &str = "zstd-chunked.manifest-checksum";
const LAYER_ANNOTATION: &str = "containerd.io/snapshot/stargz/layer.digest";
/// The last 46 bytes of a layer whose TOC is elsewhere.
const EXTERNAL_TOC_FOOTER: &[u8] =
    b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x15\0SG\x11\0STARGZEXTERNALTOC\x01\0\0\xff\xff\0\0\0\0\0\0\0\0";

fn ctr_remote(node: &Node, arguments: &[&str]) {
    let mut command = Command::new("ctr-remote");
    command.arg("--address").arg(node.containerd.socket());
    command.args(["--namespace", "k8s.io", "images"]).args(arguments);
    process::output(&mut command).unwrap();
}

/// What the plain image looks like, as containerd unpacks it.
async fn plain_tree(scenario: &Scenario, plain: &mut Node) -> Tree {
    plain.cri.pull(&scenario.plain_reference()).await.unwrap();
    let mut tree = plain.tree(&scenario.run, "plain", &scenario.plain).await.unwrap();
    fixture::forget_implied_times(&mut tree);
    tree
}

/// An image of the registry, by way of a layout.
fn pulled(scenario: &Scenario, reference: &str) -> LayoutImage {
    let layout = scenario.run.path().join("pulled");
    let mut command = Command::new("skopeo");
    command.args(["copy", "--quiet", "--src-tls-verify=false"]);
    command.arg(format!("docker://{reference}"));
    command.arg(format!("oci:{}:image", layout.display()));
    process::output(&mut command).unwrap();
    LayoutImage::read(&layout, "image").unwrap()
}

/// Every layer of `reference` is lazy, what is seen is `expected`, and a restart without the registry changes neither.
async fn check(scenario: &Scenario, reference: &str, image: &LayoutImage, expected: &Tree, requests_per_layer: usize) {
    let mut lazy = scenario.lazy_node("").await.unwrap();
    lazy.cri.pull(reference).await.unwrap();
    lazy.check_lazy(image).unwrap();
    let mut seen = lazy.tree(&scenario.run, "lazy", image).await.unwrap();
    fixture::forget_implied_times(&mut seen);
    assert_eq!(tree::differences(expected, &seen), None);
    let snapshotter = lazy.snapshotter().unwrap();
    assert_eq!(
        snapshotter
            .metric("hullspeed_verify_failures_total", &[])
            .await
            .unwrap(),
        0.0
    );
    let toc_requests = snapshotter
        .metric("hullspeed_fetch_requests_total", &["kind=\"toc\"", "result=\"ok\""])
        .await
        .unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let expected_requests = (image.layer_digests().len() * requests_per_layer) as f64;
    assert_eq!(toc_requests, expected_requests, "requests for TOCs");
    snapshotter.process().stop().unwrap();
    scenario.proxy.set_dead(true);
    snapshotter.start_again(&scenario.run).await.unwrap();
    let end = Instant::now() + REDIAL_LIMIT;
    while let Err(error) = lazy.snapshots.list().await {
        assert!(
            Instant::now() < end,
            "containerd does not find the snapshotter again: {error:#}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut again = lazy.tree(&scenario.run, "again", image).await.unwrap();
    fixture::forget_implied_times(&mut again);
    assert_eq!(tree::differences(expected, &again), None);
    scenario.proxy.heal();
}

fn annotated(image: &LayoutImage, suffix: &str) -> bool {
    image.layers().iter().all(|layer| {
        let annotations = layer["annotations"].as_object();
        annotations.is_some_and(|annotations| annotations.keys().any(|key| key.ends_with(suffix)))
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn zstd_chunked_of_the_reference_mounts() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut plain = scenario.plain_node().await.unwrap();
    let expected = plain_tree(&scenario, &mut plain).await;
    let (source, target) = (scenario.plain_reference(), scenario.reference("zstdchunked"));
    ctr_remote(&plain, &["convert", "--zstdchunked", "--oci", &source, &target]);
    ctr_remote(&plain, &["push", "--plain-http", &target]);
    let image = pulled(&scenario, &target);
    assert!(annotated(&image, TOC_ANNOTATION) && annotated(&image, CHECKSUM_SUFFIX));
    check(&scenario, &target, &image, &expected, 1).await;
}

/// containers/storage names the compressed TOC, in annotations that containerd does not hand on.
#[tokio::test(flavor = "multi_thread")]
async fn zstd_chunked_of_skopeo_mounts() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut plain = scenario.plain_node().await.unwrap();
    let expected = plain_tree(&scenario, &mut plain).await;
    let layout = scenario.run.path().join("chunked");
    let mut command = Command::new("skopeo");
    command.args(["copy", "--quiet", "--dest-compress-format", "zstd:chunked"]);
    command.arg(format!(
        "oci:{}:{}",
        scenario.plain_layout.display(),
        scenario.plain_tag
    ));
    command.arg(format!("oci:{}:chunked", layout.display()));
    process::output(&mut command).unwrap();
    let image = LayoutImage::read(&layout, "chunked").unwrap();
    assert!(annotated(&image, CHECKSUM_SUFFIX) && !annotated(&image, TOC_ANNOTATION));
    let source = format!("oci:{}:chunked", layout.display());
    scenario.registry.push(&source, "test/image:chunked").unwrap();
    check(&scenario, &scenario.reference("chunked"), &image, &expected, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_with_their_tocs_in_another_image_mount() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut plain = scenario.plain_node().await.unwrap();
    let expected = plain_tree(&scenario, &mut plain).await;
    let target = scenario.reference("external");
    let mut help = Command::new("ctr-remote");
    let help = process::output(help.args(["images", "convert", "--help"])).unwrap();
    // Debian 12's version does not know this form yet: its image is then made from ours, byte for byte as later versions do.
    if String::from_utf8(help).unwrap().contains("--estargz-external-toc") {
        let options = [
            "--estargz",
            "--estargz-external-toc",
            "--estargz-min-chunk-size",
            "20000",
            "--oci",
        ];
        let source = scenario.plain_reference();
        ctr_remote(&plain, &[&["convert"], &options[..], &[&source, &target]].concat());
        for reference in [target.clone(), format!("{target}-esgztoc")] {
            ctr_remote(&plain, &["push", "--plain-http", &reference]);
        }
    } else {
        let layout = scenario.run.path().join("external");
        Externals::of(&scenario, &layout).write();
        for tag in ["external", "external-esgztoc"] {
            let source = format!("oci:{}:{tag}", layout.display());
            scenario.registry.push(&source, &format!("test/image:{tag}")).unwrap();
        }
    }
    let image = pulled(&scenario, &target);
    check(&scenario, &target, &image, &expected, 2).await;
}

/// Without its TOC image a layer is unpacked, and the reason says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_whose_toc_image_is_missing_is_unpacked_for_that_reason() {
    let scenario = Scenario::fixture().await.unwrap();
    let layout = scenario.run.path().join("external");
    let layers = Externals::of(&scenario, &layout).write();
    let source = format!("oci:{}:external", layout.display());
    scenario.registry.push(&source, "test/image:external").unwrap();
    let mut lazy = scenario.lazy_node("").await.unwrap();
    lazy.cri.pull(&scenario.reference("external")).await.unwrap();
    let snapshotter = lazy.snapshotter().unwrap();
    let refused = snapshotter
        .metric("hullspeed_snapshot_prepare_total", &["toc_image"])
        .await;
    assert_eq!(refused.unwrap(), layers as f64);
    let records = snapshotter.log_records().unwrap();
    let record = records.iter().find(|record| record["reason"] == "toc_image").unwrap();
    assert!(
        record["error"].as_str().unwrap().contains(":external-esgztoc"),
        "{record}"
    );
}

/// containers/storage writes a run of zeros as one chunk, however long. A chunk is verified in memory, as a whole; so a layer with a
/// longer one than fits there is unpacked, and its operator is told which file does it.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_zeros_beyond_the_limit_is_unpacked_and_the_reason_names_it() {
    let scenario = Scenario::fixture().await.unwrap();
    for (tag, zeros) in [("long", 100_u64 << 20), ("short", 50 << 20)] {
        let plain = scenario.run.path().join(format!("{tag}-plain"));
        let mut writer = LayoutWriter::create(&plain).unwrap();
        let written = writer.add_layer(|output| {
            let mut tar = tar::Builder::new(output);
            let mut append = |name: &str, size: u64, content: &mut dyn std::io::Read| {
                let mut header = tar::Header::new_ustar();
                header.set_mode(0o644);
                header.set_size(size);
                tar.append_data(&mut header, name, content)
            };
            append("var/swap", zeros, &mut std::io::repeat(0).take(zeros))?;
            append("etc/motd", 5, &mut &b"hello"[..])?;
            tar.into_inner()?;
            Ok(())
        });
        written.unwrap();
        writer.finish(&ImageConfig::default(), tag).unwrap();
        let chunked = scenario.run.path().join(format!("{tag}-chunked"));
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--dest-compress-format", "zstd:chunked"]);
        command.arg(format!("oci:{}:{tag}", plain.display()));
        command.arg(format!("oci:{}:{tag}", chunked.display()));
        process::output(&mut command).unwrap();
        let source = format!("oci:{}:{tag}", chunked.display());
        scenario.registry.push(&source, &format!("test/image:{tag}")).unwrap();
    }
    let mut node = scenario.lazy_node("").await.unwrap();
    let config = node.snapshotter().unwrap().config();
    for (tag, lazy) in [("long", false), ("short", true)] {
        let image = scenario.reference(tag);
        node.cri.pull(&image).await.unwrap();
        let found = operator::explained(&config, &image).unwrap();
        let layer = &found["layers"][0];
        if lazy {
            assert_eq!(
                (&layer["state"], &layer["reason"]),
                (&json!("lazy"), &json!("")),
                "{found:#}"
            );
            continue;
        }
        assert_eq!(
            (&layer["state"], &layer["reason"]),
            (&json!("overlay"), &json!("too_large")),
            "{found:#}"
        );
        let error = layer["error"].as_str().unwrap();
        for part in ["\"var/swap\"", "104857600 bytes", "the limit is 67108864"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let table = operator::said(&config, &["explain", &image]).unwrap().out;
        assert!(table.contains("too_large") && table.contains("var/swap"), "{table}");
    }
    node.cri.remove_everything().await.unwrap();
}

/// Our converted image with the TOCs taken out of its layers.
struct Externals {
    from: PathBuf,
    to: PathBuf,
    image: LayoutImage,
}

impl Externals {
    fn of(scenario: &Scenario, layout: &Path) -> Self {
        fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
        Self {
            from: scenario.converted_layout.clone(),
            to: layout.to_owned(),
            image: scenario.converted.clone(),
        }
    }

    /// Writes both images; the number of layers.
    fn write(&self) -> usize {
        let (mut layers, mut tocs, mut diff_ids) = (Vec::new(), Vec::new(), Vec::new());
        for layer in self.image.layers() {
            let path = blob_path(&self.from, layer["digest"].as_str().unwrap());
            let blob = LayerBlob::open(FileBlob::new(File::open(path).unwrap()).unwrap()).unwrap();
            let mut bytes = vec![0; usize::try_from(blob.source.size()).unwrap()];
            blob.source.read_exact_at(0, &mut bytes).unwrap();
            let toc = blob.footer.toc.clone().unwrap();
            let member = bytes[usize::try_from(toc.start).unwrap()..usize::try_from(toc.end).unwrap()].to_vec();
            bytes.truncate(usize::try_from(blob.footer.toc_offset).unwrap());
            bytes.extend_from_slice(EXTERNAL_TOC_FOOTER);
            let mut tar = Vec::new();
            std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(&bytes[..]), &mut tar).unwrap();
            diff_ids.push(Digest::of(&tar).to_string());
            let mut layer = self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &bytes);
            layer["annotations"] = json!({TOC_ANNOTATION: blob.toc_document.digest});
            let mut toc = self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &member);
            toc["annotations"] = json!({LAYER_ANNOTATION: layer["digest"]});
            layers.push(layer);
            tocs.push(toc);
        }
        let count = layers.len();
        let mut config = self.image.config.clone();
        config["rootfs"]["diff_ids"] = json!(diff_ids);
        let images = [("external", config, layers), ("external-esgztoc", json!({}), tocs)];
        let manifests: Vec<Value> = images
            .into_iter()
            .map(|(tag, config, layers)| self.manifest(tag, &config, &layers))
            .collect();
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.to.join("index.json"), index.to_string()).unwrap();
        fs::write(
            self.to.join("oci-layout"),
            json!({"imageLayoutVersion": "1.0.0"}).to_string(),
        )
        .unwrap();
        count
    }

    fn manifest(&self, tag: &str, config: &Value, layers: &[Value]) -> Value {
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers});
        let mut entry = self.blob(kind, manifest.to_string().as_bytes());
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        entry
    }

    /// Writes a blob; its descriptor.
    fn blob(&self, kind: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes).to_string();
        fs::write(blob_path(&self.to, &digest), bytes).unwrap();
        json!({"mediaType": kind, "digest": digest, "size": bytes.len()})
    }
}
