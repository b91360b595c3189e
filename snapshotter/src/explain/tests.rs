//! What is found by which name, and what is said of it.

use super::*;
use crate::layer::report::{Content, Cost, Fetched, Residence};

const IMAGE: &str = "registry.example/app:1";

fn digest(name: &str) -> Digest {
    Digest::of(name)
}

/// A committed snapshot of `image`'s layer `layer`, lazy or with a reason not to be.
fn layer(name: &str, parent: Option<&str>, image: &str, layer: &str, reason: Option<&str>) -> Outline {
    Outline {
        name: format!("k8s.io/1/{name}"),
        parent: parent.map(|parent| format!("k8s.io/1/{parent}")),
        kind: Kind::Committed,
        image: Some(image.to_owned()),
        manifest: Some(digest(image)),
        layer: Some(digest(layer)),
        lazy: reason.is_none().then(|| digest(&format!("toc of {layer}"))),
        fallback: reason.map(|reason| Fallback::now(reason, format!("{layer} is {reason}"))),
    }
}

fn container(name: &str, parent: &str) -> Outline {
    Outline {
        kind: Kind::Active,
        image: None,
        manifest: None,
        layer: None,
        lazy: None,
        fallback: None,
        ..layer(name, Some(parent), "", "", None)
    }
}

fn refused(image: &str, layer: &str) -> Refused {
    Refused {
        snapshot: format!("k8s.io/1/{layer}"),
        image: image.to_owned(),
        manifest: Some(digest(image)),
        layer: Some(digest(layer)),
        fallback: Fallback::now("registry", "503".to_owned()),
    }
}

fn facts() -> Facts {
    Facts {
        outlines: vec![
            layer("a", None, IMAGE, "A", None),
            layer("ab", Some("a"), IMAGE, "B", Some("not_estargz")),
            layer("abc", Some("ab"), IMAGE, "C", None),
            // Another image on the same base, which containerd did not offer again.
            layer("ax", Some("a"), "other.example/x:1", "X", None),
            container("running", "abc"),
        ],
        refused: vec![refused("broken.example/y:1", "Y")],
        cached: vec![
            Cached {
                toc: digest("toc of A"),
                layer: digest("A"),
                image: IMAGE.to_owned(),
            },
            Cached {
                toc: digest("toc of W"),
                layer: digest("W"),
                image: "docker.io/library/warm:latest".to_owned(),
            },
        ],
    }
}

fn one(subject: &str) -> Explanation {
    let (mut found, more) = find(subject, &facts());
    assert_eq!((found.len(), more), (1, 0), "{subject}: {found:#?}");
    found.remove(0)
}

/// Layers as "state of blob".
fn layers(explanation: &Explanation) -> Vec<(Serving, Option<Digest>)> {
    explanation
        .layers
        .iter()
        .map(|layer| (layer.serving, layer.digest))
        .collect()
}

#[test]
fn an_image_is_found_by_its_name_and_its_manifest_with_all_layers_lowest_first() {
    for subject in [IMAGE.to_owned(), digest(IMAGE).to_string()] {
        let found = one(&subject);
        assert_eq!((found.kind, found.name.as_str()), (SubjectKind::Image, IMAGE));
        assert_eq!(found.manifest, Some(digest(IMAGE)));
        let expected = [
            (Serving::Lazy, Some(digest("A"))),
            (Serving::Overlay, Some(digest("B"))),
            (Serving::Lazy, Some(digest("C"))),
        ];
        assert_eq!(layers(&found), expected);
        let fallback = found.layers[1].fallback.as_ref().unwrap();
        assert_eq!(
            (fallback.reason.as_str(), fallback.error.as_str()),
            ("not_estargz", "B is not_estargz")
        );
        assert!(found.layers[0].fallback.is_none());
    }
}

#[test]
fn an_image_on_layers_of_another_one_has_them_too() {
    let found = one("other.example/x:1");
    let expected = [(Serving::Lazy, Some(digest("A"))), (Serving::Lazy, Some(digest("X")))];
    assert_eq!(layers(&found), expected);
    assert_eq!(found.layers[0].images, [IMAGE]);
}

#[test]
fn names_may_leave_out_what_is_the_default() {
    let mut facts = facts();
    facts.outlines = vec![layer("n", None, "docker.io/library/nginx:latest", "N", None)];
    for subject in [
        "nginx",
        "nginx:latest",
        "docker.io/library/nginx",
        "docker.io/library/nginx:latest",
    ] {
        assert_eq!(find(subject, &facts).0.len(), 1, "{subject}");
    }
    for subject in ["nginx:1", "registry.example/nginx", "ngin"] {
        assert!(find(subject, &facts).0.is_empty(), "{subject}");
    }
}

