//! The `estargz` binary, run as users run it, against layouts, archives, docker-registry and skopeo.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a failed step is a failed test"
)]

mod fixture;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use fixture::{
    CONFIG, DOCKER_MANIFEST, GZIP, INDEX, Layout, MANIFEST, Registry, TOC, bad, estargz, good, multi_platform, noise,
    read_blob, read_json, run, tar, tool, tree,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn name(dir: &Path, tail: &str) -> String {
    format!("oci:{}{tail}", dir.display())
}

#[test]
fn a_whole_index_is_converted_and_the_rest_of_it_is_kept() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    multi_platform(&from, true);
    let report_path = temp.path().join("report.json");
    let digest_path = temp.path().join("digest");
    let (report, digest_file) = (report_path.display().to_string(), digest_path.display().to_string());
    let flags = ["--report", &report, "--digest-file", &digest_file, "--threads", "3"];
    let (src, dst) = (name(&from, ":multi"), name(&to, ":out"));
    let digest = good(&[&["convert", &src, &dst][..], &flags[..]].concat());
    assert_eq!(fs::read_to_string(&digest_path).unwrap().trim(), digest);

    // skopeo reads the same.
    let raw = tool("skopeo", &["inspect", "--raw", &dst]);
    assert_eq!(Digest::of(&raw).to_string(), digest);
    let index = read_json(&to, &digest);
    assert_eq!(index["mediaType"], INDEX);
    let entries = index["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 3);
    let [attestation, amd64, arm64] = entries.as_slice() else {
        panic!()
    };
    assert_eq!(
        attestation["annotations"]["vnd.docker.reference.digest"],
        amd64["digest"]
    );
    assert_eq!(attestation["platform"]["os"], "unknown");
    assert_eq!(
        (&amd64["annotations"]["of.the"], &amd64["mediaType"]),
        (&json!("entry"), &json!(MANIFEST))
    );
    assert_eq!(
        (&arm64["platform"]["variant"], &arm64["mediaType"]),
        (&json!("v8"), &json!(MANIFEST))
    );
    let statement = read_json(&to, text(&attestation["digest"]));
    assert_eq!(
        read_blob(&to, text(&statement["layers"][0]["digest"])),
        b"{\"statement\":1}"
    );

    for (entry, layers) in [(amd64, 3), (arm64, 2)] {
        let manifest = read_json(&to, text(&entry["digest"]));
        assert_eq!(
            (&manifest["mediaType"], &manifest["config"]["mediaType"]),
            (&json!(MANIFEST), &json!(CONFIG))
        );
        assert_eq!(
            (&manifest["unknown"], &manifest["annotations"]),
            (&json!({"x": [1, 2]}), &json!({"of.the": "manifest"}))
        );
        let config = read_blob(&to, text(&manifest["config"]["digest"]));
        let config_text = String::from_utf8(config.clone()).unwrap();
        for kept in [
            r#""zz":{"b":1.50,"a":[1e3]}"#,
            r#""Env":["A=\u00e9"]"#,
            r#""extra":1"#,
            r#""empty_layer":true"#,
        ] {
            assert!(config_text.contains(kept), "{kept} is not in {config_text}");
        }
        let config: Value = serde_json::from_slice(&config).unwrap();
        let all = manifest["layers"].as_array().unwrap();
        assert_eq!(all.len(), layers);
        for (layer, diff_id) in all.iter().zip(config["rootfs"]["diff_ids"].as_array().unwrap()) {
            let blob = read_blob(&to, text(&layer["digest"]));
            assert_eq!(
                (&layer["mediaType"], layer["size"].as_u64()),
                (&json!(GZIP), Some(blob.len() as u64))
            );
            assert_eq!(layer["annotations"]["kept"], "yes");
            assert!(text(&layer["annotations"][TOC]).starts_with("sha256:"));
            let mut plain = Vec::new();
            std::io::copy(&mut flate2::read::MultiGzDecoder::new(blob.as_slice()), &mut plain).unwrap();
            assert_eq!(Digest::of(&plain).to_string(), text(diff_id));
            let size = text(&layer["annotations"]["io.containers.estargz.uncompressed-size"]);
            assert_eq!(size, plain.len().to_string());
            let footer = estargz::footer::Footer::parse(&blob, blob.len() as u64).unwrap();
            let offset = text(&layer["annotations"]["io.hullspeed.estargz.toc-offset"]);
            assert_eq!(offset, footer.toc_offset.to_string());
        }
    }
    let report: Value = serde_json::from_slice(&fs::read(&report_path).unwrap()).unwrap();
    assert_eq!(report["digest"], digest);
    assert_eq!(
        report["layers"].as_array().unwrap().len(),
        4,
        "the shared layer is converted once"
    );
    assert_eq!(report["manifests"][1]["platform"], "linux/arm64");

    // The result does not depend on threads, and nothing is left behind.
    let other = temp.path().join("other");
    assert_eq!(
        good(&["convert", &src, &name(&other, ":out"), "--threads", "1", "-q"]),
        digest
    );
    let mut left: Vec<_> = fs::read_dir(temp.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["digest", "from", "other", "report.json", "to"]);
    assert!(good(&["verify", &dst]).starts_with("good: 2 manifests, 4 layers"));
    let view: Value = serde_json::from_str(&good(&["inspect", "--json", &dst])).unwrap();
    assert_eq!(view["manifests"][0]["layers"][0]["estargz"], true);
    assert_eq!(view["manifests"][0]["layers"][0]["files"], 2);
    let table = good(&["inspect", &src]);
    assert!(
        table.contains("linux/amd64") && table.contains("does not end in an eStargz footer"),
        "{table}"
    );
}

#[test]
fn all_transports_give_the_same_digest() {
    let temp = tempfile::tempdir().unwrap();
    let from = temp.path().join("from");
    multi_platform(&from, false);
    let registry = Registry::start(true);
    let auth = temp.path().join("auth.json");
    // base64("hull:pw")
    fs::write(
        &auth,
        format!(r#"{{"auths":{{"{}":{{"auth":"aHVsbDpwdw=="}}}}}}"#, registry.host),
    )
    .unwrap();
    let auth = auth.display().to_string();
    let authorised = ["--authfile", auth.as_str()];
    let convert = |src: &str, dst: &str| good(&[&["convert", "-q", src, dst][..], &authorised[..]].concat());

    let src = name(&from, ":multi");
    let digest = convert(&src, &name(&temp.path().join("layout"), ":x"));
    let archive = format!("oci-archive:{}:x", temp.path().join("a.tar").display());
    assert_eq!(convert(&src, &archive), digest);
    let first = fs::read(temp.path().join("a.tar")).unwrap();
    assert_eq!(convert(&src, &archive), digest);
    assert_eq!(
        fs::read(temp.path().join("a.tar")).unwrap(),
        first,
        "archives are deterministic"
    );
    let raw = tool("skopeo", &["inspect", "--raw", &archive]);
    assert_eq!(Digest::of(raw).to_string(), digest);

    let remote = format!("docker://{}/team/app:x", registry.host);
    assert_eq!(convert(&src, &remote), digest);
    let raw = tool(
        "skopeo",
        &["inspect", "--raw", "--tls-verify=false", "--creds", "hull:pw", &remote],
    );
    assert_eq!(Digest::of(raw).to_string(), digest);
    // Plain image into the registry by skopeo, then from registry to registry and from archive to layout.
    let plain = format!("docker://{}/plain:x", registry.host);
    tool(
        "skopeo",
        &[
            "copy",
            "-q",
            "--all",
            "--preserve-digests",
            "--dest-tls-verify=false",
            "--dest-creds",
            "hull:pw",
            &src,
            &plain,
        ],
    );
    let other = format!("docker://{}/other/app:y", registry.host);
    assert_eq!(convert(&plain, &other), digest);
    let plain_archive = format!("oci-archive:{}", temp.path().join("plain.tar").display());
    tool(
        "skopeo",
        &["copy", "-q", "--all", "--preserve-digests", &src, &plain_archive],
    );
    assert_eq!(convert(&plain_archive, &name(&temp.path().join("z"), "")), digest);

    for image in [&remote, &other, &archive, &name(&temp.path().join("z"), "")] {
        assert!(
            good(&["verify", "-q", image, "--authfile", &auth]).starts_with("good: 2 manifests"),
            "{image}"
        );
        let view: Value = serde_json::from_str(&good(&["inspect", "--json", image, "--authfile", &auth])).unwrap();
        assert_eq!(view["digest"], digest);
        assert_eq!(view["manifests"][1]["layers"][1]["estargz"], true);
    }
    bad(
        &["convert", &src, &remote],
        5,
        &["wants a login", &registry.host, "--authfile"],
    );
    bad(
        &["inspect", &remote],
        3,
        &["wants a login", &registry.host, "--authfile"],
    );
    bad(
        &["inspect", &format!("{remote}-absent"), "--authfile", &auth],
        3,
        &["not found", "x-absent"],
    );
}

#[test]
fn platforms_can_be_chosen() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    multi_platform(&from, true);
    let src = name(&from, "");
    let digest = good(&["convert", "-q", "--platform", "linux/amd64", &src, &name(&to, "")]);
    let index = read_json(&to, &digest);
    let platforms: Vec<_> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["platform"]["architecture"])
        .collect();
    // The attestation stands before its image here.
    assert_eq!(platforms, ["unknown", "amd64"]);
    good(&["convert", "-q", "--platform", "linux/arm64", &src, &name(&to, ":arm")]);
    bad(
        &["convert", "--platform", "linux/s390x", &src, &name(&to, ":z")],
        3,
        &["linux/s390x", "linux/amd64", "linux/arm64/v8"],
    );
    bad(
        &["convert", "--platform", "linux", &src, &name(&to, ":z")],
        2,
        &["os/arch"],
    );
}

