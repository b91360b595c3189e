//! How the running daemon mounts layers, and what its mounts stand on: its self-test, the descriptor store, its descriptors.

use hullspeed_daemon::doctor::Report;
use hullspeed_daemon::doctor::processes::read;
use hullspeed_proto::hullspeed::control::v1 as api;

use super::Places;

/// Descriptors that a layer takes in the store while the kernel asks for it.
const OF_A_LAYER: u64 = 2;
/// Layers for which there should be room in the store.
const LAYERS: u64 = 64;
/// Fewer descriptors than this are soon used up: a quarter of them at most are for reads that wait.
const FEW_FILES: u64 = 65_536;

pub(super) fn examine(diagnosis: &api::DiagnoseResponse, places: &Places, report: &mut Report) {
    judge_choice(diagnosis, report);
    judge_steps(&diagnosis.steps, report);
    if !diagnosis.mount_chosen.is_empty() {
        let supervisor = supervisor(diagnosis.process, places);
        judge_store(diagnosis.store.as_ref(), supervisor.as_deref(), report);
    }
    judge_files(diagnosis.open_files_limit, report);
}

fn judge_choice(diagnosis: &api::DiagnoseResponse, report: &mut Report) {
    let api::DiagnoseResponse {
        mount_configured,
        mount_reason: reason,
        ..
    } = diagnosis;
    match (diagnosis.mount_chosen.as_str(), mount_configured.as_str()) {
        ("", _) => report.warn(
            "mounts",
            "lazy layers are switched off: every layer is unpacked",
            "set layers.lazy = true",
        ),
        ("erofs", _) => report.ok("mounts", format!("layers are mounted as EROFS: {reason}")),
        ("fuse", "fuse") => report.ok("mounts", format!("layers are mounted by FUSE: {reason}")),
        ("erofs_when_complete", _) => report.warn(
            "mounts",
            format!("only complete layers are mounted as EROFS, others by FUSE: {reason}"),
            "see the lines that follow; layers.mount = \"fuse\" ends the trying",
        ),
        _ => report.warn(
            "mounts",
            format!("layers are mounted by FUSE: {reason}"),
            "see the lines that follow; layers.mount = \"fuse\" ends the trying",
        ),
    }
}

fn judge_steps(steps: &[api::ProbeStep], report: &mut Report) {
    let passed: Vec<&str> = steps
        .iter()
        .filter(|step| step.ok)
        .map(|step| step.name.as_str())
        .collect();
    let failed = steps.iter().find(|step| !step.ok);
    let passed = if passed.is_empty() {
        "nothing".to_owned()
    } else {
        passed.join(", ")
    };
    match failed {
        None if steps.is_empty() => {}
        None => report.ok("self-test", format!("passed: {passed}")),
        Some(step) => report.warn(
            "self-test",
            format!("passed: {passed}; failed: {} ({})", step.name, step.detail),
            advice(&step.name),
        ),
    }
}

/// What can be done about a step that failed.
fn advice(step: &str) -> &'static str {
    match step {
        "erofs" => "a kernel that mounts EROFS from files is needed: Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE",
        "store" => "run the daemon under systemd with FileDescriptorStoreMax=, or under hullspeed-keeper",
        "events" => "the line `fanotify` says what is missing",
        _ => "the kernel does not do what it should; the daemon's log has the error, and FUSE works meanwhile",
    }
}

