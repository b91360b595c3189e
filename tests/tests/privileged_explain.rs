//! What an operator is told: the command line against a running snapshotter, with a real containerd and a real registry.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use hullspeed_tests::cri::Pod;
use hullspeed_tests::fixture::{LARGE_FILE, LARGE_SIZE, large_content};
use hullspeed_tests::operator::{self, Said};
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use serde_json::Value;

/// Only what is read is fetched.
const NOTHING_AHEAD: &str = "[fetch]\nprefetch = false\nbackground = false\n";

fn said(config: &Path, arguments: &[&str]) -> (i32, String, String) {
    let Said { code, out, error } = operator::said(config, arguments).unwrap();
    (code, out, error)
}

fn json(config: &Path, arguments: &[&str]) -> Value {
    operator::answer(config, arguments).unwrap()
}

fn explained(config: &Path, subject: &str) -> Value {
    operator::explained(config, subject).unwrap()
}

fn layers(explanation: &Value) -> &Vec<Value> {
    explanation["layers"].as_array().unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn sum(layers: &[Value], of: impl Fn(&Value) -> u64) -> u64 {
    layers.iter().map(of).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_its_layers_and_its_containers_are_explained() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node(NOTHING_AHEAD).await.unwrap();
    let config = node.snapshotter().unwrap().config();
    let image = scenario.reference(CONVERTED);
    let (code, out, error) = said(&config, &["explain", &image]);
    assert_eq!((code, out.as_str()), (66, ""), "{error}");
    assert!(error.contains(&image) && error.contains("nothing is known"), "{error}");

    node.cri.pull(&image).await.unwrap();
    node.check_lazy(&scenario.converted).unwrap();
    let before = explained(&config, &image);
    let digests: Vec<&str> = layers(&before)
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap())
        .collect();
    assert_eq!(digests, scenario.converted.layer_digests());
    for layer in layers(&before) {
        assert!(
            layer["state"] == "lazy" && layer["mounted"] == true && layer["reason"] == "",
            "{layer:#}"
        );
        assert!(layer["images"][0] == image.as_str() && !layer["snapshots"][0].as_str().unwrap().is_empty());
    }
    let saved = number(&before["sums"]["bytes_saved"]);
    assert!(saved >= LARGE_SIZE as u64, "{before:#}");

    // One read costs what it costs, and no more is told than that.
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    let file = File::open(view.path().join(LARGE_FILE)).unwrap();
    let mut first = vec![0; 4096];
    file.read_exact_at(&mut first, 0).unwrap();
    assert!(first == large_content()[..4096]);
    let after = explained(&config, &image);
    let cost = |kind: &'static str| {
        sum(layers(&after), |layer| {
            let fetched = layer["cost"]["fetched"].as_array().unwrap();
            let of_kind = fetched.iter().filter(|fetched| fetched["kind"] == kind);
            of_kind.map(|fetched| number(&fetched["bytes"])).sum()
        })
    };
    assert!(cost("demand") >= 4096, "{after:#}");
    assert!(
        number(&after["sums"]["stalls"]) >= 1 && number(&after["sums"]["bytes_saved"]) < saved,
        "{after:#}"
    );
    let chunks = |explanation: &Value| {
        sum(layers(explanation), |layer| {
            number(&layer["residence"]["chunks_resident"])
        })
    };
    assert!(chunks(&after) > chunks(&before));
    assert_eq!(after["sums"]["lazy"], after["sums"]["layers"]);

    // The same by the manifest; one layer by both its digests; a container by its id.
    let manifest = after["manifest_digest"].as_str().unwrap();
    if !manifest.is_empty() {
        assert_eq!(explained(&config, manifest)["name"], image.as_str());
    }
    let layer = &layers(&after)[0];
    for digest in [&layer["digest"], &layer["toc_digest"]] {
        let found = explained(&config, digest.as_str().unwrap());
        assert!(
            found["kind"] == "layer" && layers(&found)[0]["toc_digest"] == layer["toc_digest"],
            "{found:#}"
        );
    }
    let pod = Pod::new(
        "explained",
        &scenario.run.directory("pods").unwrap(),
        &scenario.run.names().cgroup,
    );
    let sandbox = node.cri.run_sandbox(&pod).await.unwrap();
    let container = node.cri.create_container(&sandbox, &pod, "main", &image).await.unwrap();
    let found = explained(&config, &container);
    assert!(
        found["kind"] == "snapshot" && layers(&found).len() == digests.len(),
        "{found:#}"
    );

    let (code, table, _) = said(&config, &["explain", &image]);
    assert_eq!(code, 0);
    for word in [image.as_str(), "lazy", "STALLS", &digests[0]["sha256:".len()..][..12]] {
        assert!(table.contains(word), "{word} is missing:\n{table}");
    }
    let status = json(&config, &["status"]);
    assert_eq!(number(&status["layers_mounted"]), digests.len() as u64, "{status:#}");
    assert!(number(&status["snapshots_lazy"]) >= digests.len() as u64 && number(&status["cache"]["bytes"]) > 0);
    drop(file);
    node.snapshots.remove(view).await.unwrap();
    node.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn why_an_image_is_not_lazy_is_known_after_a_restart_too() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    let config = node.snapshotter().unwrap().config();
    let image = scenario.plain_reference();
    node.cri.pull(&image).await.unwrap();
    for restarted in [false, true] {
        if restarted {
            let snapshotter = node.snapshotter().unwrap();
            snapshotter.process().kill().unwrap();
            snapshotter.start_again(&scenario.run).await.unwrap();
        }
        let found = explained(&config, &image);
        assert_eq!(layers(&found).len(), scenario.plain.layer_digests().len());
        for layer in layers(&found) {
            assert!(
                layer["state"] == "overlay" && layer["reason"] == "no_toc_digest",
                "{layer:#}"
            );
            assert!(layer["error"].as_str().unwrap().contains("annotation") && number(&layer["decided_unix_ms"]) > 0);
        }
        assert_eq!(found["sums"]["lazy"], 0);
    }
    let (code, _, _) = said(&config, &["explain", &scenario.reference(CONVERTED)]);
    assert_eq!(code, 66);
    node.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_fails_is_named_with_the_cause() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario
        .lazy_node(&format!("{NOTHING_AHEAD}read_deadline = \"4s\"\n"))
        .await
        .unwrap();
    let config = node.snapshotter().unwrap().config();
    let image = scenario.reference(CONVERTED);
    node.cri.pull(&image).await.unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    scenario.proxy.inject(FaultRule::get("/blobs/", Fault::Status(503)));
    let path = view.path().join(LARGE_FILE);
    tokio::task::spawn_blocking(move || fs::read(path).unwrap_err())
        .await
        .unwrap();
    let found = explained(&config, &image);
    let failures: Vec<&Value> = layers(&found)
        .iter()
        .map(|layer| &layer["cost"]["last_failure"])
        .filter(|failure| !failure.is_null())
        .collect();
    assert_eq!(failures.len(), 1, "{found:#}");
    assert!(failures[0]["what"].as_str().unwrap().contains("503"), "{found:#}");
    assert_eq!(failures[0]["host"], scenario.proxy.address().to_string());
    let status = json(&config, &["status"]);
    assert!(
        status["failures"][0]["what"].as_str().unwrap().contains("503"),
        "{status:#}"
    );
    assert_eq!(status["hosts"][0]["host"], scenario.proxy.address().to_string());
    scenario.proxy.heal();
    // What asks within 50 ms of an error is taken for the kernel's repetition, which waits less than the host is left alone.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    node.snapshots.remove(view).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_is_listed_verified_and_pruned() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node(NOTHING_AHEAD).await.unwrap();
    let (config, root) = (node.snapshotter().unwrap().config(), node.snapshotter().unwrap().root());
    let image = scenario.reference(CONVERTED);
    node.cri.pull(&image).await.unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    let listed = json(&config, &["cache", "ls"]);
    let cached = listed["layers"].as_array().unwrap();
    assert_eq!(cached.len(), scenario.converted.layers().len());
    for layer in cached {
        assert!(
            layer["mounted"] == true && number(&layer["references"]) == 1,
            "{layer:#}"
        );
        assert!(
            number(&layer["last_used_unix_ms"]) > 0 && layer["image"] == image.as_str(),
            "{layer:#}"
        );
    }
    let usage = json(&config, &["cache", "usage"]);
    assert_eq!(
        number(&usage["bytes"]),
        sum(cached, |layer| number(&layer["residence"]["disk_bytes"]))
    );
    assert!(
        number(&usage["bytes"]) > LARGE_SIZE as u64 && usage["unreferenced_layers"] == 0,
        "{usage:#}"
    );
    let pruned = json(&config, &["cache", "prune", "--all-unused"]);
    assert_eq!(pruned["layers"], 0, "what snapshots refer to is removed");

    // A byte turns in the largest chunk of the mounted layer.
    let (code, out, error) = said(&config, &["cache", "verify"]);
    assert!(code == 0 && out.contains(" 0 wrong"), "{out}{error}");
    let largest = cached
        .iter()
        .max_by_key(|layer| number(&layer["residence"]["disk_bytes"]))
        .unwrap();
    let toc = largest["toc_digest"].as_str().unwrap();
    let directory = root.join("layers").join(&toc["sha256:".len()..]);
    let index = estargz::index::LayerIndex::open(fs::read(directory.join("index")).unwrap()).unwrap();
    let data = index.lookup(1, b"data").unwrap();
    let ino = index.lookup(data, b"large.bin").unwrap();
    let chunk = index.chunk(index.chunks_in(ino, 0..1).start).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(directory.join("data"))
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, chunk.data_offset + 5).unwrap();
    file.write_all_at(&[!byte[0]], chunk.data_offset + 5).unwrap();
    let (code, out, error) = said(&config, &["cache", "verify", toc]);
    assert!(code == 1 && error.contains("1 chunks"), "{out}{error}");
    assert!(out.contains(&format!("/{LARGE_FILE} at 0")), "{out}");
    let (code, ..) = said(&config, &["cache", "verify", toc]);
    assert_eq!(code, 0, "what is wrong is dropped once");
    rustix::fs::fadvise(
        File::open(view.path().join(LARGE_FILE)).unwrap(),
        0,
        None,
        rustix::fs::Advice::DontNeed,
    )
    .unwrap();
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    assert_eq!(
        said(&config, &["cache", "verify", &format!("sha256:{}", "0".repeat(64))]).0,
        66
    );

    // Once the image is gone its layers are of no use.
    node.snapshots.remove(view).await.unwrap();
    node.cri.remove_image(&image).await.unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    let mut removed = 0;
    // containerd lets go of the snapshots when it collects garbage, and a layer is unmounted after that.
    while removed < cached.len() as u64 {
        assert!(Instant::now() < end, "only {removed} layers were removed");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let pruned = json(&config, &["cache", "prune", "--all-unused"]);
        assert_eq!(pruned["failed"], 0);
        removed += number(&pruned["layers"]);
    }
    assert!(json(&config, &["cache", "ls"])["layers"].as_array().unwrap().is_empty());
    assert_eq!(fs::read_dir(root.join("layers")).unwrap().count(), 0);
}
