//! Answers of the daemon, for people.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hullspeed_daemon::answer::{age, aligned, empty, size};
use hullspeed_proto::hullspeed::control::v1 as api;

/// Digits of a digest that tell layers apart for a reader.
const SHORT_DIGEST: usize = 12;
/// Readers shown of one layer.
const SHOWN_READERS: usize = 3;

/// A digest, shortened.
fn short(digest: &str) -> String {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.chars().take(SHORT_DIGEST).collect()
}

/// How long ago a moment was.
fn ago(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return String::new();
    }
    let at = UNIX_EPOCH + Duration::from_millis(unix_ms);
    let elapsed = SystemTime::now().duration_since(at).unwrap_or_default();
    format!("{} ago", age(elapsed.as_secs()))
}

/// A part in percent, rounded down: 100 means all.
fn percent(part: u64, whole: u64) -> String {
    match u128::from(part) * 100 / u128::from(whole.max(1)) {
        _ if whole == 0 => "-".to_owned(),
        percent => format!("{percent}%"),
    }
}

/// Lines of a name and a value, the names as wide as those of a status.
fn line(text: &mut String, name: &str, value: impl std::fmt::Display) {
    // Writing to a string never fails.
    let _ = writeln!(text, "{name:<18}{value}");
}

pub(super) fn status(status: &api::StatusResponse) -> String {
    let mut text = String::new();
    let version = &status.version;
    line(
        &mut text,
        "hullspeed-snapshotter",
        format!(" {version}, up {}", age(status.uptime_seconds)),
    );
    line(&mut text, "root", &status.root);
    if let Some(cache) = &status.cache {
        text.push_str(&usage(cache));
    }
    if !status.lazy {
        line(&mut text, "lazy layers", "switched off in the configuration");
    }
    let layers = format!(
        "{} mounted, {} of them complete; {} opening",
        status.layers_mounted, status.layers_complete, status.layers_opening
    );
    line(&mut text, "layers", layers);
    if !status.mount.is_empty() {
        let native = format!(
            "{}; {} mounted so, {} of them served by the kernel alone",
            status.mount, status.layers_erofs, status.layers_kernel_alone
        );
        line(
            &mut text,
            "mounted as",
            if status.mount.starts_with("erofs") {
                &native
            } else {
                &status.mount
            },
        );
    }
    let refused: u64 = status.snapshots_overlay.iter().map(|reason| reason.count).sum();
    let offered = format!("{} lazy, {refused} unpacked", status.snapshots_lazy);
    line(&mut text, "since the start", offered);
    line(&mut text, "warms under way", status.warms);
    line(&mut text, "logins held", status.credentials);
    let in_flight: Vec<_> = status
        .in_flight
        .iter()
        .map(|kind| format!("{} {}", kind.requests, kind.kind))
        .collect();
    let in_flight = if in_flight.is_empty() {
        "none".to_owned()
    } else {
        in_flight.join(", ")
    };
    line(&mut text, "requests now", in_flight);
    if !status.snapshots_overlay.is_empty() {
        let mut table = empty(&["UNPACKED BECAUSE", "LAYERS"]);
        for api::ReasonCount { reason, count } in &status.snapshots_overlay {
            table.add_row([reason.clone(), count.to_string()]);
        }
        let _ = writeln!(text, "\n{}", aligned(table, 1..2));
    }
    if !status.hosts.is_empty() {
        let _ = writeln!(text, "\n{}", hosts(&status.hosts));
    }
    if !status.failures.is_empty() {
        let mut table = empty(&["FAILED", "REASON", "HOST", "IMAGE", "LAYER", "WHAT"]);
        for failure in &status.failures {
            table.add_row([
                ago(failure.at_unix_ms),
                failure.reason.clone(),
                failure.host.clone(),
                failure.image.clone(),
                short(&failure.layer),
                failure.what.clone(),
            ]);
        }
        let _ = writeln!(text, "\n{}", table.trim_fmt());
    }
    text
}

fn hosts(hosts: &[api::HostHealth]) -> String {
    let mut table = empty(&["HOST", "STATE", "FAILURES", "RETRY IN"]);
    for host in hosts {
        let retry = if host.retry_in_ms > 0 {
            format!("{}ms", host.retry_in_ms)
        } else {
            String::new()
        };
        table.add_row([
            host.host.clone(),
            host.state.clone(),
            host.failures_in_a_row.to_string(),
            retry,
        ]);
    }
    aligned(table, 2..4)
}