#[test]
fn a_tag_that_moved_has_both_its_images() {
    let mut facts = facts();
    facts.outlines.push(Outline {
        manifest: Some(digest("newer")),
        ..layer("new", None, IMAGE, "N", None)
    });
    let (found, _) = find(IMAGE, &facts);
    let manifests: Vec<_> = found.iter().map(|found| found.manifest).collect();
    assert_eq!(manifests, [Some(digest(IMAGE)), Some(digest("newer"))]);
    assert_eq!(find(&digest("newer").to_string(), &facts).0.len(), 1);
}

#[test]
fn a_container_is_a_snapshot_and_no_layer() {
    for subject in ["running", "k8s.io/1/running", "1/running"] {
        let found = one(subject);
        assert_eq!(
            (found.kind, found.layers.len()),
            (SubjectKind::Snapshot, 3),
            "{subject}"
        );
    }
    // A part of a name is none.
    assert!(find("unning", &facts()).0.is_empty());
}

#[test]
fn a_layer_is_found_by_both_its_digests() {
    for subject in [digest("A"), digest("toc of A")] {
        let found = one(&subject.to_string());
        assert_eq!(found.kind, SubjectKind::Layer);
        assert_eq!(layers(&found), [(Serving::Lazy, Some(digest("A")))]);
    }
    let found = one(&digest("W").to_string());
    assert_eq!(layers(&found), [(Serving::Cached, Some(digest("W")))]);
    let found = one(&digest("Y").to_string());
    assert_eq!(layers(&found), [(Serving::Refused, Some(digest("Y")))]);
}

#[test]
fn what_was_refused_or_only_warmed_is_known() {
    let found = one("broken.example/y:1");
    assert_eq!(found.layers[0].fallback.as_ref().unwrap().reason, "registry");
    assert_eq!(layers(&one("warm")), [(Serving::Cached, Some(digest("W")))]);
    // Once its snapshot is there the refusal is told with it, and once.
    let mut facts = facts();
    facts
        .outlines
        .push(layer("y", None, "broken.example/y:1", "Y", Some("registry")));
    let (found, _) = find("broken.example/y:1", &facts);
    assert_eq!(layers(&found[0]), [(Serving::Overlay, Some(digest("Y")))]);
}

#[test]
fn what_is_unknown_is_not_found_and_what_is_plenty_is_bounded() {
    for subject in ["", "nonesuch", "nonesuch.example/a:1", &digest("nothing").to_string()] {
        assert!(find(subject, &facts()).0.is_empty(), "{subject}");
    }
    let mut facts = facts();
    facts.outlines = (0..40)
        .map(|number| layer(&format!("l{number}"), None, IMAGE, &format!("L{number}"), None))
        .collect();
    let (found, more) = find(IMAGE, &facts);
    assert_eq!((found.len(), more), (MAX_FOUND, 40 - MAX_FOUND));
    // A chain that ends in itself is a defect, and no endless loop.
    facts.outlines = vec![
        layer("a", Some("b"), IMAGE, "A", None),
        layer("b", Some("a"), IMAGE, "B", None),
    ];
    assert!(find(&digest("A").to_string(), &facts).0[0].layers.len() == 1);
    assert_eq!(find("k8s.io/1/a", &facts).0[0].layers.len(), 2);
}

#[test]
fn sums_are_of_all_layers() {
    let mut found = one(IMAGE);
    let report = |bytes: u64| LayerReport {
        toc_digest: digest("toc"),
        mounted: true,
        mount: Some("fuse"),
        former_mount: None,
        kernel_alone: false,
        readers: Vec::new(),
        residence: Residence {
            content: Some(Content {
                bytes,
                resident: bytes / 2,
                saved: 7,
            }),
            ..Residence::default()
        },
        cost: Some(Cost {
            stalls: 2,
            stall_time: std::time::Duration::from_millis(30),
            fetched: vec![
                Fetched {
                    kind: "toc",
                    requests: 1,
                    bytes: 5,
                },
                Fetched {
                    kind: "demand",
                    requests: 2,
                    bytes: 6,
                },
            ],
            reused: 1,
            ..Cost::default()
        }),
    };
    found.layers[0].report = Some(report(100));
    found.layers[2].report = Some(report(1000));
    let sums = Sums {
        layers: 3,
        lazy: 2,
        bytes: 1100,
        resident: 550,
        saved: 14,
        fetched: 22,
        reused: 2,
        stalls: 4,
        stall_time: std::time::Duration::from_millis(60),
    };
    assert_eq!(found.sums(), sums);
}