#[test]
fn a_docker_manifest_becomes_an_oci_one_and_prioritized_files_come_first() {
    let temp = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(&temp.path().join("from"));
    let files: Vec<_> = (0..20).map(|n| (format!("d/f{n}"), noise(5_000, n))).collect();
    let files: Vec<_> = files
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    let layer = layout.layer(fixture::DOCKER_LAYER, &tar(&files));
    let image = layout.image(true, "amd64", &[layer]);
    assert_eq!(image["mediaType"], DOCKER_MANIFEST);
    layout.tag("t", image);
    let list = temp.path().join("list");
    fs::write(&list, "/d/f19\n\nd/f3\nd/absent\n").unwrap();
    let (src, to) = (name(&layout.dir, ""), temp.path().join("to"));
    let output = run(&[
        "convert",
        &src,
        &name(&to, ""),
        "--prioritize",
        list.to_str().unwrap(),
        "--progress",
        "plain",
    ]);
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && notes.contains("in no layer: d/absent") && !notes.contains("f19"),
        "{notes}"
    );
    let digest = String::from_utf8(output.stdout).unwrap();
    let manifest = read_json(&to, digest.trim());
    assert_eq!(manifest["mediaType"], MANIFEST);
    let view: Value = serde_json::from_str(&good(&["inspect", "--json", &name(&to, "")])).unwrap();
    let layer = &view["manifests"][0]["layers"][0];
    let prioritized = layer["prioritizedBytes"].as_u64().unwrap();
    assert!(prioritized > 10_000 && prioritized < 20_000, "{layer}");
    let blob = temp.path().join("blob.tgz");
    fs::write(&blob, read_blob(&to, text(&layer["digest"]))).unwrap();
    let names = String::from_utf8(tool("tar", &["tzf", blob.to_str().unwrap()])).unwrap();
    let names: Vec<_> = names.lines().map(|line| line.trim_end_matches('/')).collect();
    assert_eq!(names[..4], ["d/f19", "d/f3", ".prefetch.landmark", "d/f0"]);
}