pub(super) fn usage(usage: &api::CacheUsageResponse) -> String {
    let limit = |bytes: u64| match bytes {
        0 => "no limit".to_owned(),
        bytes => size(bytes),
    };
    let mut text = String::new();
    let cached = format!(
        "{} in {} layers, quota {}",
        size(usage.bytes),
        usage.layers,
        limit(usage.quota_bytes)
    );
    line(&mut text, "cache", cached);
    let unused = format!(
        "{} in {} layers",
        size(usage.unreferenced_bytes),
        usage.unreferenced_layers
    );
    line(&mut text, "of that unused", unused);
    let disk = format!(
        "{}, {} of {} free, to stay free: {}",
        usage.filesystem,
        size(usage.filesystem_free_bytes),
        size(usage.filesystem_bytes),
        limit(usage.min_free_bytes)
    );
    line(&mut text, "filesystem", disk);
    if !usage.no_room.is_empty() {
        let consequence = "what containers read is fetched, and nothing ahead of them";
        line(
            &mut text,
            "no room to spare",
            format!("{}: {consequence}", usage.no_room),
        );
    }
    text
}

pub(super) fn explain(answer: &api::ExplainResponse) -> String {
    let mut text = answer.found.iter().map(explanation).collect::<Vec<_>>().join("\n");
    if answer.more > 0 {
        let _ = writeln!(text, "\n{} more of that name are left out", answer.more);
    }
    text
}

fn explanation(explanation: &api::Explanation) -> String {
    let sums = explanation.sums.unwrap_or_default();
    let mut text = String::new();
    line(&mut text, &explanation.kind, &explanation.name);
    if !explanation.manifest_digest.is_empty() {
        line(&mut text, "manifest", &explanation.manifest_digest);
    }
    line(
        &mut text,
        "layers",
        format!("{}, {} of them lazy", sums.layers, sums.lazy),
    );
    if sums.bytes > 0 {
        let (resident, bytes) = (sums.bytes_resident, sums.bytes);
        let resident = format!("{} of {} ({})", size(resident), size(bytes), percent(resident, bytes));
        line(&mut text, "resident", resident);
        line(&mut text, "fetched", size(sums.bytes_fetched));
        line(&mut text, "never fetched", size(sums.bytes_saved));
        line(&mut text, "reused", size(sums.bytes_reused));
        let stalls = format!("{}, {} ms in all", sums.stalls, sums.stall_ms);
        line(&mut text, "stalls", stalls);
    }
    let mut table = empty(&[
        "LAYER",
        "STATE",
        "MOUNT",
        "REASON",
        "RESIDENT",
        "CHUNKS",
        "FETCHED",
        "SAVED",
        "REUSED",
        "STALLS",
        "LONGEST",
        "BACKGROUND",
    ]);
    for layer in &explanation.layers {
        table.add_row(layer_row(layer));
    }
    let _ = writeln!(text, "\n{}", aligned(table, 4..11));
    for layer in &explanation.layers {
        text.push_str(&details(layer));
    }
    if let Some(table) = readers(&explanation.layers) {
        let _ = writeln!(text, "\n{table}");
    }
    if explanation.more > 0 {
        let _ = writeln!(text, "{} more layers are left out", explanation.more);
    }
    text
}

fn layer_row(layer: &api::LayerExplanation) -> [String; 12] {
    let residence = layer.residence.unwrap_or_default();
    let cost = layer.cost.clone().unwrap_or_default();
    let digest = if layer.digest.is_empty() {
        &layer.toc_digest
    } else {
        &layer.digest
    };
    let is_open = layer.cost.is_some();
    let if_open = |text: String| if is_open { text } else { "-".to_owned() };
    let fetched: u64 = cost.fetched.iter().map(|kind| kind.bytes).sum();
    let resident = percent(residence.chunks_resident.into(), residence.chunks.into());
    let resident = if residence.bytes > 0 {
        percent(residence.bytes_resident, residence.bytes)
    } else {
        resident
    };
    [
        short(digest),
        layer.state.clone(),
        mount_of(layer),
        layer.reason.clone(),
        resident,
        format!("{}/{}", residence.chunks_resident, residence.chunks),
        if_open(size(fetched)),
        if_open(size(residence.bytes_saved)),
        if_open(size(cost.bytes_reused)),
        if_open(cost.stalls.to_string()),
        if_open(format!("{}ms", cost.longest_stall_ms)),
        if_open(cost.background.clone()),
    ]
}

/// How a layer is mounted, for those who come now and for those who came before.
fn mount_of(layer: &api::LayerExplanation) -> String {
    let now = mount(&layer.mount, layer.mounted, layer.kernel_alone);
    match layer.former_mount.as_str() {
        "" => now,
        before => format!("{now} ({before} before)"),
    }
}

/// How a layer is mounted.
fn mount(kind: &str, mounted: bool, kernel_alone: bool) -> String {
    match (kind, mounted) {
        (_, false) => "-".to_owned(),
        // It is just being mounted or unmounted.
        ("", true) => "?".to_owned(),
        (kind, true) if kernel_alone => format!("{kind}, kernel alone"),
        (kind, true) => kind.to_owned(),
    }
}