/// The name of the process that started the daemon.
fn supervisor(process: u32, places: &Places) -> Option<String> {
    let status = read(&places.proc.join(process.to_string()).join("status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim();
    let directory = places.proc.join(parent);
    // The kernel cuts the name of a process to 15 bytes.
    let program = std::fs::read_link(directory.join("exe")).ok();
    let program = program
        .as_ref()
        .and_then(|program| program.file_name())
        .map(|name| name.to_string_lossy().into_owned());
    let name = program.or_else(|| read(&directory.join("comm")).map(|name| name.trim_end().to_owned()))?;
    Some(format!("{name} (process {parent})"))
}

fn judge_store(store: Option<&api::DescriptorStore>, supervisor: Option<&str>, report: &mut Report) {
    let by = supervisor.unwrap_or("its supervisor");
    let Some(api::DescriptorStore { capacity, kept }) = store else {
        let says = format!("{by} keeps no descriptors: when the daemon ends, so do the mounts of its layers");
        let advice = "under systemd set FileDescriptorStoreMax=4096 (before 254 also HULLSPEED_FDSTORE), elsewhere use hullspeed-keeper";
        return report.warn("store", says, advice);
    };
    let says = format!("{by} keeps {kept} of at most {capacity} descriptors");
    if capacity.saturating_sub(*kept) < LAYERS * OF_A_LAYER {
        let advice = "raise FileDescriptorStoreMax=, or the keeper's limit: layers without room in it are mounted by FUSE, and end with the daemon";
        report.warn("store", says, advice);
    } else {
        report.ok("store", says);
    }
}

fn judge_files(limit: u64, report: &mut Report) {
    let says = match limit {
        u64::MAX => "the daemon may have any number of files open".to_owned(),
        limit => format!("the daemon may have {limit} files open"),
    };
    if limit < FEW_FILES {
        let advice =
            "LimitNOFILE=1048576 in its unit, or ulimit -n: each mounted layer and each read that waits takes some";
        report.warn("files", says, advice);
    } else {
        report.ok("files", says);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hullspeed_daemon::doctor::Level;

    use super::*;

    fn found(look: impl FnOnce(&mut Report)) -> Vec<(&'static str, Level, String)> {
        let mut report = Report::default();
        look(&mut report);
        let findings = report.findings.into_iter();
        findings
            .map(|finding| {
                (
                    finding.check,
                    finding.level,
                    finding.says + " " + &finding.advice.unwrap_or_default(),
                )
            })
            .collect()
    }

    #[test]
    fn what_was_chosen_is_fine_only_where_it_is_the_best_or_wanted() {
        for (chosen, configured, level) in [
            ("erofs", "auto", Level::Ok),
            ("erofs", "erofs", Level::Ok),
            ("fuse", "fuse", Level::Ok),
            ("fuse", "auto", Level::Warn),
            ("erofs_when_complete", "auto", Level::Warn),
            ("", "auto", Level::Warn),
        ] {
            let diagnosis = api::DiagnoseResponse {
                mount_configured: configured.to_owned(),
                mount_chosen: chosen.to_owned(),
                mount_reason: "because".to_owned(),
                ..Default::default()
            };
            let said = found(|report| judge_choice(&diagnosis, report)).remove(0);
            assert_eq!(said.1, level, "{chosen} {configured}");
            assert!(chosen.is_empty() || said.2.contains("because"), "{said:?}");
        }
    }

    #[test]
    fn the_step_that_failed_is_told_with_what_it_needs() {
        let step = |name: &str, ok| api::ProbeStep {
            name: name.to_owned(),
            ok,
            detail: "EINVAL".to_owned(),
        };
        assert!(found(|report| judge_steps(&[], report)).is_empty());
        let said = found(|report| judge_steps(&[step("erofs", true), step("store", true)], report));
        assert!(said[0].1 == Level::Ok && said[0].2.contains("erofs, store"), "{said:?}");
        for (name, word) in [
            ("erofs", "6.12"),
            ("store", "FileDescriptorStoreMax"),
            ("events", "fanotify"),
            ("kill", "log"),
        ] {
            let said = found(|report| judge_steps(&[step("x", true), step(name, false)], report));
            assert!(
                said[0].1 == Level::Warn && said[0].2.contains(word) && said[0].2.contains("EINVAL"),
                "{said:?}"
            );
        }
    }

    #[test]
    fn a_store_is_needed_and_room_in_it() {
        let store = |capacity, kept| api::DescriptorStore { capacity, kept };
        let said = found(|report| judge_store(None, Some("bash (process 7)"), report)).remove(0);
        assert!(
            said.1 == Level::Warn && said.2.contains("bash") && said.2.contains("keeper"),
            "{said:?}"
        );
        let level = |store| found(|report| judge_store(Some(&store), None, report)).remove(0).1;
        assert_eq!(level(store(4096, 10)), Level::Ok);
        assert_eq!(level(store(128, 1)), Level::Warn);
        assert_eq!(level(store(1, 9)), Level::Warn);
    }

    #[test]
    fn few_descriptors_are_told() {
        for (limit, level) in [(1024, Level::Warn), (65_536, Level::Ok), (u64::MAX, Level::Ok)] {
            assert_eq!(found(|report| judge_files(limit, report))[0].1, level, "{limit}");
        }
    }

    #[test]
    fn who_started_a_process_is_found() {
        let places = Places::with_containerd(Path::new("/x"));
        let parent = supervisor(std::process::id(), &places).unwrap();
        let number = std::os::unix::process::parent_id();
        assert!(parent.ends_with(&format!("(process {number})")), "{parent}");
        assert_eq!(supervisor(u32::MAX, &places), None);
    }
}
