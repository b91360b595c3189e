//! Agreement with the format's reference implementation, Debian's `ctr-remote`, and with plain gzip and tar.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Command;

use hullspeed_tests::containerd::Containerd;
use hullspeed_tests::layout::LayoutImage;
use hullspeed_tests::scenario::{CONVERTED, Scenario, estargz};
use hullspeed_tests::tree;
use hullspeed_tests::{fixture, process};

const TOC_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";

fn ctr_remote(containerd: &Containerd, arguments: &[&str]) -> String {
    let mut command = Command::new("ctr-remote");
    command
        .arg("--address")
        .arg(containerd.socket())
        .args(["--namespace", "k8s.io"])
        .args(arguments);
    String::from_utf8(process::output(&mut command).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn gunzip_and_tar_read_our_layers() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut all = String::new();
    for digest in scenario.converted.layer_digests() {
        let blob = scenario.converted_blob(&digest);
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail", "-c", "gunzip --stdout < \"$1\" | tar t", "bash"])
            .arg(blob);
        all += &String::from_utf8(process::output(&mut command).unwrap()).unwrap();
    }
    for name in [
        "data/large.bin",
        "links/three",
        ".wh.gone-alone",
        "opaque/.wh..wh..opq",
        "stargz.index.json",
    ] {
        assert!(
            all.lines().any(|line| line.trim_start_matches("./") == name),
            "{name} is missing in:\n{all}"
        );
    }
}

/// Our annotation is the digest that the reference computes from the blob.
#[tokio::test(flavor = "multi_thread")]
async fn the_reference_computes_our_toc_digests() {
    let scenario = Scenario::fixture().await.unwrap();
    let node = scenario.plain_node().await.unwrap();
    ctr_remote(
        &node.containerd,
        &["images", "pull", "--plain-http", &scenario.reference(CONVERTED)],
    );
    for layer in scenario.converted.layers() {
        let computed = ctr_remote(
            &node.containerd,
            &["images", "get-toc-digest", layer["digest"].as_str().unwrap()],
        );
        assert_eq!(computed.trim(), layer["annotations"][TOC_ANNOTATION].as_str().unwrap());
    }
}

/// Layers that the reference wrote mount on our snapshotter, look right and pass our verification.
#[tokio::test(flavor = "multi_thread")]
async fn layers_of_the_reference_mount_and_verify() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut plain = scenario.plain_node().await.unwrap();
    let (source, target) = (scenario.plain_reference(), scenario.reference("reference"));
    plain.cri.pull(&source).await.unwrap();
    let mut expected = plain.tree(&scenario.run, "plain", &scenario.plain).await.unwrap();
    ctr_remote(
        &plain.containerd,
        &["images", "convert", "--estargz", "--oci", &source, &target],
    );
    ctr_remote(&plain.containerd, &["images", "push", "--plain-http", &target]);
    estargz(&scenario.run, &["verify", &format!("docker://{target}")]).unwrap();

    let mut lazy = scenario.lazy_node("").await.unwrap();
    lazy.cri.pull(&target).await.unwrap();
    let image = pulled(&scenario, &target);
    lazy.check_lazy(&image).unwrap();
    let mut seen = lazy.tree(&scenario.run, "lazy", &image).await.unwrap();
    fixture::forget_implied_times(&mut expected);
    fixture::forget_implied_times(&mut seen);
    assert_eq!(tree::differences(&expected, &seen), None);
}

/// An image of the registry, by way of a layout.
fn pulled(scenario: &Scenario, reference: &str) -> LayoutImage {
    let layout = scenario.run.path().join("pulled");
    let mut command = Command::new("skopeo");
    command.args([
        "copy",
        "--quiet",
        "--src-tls-verify=false",
        &format!("docker://{reference}"),
    ]);
    command.arg(format!("oci:{}:image", layout.display()));
    process::output(&mut command).unwrap();
    assert!(Path::new(&layout).join("index.json").exists());
    LayoutImage::read(&layout, "image").unwrap()
}