/// Who waited most for each layer; nothing where nobody did.
fn readers(layers: &[api::LayerExplanation]) -> Option<String> {
    let mut table = empty(&[
        "LAYER",
        "POD",
        "CONTAINER",
        "COMMAND",
        "WAITED",
        "READS",
        "BYTES",
        "LAST",
    ]);
    let or_none = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let mut more = 0;
    for layer in layers {
        for reader in layer.readers.iter().take(SHOWN_READERS) {
            table.add_row([
                short(&layer.digest),
                or_none(reader.pod.clone()),
                or_none(short(&reader.container)),
                or_none(reader.command.clone()),
                format!("{}ms", reader.waited_ms),
                reader.reads.to_string(),
                size(reader.bytes),
                ago(reader.last_unix_ms),
            ]);
        }
        more += layer.readers.len().saturating_sub(SHOWN_READERS) + layer.more_readers as usize;
    }
    if table.is_empty() {
        return None;
    }
    let mut text = aligned(table, 4..7);
    if more > 0 {
        let _ = write!(text, "\n{more} more who waited are left out");
    }
    Some(text)
}

/// What does not fit into a row, for layers that need it.
fn details(layer: &api::LayerExplanation) -> String {
    let mut text = String::new();
    let digest = short(&layer.digest);
    if !layer.error.is_empty() {
        let at = match layer.host.as_str() {
            "" => String::new(),
            host => format!(" ({host})"),
        };
        let _ = writeln!(
            text,
            "{digest}  not lazy since {}{at}: {}",
            ago(layer.decided_unix_ms),
            layer.error
        );
    }
    let Some(cost) = &layer.cost else { return text };
    let fetched: Vec<_> = cost
        .fetched
        .iter()
        .map(|kind| format!("{} in {} for {}", size(kind.bytes), requests(kind.requests), kind.kind))
        .collect();
    if !fetched.is_empty() {
        let _ = writeln!(text, "{digest}  fetched {}", fetched.join(", "));
    }
    if cost.verify_failures > 0 {
        let _ = writeln!(text, "{digest}  {} chunks came with wrong bytes", cost.verify_failures);
    }
    if let Some(failure) = &cost.last_failure {
        let api::Failure {
            reason,
            what,
            host,
            at_unix_ms,
            ..
        } = failure;
        let _ = writeln!(
            text,
            "{digest}  last failure {} ({reason}, {host}): {what}",
            ago(*at_unix_ms)
        );
    }
    let hosts: Vec<_> = cost
        .hosts
        .iter()
        .map(|host| match host.state.as_str() {
            "ok" => host.host.clone(),
            state => format!("{} ({state})", host.host),
        })
        .collect();
    if hosts.len() > 1 || hosts.iter().any(|host| host.contains('(')) {
        let _ = writeln!(text, "{digest}  hosts in order: {}", hosts.join(", "));
    }
    text
}

fn requests(number: u64) -> String {
    match number {
        1 => "1 request".to_owned(),
        number => format!("{number} requests"),
    }
}

pub(super) fn list(answer: &api::ListLayersResponse) -> String {
    let mut table = empty(&[
        "TOC",
        "LAYER",
        "ON DISK",
        "RESIDENT",
        "CHUNKS",
        "MOUNTED",
        "SNAPSHOTS",
        "LAST USE",
        "IMAGE",
    ]);
    for layer in &answer.layers {
        let residence = layer.residence.unwrap_or_default();
        table.add_row([
            short(&layer.toc_digest),
            short(&layer.digest),
            size(residence.disk_bytes),
            percent(residence.chunks_resident.into(), residence.chunks.into()),
            format!("{}/{}", residence.chunks_resident, residence.chunks),
            mount(&layer.mount, layer.mounted, false),
            layer.references.to_string(),
            ago(layer.last_used_unix_ms),
            layer.image.clone(),
        ]);
    }
    let mut text = aligned(table, 2..5);
    text.push('\n');
    if answer.more > 0 {
        let _ = writeln!(text, "{} more are left out", answer.more);
    }
    text
}

pub(super) fn pruned(answer: &api::PruneCacheResponse) -> String {
    let api::PruneCacheResponse { layers, bytes, failed } = answer;
    let mut text = format!("removed {layers} layers, {}\n", size(*bytes));
    if *failed > 0 {
        let _ = writeln!(text, "{failed} could not be removed; the daemon's log says why");
    }
    text
}

pub(super) fn verified(answer: &api::VerifyCacheProgress) -> String {
    let mut text = format!(
        "looked at {} chunks ({}) of {} layers: {} wrong\n",
        answer.chunks,
        size(answer.bytes),
        answer.layers_done,
        answer.wrong_chunks
    );
    for wrong in &answer.wrong {
        let api::WrongChunk {
            toc_digest,
            chunk,
            file,
            offset,
        } = wrong;
        let _ = writeln!(text, "WRONG {} chunk {chunk}: {file} at {offset}", short(toc_digest));
    }
    if answer.wrong_chunks > answer.wrong.len() as u64 {
        text.push_str("(more are in the daemon's log)\n");
    }
    if answer.layers_failed > 0 {
        let _ = writeln!(
            text,
            "{} layers could not be looked at: {}",
            answer.layers_failed, answer.error
        );
    }
    text
}

#[cfg(test)]
mod tests;
