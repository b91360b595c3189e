//! How tables look.

use super::*;

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
}

fn failure() -> api::Failure {
    api::Failure {
        at_unix_ms: now_ms() - 61_500,
        reason: "transient".to_owned(),
        what: "503 from the mirror".to_owned(),
        host: "mirror.example".to_owned(),
        image: "registry.example/app:1".to_owned(),
        layer: format!("sha256:{}", "ab".repeat(32)),
    }
}

fn backing_off() -> api::HostHealth {
    api::HostHealth {
        host: "mirror.example".to_owned(),
        state: "backing off".to_owned(),
        failures_in_a_row: 3,
        retry_in_ms: 400,
    }
}

#[test]
fn a_status_shows_what_matters() {
    let text = status(&api::StatusResponse {
        version: "1".to_owned(),
        lazy: true,
        root: "/var/lib/hullspeed".to_owned(),
        layers_mounted: 7,
        layers_complete: 3,
        mount: "erofs".to_owned(),
        layers_erofs: 6,
        layers_kernel_alone: 2,
        uptime_seconds: 90_000,
        snapshots_lazy: 40,
        snapshots_overlay: vec![api::ReasonCount {
            reason: "no_toc_digest".to_owned(),
            count: 2,
        }],
        in_flight: vec![api::KindCount {
            kind: "demand".to_owned(),
            requests: 2,
            bytes: 0,
        }],
        hosts: vec![backing_off()],
        failures: vec![failure()],
        cache: Some(api::CacheUsageResponse {
            layers: 9,
            bytes: 3 << 30,
            filesystem: "ext4".to_owned(),
            no_room: "1 B are free".to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    });
    let parts = [
        "hullspeed-snapshotter 1, up 1d1h",
        "root              /var/lib/hullspeed",
        "cache             3.0 GiB in 9 layers, quota no limit",
        "filesystem        ext4",
        "no room to spare  1 B are free: what containers read is fetched, and nothing ahead of them",
        "layers            7 mounted, 3 of them complete",
        "mounted as        erofs; 6 mounted so, 2 of them served by the kernel alone",
        "since the start   40 lazy, 2 unpacked",
        "requests now      2 demand",
        "no_toc_digest",
        "backing off",
        "400ms",
        "1m1s ago",
        "abababababab",
        "503 from the mirror",
    ];
    has(&text, &parts);
    let text = status(&api::StatusResponse::default());
    has(&text, &["switched off", "requests now      none"]);
    assert!(
        !text.contains("no room") && !text.contains("HOST") && !text.contains("FAILED"),
        "{text}"
    );
}

#[test]
fn an_explanation_says_why_and_what_it_cost() {
    let lazy = api::LayerExplanation {
        digest: format!("sha256:{}", "cd".repeat(32)),
        state: "lazy".to_owned(),
        residence: Some(api::Residence {
            chunks: 10,
            chunks_resident: 9,
            bytes: 1000,
            bytes_resident: 999,
            bytes_saved: 2 << 20,
            ..Default::default()
        }),
        cost: Some(api::Cost {
            stalls: 5,
            longest_stall_ms: 33,
            fetched: vec![api::KindCount {
                kind: "demand".to_owned(),
                requests: 1,
                bytes: 4096,
            }],
            verify_failures: 1,
            last_failure: Some(failure()),
            background: "running".to_owned(),
            hosts: vec![backing_off()],
            ..Default::default()
        }),
        mounted: true,
        mount: "erofs".to_owned(),
        kernel_alone: true,
        former_mount: "fuse".to_owned(),
        readers: vec![
            api::Reader {
                pod: "0b5e6d4c-1111-2222-3333-444455556666".to_owned(),
                container: "34".repeat(32),
                command: "nginx".to_owned(),
                reads: 7,
                bytes: 3 << 20,
                waited_ms: 120,
                last_unix_ms: now_ms() - 3_100,
                ..Default::default()
            },
            api::Reader::default(),
        ],
        more_readers: 5,
        ..Default::default()
    };
    let overlay = api::LayerExplanation {
        digest: format!("sha256:{}", "ef".repeat(32)),
        state: "overlay".to_owned(),
        reason: "timeout".to_owned(),
        error: "not mounted within 30s".to_owned(),
        host: "mirror.example".to_owned(),
        decided_unix_ms: now_ms() - 5_100,
        ..Default::default()
    };
    let text = explain(&api::ExplainResponse {
        found: vec![api::Explanation {
            kind: "image".to_owned(),
            name: "registry.example/app:1".to_owned(),
            sums: Some(api::LayerSums {
                layers: 2,
                lazy: 1,
                bytes: 1000,
                bytes_resident: 999,
                ..Default::default()
            }),
            layers: vec![lazy, overlay],
            ..Default::default()
        }],
        more: 3,
    });
    let parts = [
        "image             registry.example/app:1",
        "layers            2, 1 of them lazy",
        "(99%)",
        "9/10",
        "2.0 MiB",
        "33ms",
        "running",
        "cdcdcdcdcdcd  fetched 4.0 KiB in 1 request for demand",
        "1 chunks came with wrong bytes",
        "(transient, mirror.example): 503 from the mirror",
        "hosts in order: mirror.example (backing off)",
        "efefefefefef  not lazy since 5s ago (mirror.example): not mounted within 30s",
        "3 more of that name",
        "erofs, kernel alone (fuse before)",
        "0b5e6d4c-1111-2222-3333-444455556666  343434343434  nginx",
        "120ms",
        "3.0 MiB  3s ago",
        "5 more who waited",
    ];
    has(&text, &parts);
}

#[test]
fn the_cache_is_listed_and_what_was_done_to_it_told() {
    let listed = list(&api::ListLayersResponse {
        layers: vec![api::CachedLayer {
            toc_digest: format!("sha256:{}", "12".repeat(32)),
            image: "registry.example/app:1".to_owned(),
            residence: Some(api::Residence {
                chunks: 4,
                chunks_resident: 4,
                disk_bytes: 1536,
                ..Default::default()
            }),
            mounted: true,
            mount: "fuse".to_owned(),
            references: 2,
            ..Default::default()
        }],
        more: 1,
    });
    has(
        &listed,
        &["121212121212", "1.5 KiB", "100%", "fuse", "1 more are left out"],
    );
    let failed = pruned(&api::PruneCacheResponse {
        layers: 2,
        bytes: 1 << 20,
        failed: 1,
    });
    has(&failed, &["removed 2 layers, 1.0 MiB", "1 could not be removed"]);
    let text = verified(&api::VerifyCacheProgress {
        chunks: 5,
        wrong_chunks: 2,
        wrong: vec![api::WrongChunk {
            toc_digest: "sha256:1234".to_owned(),
            chunk: 3,
            file: "/usr/bin/x".to_owned(),
            offset: 4096,
        }],
        layers_failed: 1,
        error: "no such file".to_owned(),
        ..Default::default()
    });
    has(
        &text,
        &[
            "2 wrong",
            "WRONG 1234 chunk 3: /usr/bin/x at 4096",
            "more are in",
            "no such file",
        ],
    );
}
