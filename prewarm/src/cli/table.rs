//! Answers of the daemon, for people.

use std::fmt::Write as _;
use std::time::Duration;

use hullspeed_daemon::answer::{age, aligned, empty};
use hullspeed_daemon::units::display_duration;
use hullspeed_proto::hullspeed::prewarm::v1 as api;

pub(super) fn status(status: &api::StatusResponse) -> String {
    let api::StatusResponse {
        version,
        containerd_version,
        socket,
        containerd_socket,
        pool,
        adopted,
        requests,
        warm,
        unbranded,
    } = status;
    let containerd_version = if containerd_version.is_empty() {
        "has not answered yet"
    } else {
        containerd_version
    };
    let mut text = String::new();
    let hits: u64 = requests
        .iter()
        .filter(|request| request.result == "hit")
        .map(|request| request.count)
        .sum();
    let calls: u64 = requests.iter().map(|request| request.count).sum();
    // Writing to a string never fails.
    let _ = writeln!(text, "hullspeed-prewarm {version} serves {socket}");
    let _ = writeln!(text, "containerd        {containerd_version} at {containerd_socket}");
    let _ = writeln!(text, "pods in hulls     {adopted}");
    if let Some(unbranded) = unbranded {
        text.push_str(&self::unbranded(unbranded));
    }
    let _ = writeln!(text, "pod starts        {calls}, of them {hits} with a hull");
    if calls > 0 {
        let mut table = empty(&["RESULT", "REASON", "CALLS"]);
        for api::RequestCount { result, reason, count } in requests {
            table.add_row([result.clone(), reason.clone(), count.to_string()]);
        }
        let _ = writeln!(text, "\n{}", aligned(table, 2..3));
    }
    if let Some(pool) = pool {
        text.push('\n');
        text.push_str(&self::pool(pool));
    }
    if let Some(warm) = warm {
        text.push_str(&self::warm(warm));
    }
    text
}

/// Nothing where all records are rewritten.
fn unbranded(unbranded: &api::UnbrandedPods) -> String {
    let api::UnbrandedPods { pending, refused } = unbranded;
    let mut text = String::new();
    if *pending > 0 {
        let _ = writeln!(
            text,
            "records pending   {pending}: containerd does not know these pods yet"
        );
    }
    if !refused.is_empty() {
        let _ = writeln!(text, "records refused   {}: {}", refused.len(), names(refused));
    }
    text
}

/// As people name them, with what containerd calls their sandboxes.
pub(crate) fn names(pods: &[api::UnbrandedPod]) -> String {
    let name = |pod: &api::UnbrandedPod| format!("{}/{} ({})", pod.pod_namespace, pod.pod_name, pod.sandbox_id);
    pods.iter().map(name).collect::<Vec<_>>().join(", ")
}

fn warm(warm: &api::WarmStatus) -> String {
    let api::WarmStatus { policy_problem, images } = warm;
    let mut text = String::new();
    if !policy_problem.is_empty() {
        let _ = writeln!(text, "warming           the policy is not used: {policy_problem}");
    }
    if images.is_empty() {
        return text;
    }
    let mut table = empty(&["IMAGE", "SHARE", "STATE", "LAYERS", "MIB", "PROBLEM"]);
    for image in images {
        table.add_row([
            image.image.clone(),
            image.share.clone(),
            image.state.clone(),
            format!("{}/{}", image.layers_resident, image.layers),
            format!("{}/{}", image.bytes_resident >> 20, image.bytes_wanted >> 20),
            image.problem.clone(),
        ]);
    }
    let _ = writeln!(text, "\n{}", aligned(table, 3..5));
    text
}

pub(super) fn pool(pool: &api::PoolStatus) -> String {
    let api::PoolStatus {
        state,
        reason,
        detail,
        handlers,
        removing,
        networks,
        free_addresses,
        bytes_per_hull,
        failure,
        audit,
    } = pool;
    let mut text = format!("pool              {state}");
    if !reason.is_empty() && reason != state {
        let _ = write!(text, " ({reason}: {detail})");
    }
    text.push('\n');
    if *removing > 0 {
        let _ = writeln!(text, "being removed     {removing}");
    }
    if !networks.is_empty() {
        let _ = writeln!(text, "networks          {}", networks.join(", "));
    }
    if let Some(free) = free_addresses {
        let _ = writeln!(text, "free addresses    {free}");
    }
    if let Some(bytes) = bytes_per_hull {
        let _ = writeln!(text, "memory per hull   {} KiB", bytes / 1024);
    }
    if let Some(failure) = failure {
        let api::CreationFailure {
            reason,
            in_a_row,
            retry_in_ms,
        } = failure;
        let retry = display_duration(Duration::from_millis(*retry_in_ms));
        let _ = writeln!(
            text,
            "last creation     failed ({in_a_row} in a row, next in {retry}): {reason}"
        );
    }
    if let Some(api::Audit { lost, spared, .. }) = audit.filter(|audit| audit.lost + audit.spared > 0) {
        let _ = writeln!(text, "unknown hulls     {lost} removed, {spared} left alone");
    }
    let mut table = empty(&["HANDLER", "READY", "CREATING", "TARGET", "MIN", "MAX", "OLDEST", "OFF"]);
    for handler in handlers {
        table.add_row(handler_row(handler));
    }
    let _ = writeln!(text, "\n{}", aligned(table, 1..7));
    text
}

