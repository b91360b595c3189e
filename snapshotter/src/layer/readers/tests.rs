//! Who is found behind a process, and what is counted for them.

use std::fs;
use std::path::Path;
use std::time::Instant;

use proptest::prelude::*;

use super::process::{owner, start_of};
use super::*;

const ID: &str = "3e1f0b4a9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f";
const UID: &str = "0b5e6d4c-1111-2222-3333-444455556666";

fn found(cgroup: &str) -> (Option<String>, Option<String>) {
    let (pod, container) = owner(cgroup);
    (pod.map(|pod| pod.to_string()), container.map(|id| id.to_string()))
}

#[test]
fn pods_and_containers_are_found_in_the_paths_of_their_control_groups() {
    let underscored = UID.replace('-', "_");
    let id = Some(ID.to_owned());
    let uid = Some(UID.to_owned());
    for (cgroup, expected) in [
        // containerd with cgroupfs, first version beside an empty second one.
        (
            format!(
                "13:pids:/kubepods/burstable/pod{UID}/{ID}\n1:name=systemd:/kubepods/burstable/pod{UID}/{ID}\n0::/\n"
            ),
            (uid.clone(), id.clone()),
        ),
        // A pod that is guaranteed what it asks for.
        (format!("0::/kubepods/pod{UID}/{ID}\n"), (uid.clone(), id.clone())),
        // systemd.
        (
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscored}.slice/cri-containerd-{ID}.scope\n"
            ),
            (uid.clone(), id.clone()),
        ),
        (
            format!("0::/kubepods.slice/kubepods-pod{underscored}.slice/crio-{ID}.scope/init.scope"),
            (uid.clone(), id.clone()),
        ),
        // A kubelet with a root of its own, and a static pod, whose UID is a digest.
        (
            format!("0::/kubelet/kubepods/besteffort/pod{}/{ID}", "ab".repeat(16)),
            (Some("ab".repeat(16)), id.clone()),
        ),
        // A kubelet with systemd's driver, over a runtime with the other one.
        (
            format!(
                "0::/system.slice/containerd.service/kubepods-besteffort-pod{underscored}.slice:cri-containerd:{ID}"
            ),
            (uid.clone(), id.clone()),
        ),
        // Without Kubernetes.
        (format!("0::/k8s.io/{ID}\n"), (None, id.clone())),
        (
            "4:memory:/default/web-1\n0::/default/web-1".to_owned(),
            (None, Some("web-1".to_owned())),
        ),
        (format!("0::/hullspeed-test/{ID}"), (None, id.clone())),
        (format!("0::/system.slice/docker-{ID}.scope"), (None, id.clone())),
        // A pod's own process.
        (format!("0::/kubepods/pod{UID}"), (uid.clone(), None)),
        // The hierarchy that tells more is believed.
        (
            format!("3:cpu:/user.slice\n2:pids:/kubepods/pod{UID}/{ID}\n"),
            (uid, id),
        ),
        // Nobody's.
        ("0::/system.slice/containerd.service\n".to_owned(), (None, None)),
        ("0::/default/x.service".to_owned(), (None, None)),
        ("0::/user.slice/podman".to_owned(), (None, None)),
        ("0::/kubepods/podman".to_owned(), (None, None)),
        (format!("0::/kubepods-{ID}"), (None, None)),
        (format!("0::/{}", ID.to_uppercase()), (None, None)),
        ("0::/../../x".to_owned(), (None, None)),
        (String::new(), (None, None)),
    ] {
        assert_eq!(found(&cgroup), expected, "{cgroup}");
    }
}