#[test]
fn other_tags_stay_and_failures_change_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    multi_platform(&from, true);
    let src = name(&from, "");
    let first = good(&["convert", "-q", &src, &name(&to, ":one")]);
    good(&["convert", "-q", "--level", "1", &src, &name(&to, ":two")]);
    assert_eq!(good(&["convert", "-q", &src, &name(&to, ":three")]), first);
    let tagged = |tag: &str| Digest::of(tool("skopeo", &["inspect", "--raw", &name(&to, tag)])).to_string();
    assert_eq!((tagged(":one"), tagged(":three")), (first.clone(), first.clone()));
    assert_ne!(tagged(":two"), first);
    bad(&["inspect", &name(&to, "")], 3, &["3 images", "one, two, three"]);
    bad(
        &["inspect", &name(&to, ":four")],
        3,
        &["no tag four", "one, two, three"],
    );

    // A damaged layer: right size, one bit off.
    let before = tree(temp.path());
    let victim = before
        .iter()
        .filter(|(path, _)| path.starts_with(from.join("blobs")))
        .max_by_key(|(_, b)| b.len())
        .unwrap();
    let mut damaged = victim.1.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(victim.0, &damaged).unwrap();
    let hex = victim.0.file_name().unwrap().to_str().unwrap();
    for dst in [name(&to, ":bad"), name(&temp.path().join("new"), "")] {
        bad(&["convert", "-q", &src, &dst], 4, &[hex, "has digest"]);
    }
    let archive = format!("oci-archive:{}", temp.path().join("new.tar").display());
    bad(&["convert", "-q", &src, &archive], 4, &[hex, "has digest"]);
    fs::write(victim.0, victim.1).unwrap();
    assert!(tree(temp.path()) == before, "a failed conversion left something behind");
    fs::remove_file(victim.0).unwrap();
    bad(
        &["convert", "-q", &src, &name(&to, ":bad")],
        3,
        &["is missing", hex, "from"],
    );
    fs::write(victim.0, victim.1).unwrap();
    assert!(tree(temp.path()) == before);
}