fn handler_row(handler: &api::HandlerPool) -> [String; 8] {
    let api::HandlerPool {
        handler,
        min,
        max,
        target,
        ready,
        creating,
        oldest_ms,
        off_reason,
        off_detail,
    } = handler;
    let name = if handler.is_empty() { "(default)" } else { handler };
    let off = if off_reason.is_empty() {
        String::new()
    } else {
        format!("{off_reason}: {off_detail}")
    };
    [
        name.to_owned(),
        ready.to_string(),
        creating.to_string(),
        target.to_string(),
        min.to_string(),
        max.to_string(),
        oldest_ms.map(|ms| age(ms / 1000)).unwrap_or_default(),
        off,
    ]
}

pub(super) fn drain(progress: &api::DrainProgress) -> String {
    let api::DrainProgress {
        left,
        done,
        unbranded,
        waiting,
    } = progress;
    let mut text = match (done, waiting.as_str()) {
        (true, _) => "drained: no hull is left\n".to_owned(),
        (false, "") => format!("draining: {left} left\n"),
        (false, waiting) => format!("draining: {left} left; {waiting}\n"),
    };
    text.extend(unbranded.iter().map(self::unbranded));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> api::StatusResponse {
        let handler = api::HandlerPool {
            min: 2,
            max: 10,
            target: 4,
            ready: 3,
            creating: 1,
            oldest_ms: Some(61_500),
            ..api::HandlerPool::default()
        };
        let off = api::HandlerPool {
            handler: "kata".to_owned(),
            off_reason: "handler".to_owned(),
            off_detail: "not runc".to_owned(),
            ..api::HandlerPool::default()
        };
        let count = |result: &str, reason: &str, count| api::RequestCount {
            result: result.to_owned(),
            reason: reason.to_owned(),
            count,
        };
        api::StatusResponse {
            warm: Some(api::WarmStatus {
                policy_problem: String::new(),
                images: vec![api::WarmedImage {
                    image: "registry.example/app:1".into(),
                    share: "hot".into(),
                    state: "warming".into(),
                    layers: 5,
                    layers_resident: 2,
                    bytes_wanted: 64 << 20,
                    bytes_resident: 16 << 20,
                    ..Default::default()
                }],
            }),
            version: "1".to_owned(),
            containerd_version: "2.1.9".to_owned(),
            adopted: 7,
            requests: vec![count("hit", "", 40), count("miss", "empty", 2)],
            pool: Some(api::PoolStatus {
                state: "on".to_owned(),
                handlers: vec![handler, off],
                free_addresses: Some(99),
                failure: Some(api::CreationFailure {
                    reason: "no address".to_owned(),
                    in_a_row: 3,
                    retry_in_ms: 1500,
                }),
                audit: Some(api::Audit {
                    lost: 1,
                    ..api::Audit::default()
                }),
                ..api::PoolStatus::default()
            }),
            unbranded: Some(stranded()),
            ..api::StatusResponse::default()
        }
    }

    fn stranded() -> api::UnbrandedPods {
        let refused = vec![api::UnbrandedPod {
            sandbox_id: "0a1b".into(),
            pod_namespace: "shop".into(),
            pod_name: "web".into(),
        }];
        api::UnbrandedPods { pending: 3, refused }
    }

    #[test]
    fn a_status_shows_what_matters() {
        let text = status(&sample());
        for part in [
            "containerd        2.1.9",
            "pods in hulls     7",
            "records pending   3",
            "records refused   1: shop/web (0a1b)",
            "42, of them 40 with a hull",
            "empty",
            "pool              on\n",
            "(default)",
            "1m1s",
            "handler: not runc",
            "free addresses    99",
            "3 in a row, next in 1500ms): no address",
            "1 removed, 0 left alone",
        ] {
            assert!(text.contains(part), "{part} is missing:\n{text}");
        }
        let text = status(&api::StatusResponse::default());
        assert!(
            text.contains("has not answered yet") && !text.contains("RESULT"),
            "{text}"
        );
    }

    #[test]
    fn a_drain_names_what_is_left() {
        let mut progress = api::DrainProgress {
            left: 2,
            done: false,
            unbranded: Some(api::UnbrandedPods::default()),
            waiting: String::new(),
        };
        assert_eq!(drain(&progress), "draining: 2 left\n");
        progress.waiting = "containerd does not answer".to_owned();
        assert!(drain(&progress).ends_with("; containerd does not answer\n"));
        progress.done = true;
        assert_eq!(drain(&progress), "drained: no hull is left\n");
        progress.unbranded = Some(stranded());
        let text = drain(&progress);
        assert!(
            text.contains("records pending   3") && text.contains("shop/web (0a1b)"),
            "{text}"
        );
    }

    #[test]
    fn a_pool_that_is_off_says_why() {
        let pool = api::PoolStatus {
            state: "off".to_owned(),
            reason: "cni".to_owned(),
            detail: "calico".to_owned(),
            ..api::PoolStatus::default()
        };
        assert!(self::pool(&pool).contains("pool              off (cni: calico)\n"));
    }
}