proptest! {
    #[test]
    fn whatever_is_in_these_files_is_borne(cgroup in "\\PC{0,200}", stat in "\\PC{0,200}") {
        if let (pod, Some(container)) = found(&cgroup) {
            prop_assert!(container.len() <= 76 && pod.is_none_or(|pod| pod.len() <= 64));
        }
        let _ = start_of(&stat);
    }

    #[test]
    fn the_start_is_found_whatever_the_process_is_called(name in "[ -~]{0,15}", started: u64) {
        let fields: Vec<String> = (4..22).map(|field: i32| field.to_string()).collect();
        let stat = format!("7 ({name}) S {} {started} 1 2\n", fields.join(" "));
        prop_assert_eq!(start_of(&stat), Some(started));
    }
}

/// A process as `/proc` shows it.
fn process(proc: &Path, pid: i32, started: u64, group: i32, command: &str, cgroup: &str) {
    let directory = proc.join(pid.to_string());
    fs::create_dir_all(&directory).unwrap();
    let stat = format!("{pid} (x) S 1 {} {started} 0\n", ["0"; 17].join(" "));
    for (name, text) in [
        ("stat", stat),
        ("status", format!("Name:\tx\nTgid:\t{group}\nPid:\t{pid}\n")),
        ("comm", format!("{command}\n")),
        ("cgroup", cgroup.to_owned()),
    ] {
        fs::write(directory.join(name), text).unwrap();
    }
}

/// The readers, as soon as everything is counted.
async fn reports(readers: &Readers, reads: u64) -> Vec<ReaderReport> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let reports = readers.report();
        if reports.iter().map(|report| report.waits.reads).sum::<u64>() == reads {
            return reports;
        }
        assert!(Instant::now() < end, "not all is counted: {reports:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn those_who_wait_longest_come_first_and_processes_of_one_command_are_one() {
    let place = tempfile::tempdir().unwrap();
    let proc = place.path();
    let readers = Readers::within(proc.to_owned(), Duration::ZERO, Handle::current());
    process(proc, 7, 100, 7, "nginx", &format!("0::/kubepods/pod{UID}/{ID}"));
    process(proc, 8, 101, 8, "nginx", &format!("0::/kubepods/pod{UID}/{ID}"));
    // A thread: it is its process that reads.
    process(proc, 9, 102, 7, "worker", &format!("0::/kubepods/pod{UID}/{ID}"));
    process(proc, 10, 103, 10, "cat\u{1b}[2J", "0::/user.slice");
    for (pid, bytes, millis) in [
        (7, 10, 5),
        (8, 20, 5),
        (9, 30, 5),
        (10, 40, 1),
        (11, 50, 2),
        (0, 1, 1),
        (-5, 1, 1),
    ] {
        readers.note(pid, bytes, Duration::from_millis(millis));
    }
    let reports = reports(&readers, 7).await;
    let told: Vec<_> = reports
        .iter()
        .map(|report| (report.reader.command.as_str(), report.waits.reads, report.waits.bytes))
        .collect();
    assert_eq!(told, [("nginx", 3, 60), ("", 3, 52), ("cat?[2J", 1, 40)]);
    let first = &reports[0];
    assert_eq!(first.waits.waited, Duration::from_millis(15));
    assert!(first.waits.first <= first.waits.last);
    assert_eq!(first.reader.pod, Some(PodUid(UID.to_owned())));
    assert_eq!(first.reader.container, Some(ContainerId(ID.to_owned())));
    assert_eq!(reports[1].reader, Reader::default());
}

#[tokio::test]
async fn a_number_that_is_given_out_again_is_somebody_else() {
    let place = tempfile::tempdir().unwrap();
    let proc = place.path();
    let readers = Readers::within(proc.to_owned(), Duration::ZERO, Handle::current());
    process(proc, 7, 100, 7, "first", &format!("0::/k8s.io/{ID}"));
    readers.note(7, 1, Duration::from_millis(9));
    reports(&readers, 1).await;
    // It executes another program: its place is known, its name is new.
    process(proc, 7, 100, 7, "second", "0::/user.slice");
    readers.note(7, 1, Duration::from_millis(8));
    reports(&readers, 2).await;
    process(proc, 7, 101, 7, "third", "0::/user.slice");
    readers.note(7, 1, Duration::from_millis(7));
    let reports = reports(&readers, 3).await;
    let told: Vec<_> = reports
        .iter()
        .map(|report| (report.reader.command.as_str(), report.reader.container.is_some()))
        .collect();
    assert_eq!(told, [("first", true), ("second", true), ("third", false)]);
}