#[test]
fn verify_names_what_is_wrong_and_where() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    let mut layout = Layout::new(&from);
    let layer = layout.layer(GZIP, &tar(&[("a", &noise(100_000, 9))]));
    let image = layout.image(false, "amd64", &[layer]);
    layout.tag("t", image);
    let digest = good(&["convert", "-q", &name(&from, ""), &name(&to, ":t")]);
    let manifest = read_json(&to, &digest);
    let layer = text(&manifest["layers"][0]["digest"]).to_owned();

    // Another diffID in the configuration, another TOC in the annotation: documents that are right in themselves.
    let mut wrong = Layout::new(&temp.path().join("wrong"));
    let blob = wrong.blob(GZIP, &read_blob(&to, &layer));
    let config = String::from_utf8(read_blob(&to, text(&manifest["config"]["digest"]))).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    let mut put = |tag: &str, config: &Value, toc: &Value| {
        let mut blob = blob.clone();
        blob["annotations"] = json!({TOC: toc});
        let config = wrong.blob(CONFIG, config.to_string().as_bytes());
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [blob]});
        let manifest = wrong.blob(MANIFEST, manifest.to_string().as_bytes());
        wrong.tag(tag, manifest);
    };
    let toc = &manifest["layers"][0]["annotations"][TOC];
    put("good", &config, toc);
    put("toc", &config, &json!(Digest::of("x").to_string()));
    config["rootfs"]["diff_ids"][0] = json!(Digest::of("y").to_string());
    put("diff", &config, toc);
    let image = |tag: &str| name(&temp.path().join("wrong"), tag);
    good(&["verify", "-q", &image(":good")]);
    for (tag, wanted) in [(":toc", "TOC's digest is"), (":diff", "diffID is")] {
        let output = run(&["verify", "-q", &image(tag)]);
        let faults = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(4));
        assert!(
            faults.contains(wanted) && faults.contains(&layer) && faults.contains("linux/amd64"),
            "{faults}"
        );
    }
    let plain = run(&["verify", "-q", &name(&from, "")]);
    assert_eq!(
        plain.status.code(),
        Some(4),
        "an ordinary image is no verified eStargz image"
    );
    bad(
        &["convert", "-q", &image(":diff"), &name(&temp.path().join("n"), "")],
        4,
        &["configuration says", &layer],
    );
}

#[test]
fn what_is_no_image_is_copied_as_it_is() {
    let temp = tempfile::tempdir().unwrap();
    let (from, to) = (temp.path().join("from"), temp.path().join("to"));
    let mut layout = Layout::new(&from);
    let chart = layout.blob("application/vnd.cncf.helm.chart.content.v1.tar+gzip", b"chart");
    let config = layout.blob("application/vnd.cncf.helm.config.v1+json", b"{}");
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [chart.clone()]});
    let manifest = layout.blob(MANIFEST, manifest.to_string().as_bytes());
    let digest = manifest["digest"].clone();
    layout.tag("chart", manifest);
    assert_eq!(
        good(&["convert", "-q", &name(&from, ""), &name(&to, "")]),
        text(&digest)
    );
    assert_eq!(read_blob(&to, text(&chart["digest"])), b"chart");

    // A layer that may not be distributed and is not here keeps its descriptor, address and diffID.
    let here = layout.layer(GZIP, &tar(&[("a", b"a")]));
    let mut foreign = here.clone();
    foreign.descriptor = json!({
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "size": 5,
        "digest": Digest::of("elsewhere").to_string(), "urls": ["https://example.com/base"],
    });
    foreign.diff_id = Digest::of("windows").to_string();
    let image = layout.image(true, "amd64", &[foreign, here]);
    layout.tag("foreign", image);
    let digest = good(&["convert", "-q", &name(&from, ":foreign"), &name(&to, ":foreign")]);
    let manifest = read_json(&to, &digest);
    assert_eq!(manifest["layers"][0]["urls"], json!(["https://example.com/base"]));
    assert_eq!(
        manifest["layers"][0]["mediaType"],
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
    );
    assert!(manifest["layers"][1]["annotations"][TOC].is_string());
    assert!(good(&["verify", "-q", &name(&to, ":foreign")]).contains("1 not distributable"));
}

#[test]
fn mistakes_get_one_line_and_their_exit_code() {
    let temp = tempfile::tempdir().unwrap();
    let from = temp.path().join("from");
    multi_platform(&from, true);
    let src = name(&from, "");
    let file = temp.path().join("file");
    fs::write(&file, "x").unwrap();
    let file = file.display().to_string();
    let out = name(&temp.path().join("out"), "");
    bad(&["convert", "--shiny", &src, &out], 2, &["--shiny", "--help"]);
    bad(&["polish"], 2, &["polish"]);
    bad(&["convert", &src], 2, &["DST"]);
    bad(&["convert", "dir:/x", &out], 2, &["unknown transport", "oci-archive:"]);
    bad(&["convert", "ubuntu", &out], 2, &["docker://"]);
    bad(&["convert", &src, &out, "--level", "99"], 2, &["level", "99"]);
    bad(&["convert", &src, &out, "--chunk-size", "0"], 2, &["chunk size"]);
    bad(
        &[
            "convert",
            &src,
            "docker://localhost/x@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ],
        2,
        &["tag"],
    );
    bad(
        &["convert", "oci:/nonexistent/x", &out],
        3,
        &["/nonexistent/x", "No such file"],
    );
    bad(
        &["convert", "oci-archive:/nonexistent.tar", &out],
        3,
        &["/nonexistent.tar"],
    );
    bad(
        &["convert", &src, &out, "--prioritize", "/nonexistent.list"],
        3,
        &["--prioritize", "/nonexistent.list"],
    );
    bad(
        &["convert", &format!("oci-archive:{file}"), &out],
        1,
        &["not a plain tar file", &file],
    );
    bad(&["convert", &src, &format!("oci:{file}")], 5, &[&file]);
    bad(&["convert", &src, "oci:/proc/nope/x"], 5, &["/proc/nope/x"]);
    bad(
        &["convert", &src, &format!("oci-archive:{}", from.display())],
        5,
        &["is a directory"],
    );
    bad(
        &["convert", &src, &name(temp.path(), "")],
        5,
        &["neither empty nor an OCI layout"],
    );
    bad(
        &["convert", "docker://127.0.0.1:1/x", &out],
        1,
        &["127.0.0.1:1", "no connection"],
    );
    bad(
        &["inspect", &src, "--authfile", "/nonexistent/auth", "--ca-file", &file],
        2,
        &[&file],
    );
    assert!(!temp.path().join("out").exists());
    // Help and version are results, not mistakes.
    assert!(good(&["--version"]).starts_with("estargz "));
    assert!(good(&["convert", "--help"]).contains("Exit codes: 0 done"));
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let from = temp.path().join("from");
    let mut layout = Layout::new(&from);
    let layers: Vec<_> = (0..3)
        .map(|n| layout.layer(GZIP, &tar(&[("big", &noise(24 << 20, n))])))
        .collect();
    let image = layout.image(false, "amd64", &layers);
    layout.tag("t", image);
    let registry = Registry::start(false);
    let scratch = temp.path().join("tmp");
    fs::create_dir(&scratch).unwrap();
    let before = tree(temp.path());
    let archive = format!("oci-archive:{}", temp.path().join("to.tar").display());
    for (dst, stage, signal, code) in [
        (name(&temp.path().join("to"), ""), temp.path(), Signal::INT, 130),
        (archive, temp.path(), Signal::TERM, 143),
        (format!("docker://{}/app:x", registry.host), &scratch, Signal::INT, 130),
    ] {
        let entries = fs::read_dir(stage).unwrap().count();
        let mut command = estargz(&["convert", "-q", &name(&from, ""), &dst]);
        let quiet = command.env("TMPDIR", &scratch).stderr(std::process::Stdio::null());
        let mut child = quiet.spawn().unwrap();
        // As soon as it has something to leave behind.
        let deadline = Instant::now() + Duration::from_secs(30);
        while fs::read_dir(stage).unwrap().count() == entries {
            let running = child.try_wait().unwrap().is_none();
            assert!(Instant::now() < deadline && running, "no work was seen");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(150));
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{dst}");
        let after = tree(temp.path());
        assert!(after == before, "{dst} left {:?}", after.keys().collect::<Vec<_>>());
    }
    bad(
        &["inspect", &format!("docker://{}/app:x", registry.host)],
        3,
        &["not found"],
    );
}