fn commands(readers: &Readers) -> Vec<String> {
    let reports = readers.report().into_iter();
    reports.map(|report| report.reader.command).collect()
}

#[tokio::test]
async fn a_crowd_of_processes_takes_bounded_memory_and_the_oldest_make_room() {
    let place = tempfile::tempdir().unwrap();
    let proc = place.path();
    let readers = Readers::within(proc.to_owned(), Duration::ZERO, Handle::current());
    let count = i32::try_from(MAX_READERS).unwrap() + 10;
    for pid in 1..=count {
        process(proc, pid, 1, pid, &format!("c{pid}"), "");
        readers.note(pid, 1, Duration::from_secs(1));
        // In the order in which they came.
        while !commands(&readers).contains(&format!("c{pid}")) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let known = commands(&readers);
    assert_eq!(known.len(), MAX_READERS);
    assert!(
        !known.contains(&"c10".to_owned()) && known.contains(&"c11".to_owned()),
        "{known:?}"
    );
    // More at once than are noted one by one; all are counted.
    let readers = Readers::within(proc.join("nowhere"), Duration::ZERO, Handle::current());
    let held = super::lock(&readers.shared.known);
    for pid in 1..2000 {
        readers.note(pid, 1, Duration::ZERO);
    }
    assert!(super::lock(&readers.shared.noted).processes.len() <= MAX_NOTED + 1);
    drop(held);
    let unknown = reports(&readers, 1999).await;
    assert_eq!((unknown.len(), &unknown[0].reader), (1, &Reader::default()));
}

#[tokio::test]
async fn this_process_is_found_by_its_threads_too() {
    let readers = Readers::new(Handle::current());
    let own = i32::try_from(std::process::id()).unwrap();
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    readers.note(own, 1, Duration::from_millis(1));
    readers.note(thread, 1, Duration::from_millis(1));
    let reports = reports(&readers, 2).await;
    assert_eq!(reports.len(), 1, "{reports:?}");
    let comm = fs::read_to_string("/proc/self/comm").unwrap();
    assert_eq!(reports[0].reader.command, comm.trim_end());
}

#[tokio::test]
async fn who_was_just_looked_at_is_not_looked_at_again_and_counts() {
    let place = tempfile::tempdir().unwrap();
    let proc = place.path();
    let readers = Readers::within(proc.to_owned(), Duration::from_secs(3600), Handle::current());
    for pid in [7, 8] {
        process(proc, pid, 100, pid, "first", "");
        readers.note(pid, 1, Duration::from_millis(1));
    }
    reports(&readers, 2).await;
    fs::remove_dir_all(proc.join("7")).unwrap();
    for _ in 0..5 {
        readers.note(7, 10, Duration::from_millis(1));
    }
    // Nobody has to look for that.
    assert!(super::lock(&readers.shared.noted).processes.is_empty());
    let reports = readers.report();
    assert_eq!(
        (reports.len(), reports[0].waits.reads, reports[0].waits.bytes),
        (1, 7, 52)
    );
    assert_eq!(readers.report(), reports, "what is told is counted once");
    // Nor is it forgotten where more processes come than are remembered.
    readers.note(8, 1, Duration::from_millis(1));
    for pid in 100..100 + 2 * i32::try_from(MAX_NOTED).unwrap() {
        readers.note(pid, 1, Duration::ZERO);
        if pid % 50 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let all = super::tests::reports(&readers, 8 + 2 * MAX_NOTED as u64).await;
    assert_eq!(all[0].waits.reads, 8);
    assert!(super::lock(&readers.shared.noted).fresh.len() <= MAX_NOTED);
}
