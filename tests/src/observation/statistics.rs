//! Usage of pods: its shape, and whether it is that of the pod's own cgroup.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use hullspeed_proto::cri::v1::{
    ContainerStatsRequest, ListPodSandboxMetricsRequest, ListPodSandboxStatsRequest, PodSandboxStats,
    PodSandboxStatsFilter, PodSandboxStatsRequest,
};
use serde_json::{Value, json};

use super::Observer;
use crate::cri::Pod;

/// Memory is counted at another moment than we look, and in batches of pages for each processor.
const MEMORY_SLACK: u64 = 8 << 20;

impl Observer<'_> {
    pub(super) async fn statistics(&mut self, sandbox: &str, pod: &Pod, main: &str) -> Result<()> {
        let one = PodSandboxStatsRequest {
            pod_sandbox_id: sandbox.into(),
        };
        let before = cgroup(pod);
        let stats = self.cri.runtime().pod_sandbox_stats(one.clone()).await;
        if let Ok(answer) = stats
            && let Some(stats) = answer.into_inner().stats
        {
            self.seen
                .insert("stats are the pod's".into(), plausible(&stats, &before, &cgroup(pod)));
        }
        let answer = self.raw.observe("PodSandboxStats", &one).await;
        self.seen.insert("stats".into(), shape(answer));
        let filter = |id: &str, label_selector: HashMap<String, String>| ListPodSandboxStatsRequest {
            filter: Some(PodSandboxStatsFilter {
                id: id.into(),
                label_selector,
            }),
        };
        let labels = &pod.config().labels;
        let mut absent = labels.clone();
        absent.insert("absent".into(), "label".into());
        for (name, request) in [
            ("id", filter(sandbox, HashMap::new())),
            ("prefix", filter(&sandbox[..12], HashMap::new())),
            ("id and labels", filter(sandbox, labels.clone())),
            ("labels too many", filter("", absent)),
            ("no id", filter("zzzz", HashMap::new())),
        ] {
            let answer = self.raw.observe("ListPodSandboxStats", &request).await;
            self.seen.insert(format!("stats by {name}"), shape(answer));
        }
        if !self.native {
            let answer = self
                .cri
                .runtime()
                .list_pod_sandbox_stats(ListPodSandboxStatsRequest::default())
                .await;
            // Without a cgroup parent containerd has no statistics of any sandbox.
            if let Ok(answer) = answer {
                let stats = answer.into_inner().stats.into_iter();
                let ids: Vec<_> = stats.map(|stats| stats.attributes.unwrap_or_default().id).collect();
                anyhow::ensure!(
                    ids == [sandbox],
                    "the list of all stats holds {ids:?}, not {sandbox} alone"
                );
            }
        }
        let request = ContainerStatsRequest {
            container_id: main.into(),
        };
        let answer = self.raw.observe("ContainerStats", &request).await;
        self.seen.insert("stats of main".into(), shape(answer));
        let answer = self
            .raw
            .observe("ListPodSandboxMetrics", &ListPodSandboxMetricsRequest {})
            .await;
        self.seen.insert("metrics".into(), shape(answer));
        Ok(())
    }
}

/// CPU time in nanoseconds and memory in bytes of the pod's cgroup, where it says so.
struct Usage {
    cpu: Option<u64>,
    memory: Option<u64>,
}

fn cgroup(pod: &Pod) -> Usage {
    let parent = pod
        .config()
        .linux
        .as_ref()
        .map_or("", |linux| linux.cgroup_parent.as_str());
    let read = |path: &str| {
        let path = Path::new("/sys/fs/cgroup").join(path);
        let name = parent.trim_start_matches('/');
        fs::read_to_string(path.parent()?.join(name).join(path.file_name()?)).ok()
    };
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let stat = || {
        let text = read("cpu.stat")?;
        let microseconds: u64 = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))?
            .parse()
            .ok()?;
        Some(microseconds * 1000)
    };
    Usage {
        cpu: number("cpuacct/cpuacct.usage").or_else(stat),
        memory: number("memory/memory.usage_in_bytes").or_else(|| number("memory.current")),
    }
}

/// Whether what was told lies between what the cgroup said before and after.
fn plausible(stats: &PodSandboxStats, before: &Usage, after: &Usage) -> Value {
    let linux = stats.linux.clone().unwrap_or_default();
    let cpu = linux
        .cpu
        .and_then(|cpu| cpu.usage_core_nano_seconds)
        .map(|value| value.value);
    let memory = linux
        .memory
        .and_then(|memory| memory.usage_bytes)
        .map(|value| value.value);
    let within = |told: Option<u64>, before: Option<u64>, after: Option<u64>, slack: u64| {
        let (Some(before), Some(after)) = (before, after) else {
            return Value::from("no cgroup");
        };
        let Some(told) = told else {
            return Value::from("not told");
        };
        let (low, high) = (before.min(after), before.max(after));
        if low.saturating_sub(slack) <= told && told <= high.saturating_add(slack) {
            Value::from(true)
        } else {
            Value::from(format!("{told} is not within {low} and {high}"))
        }
    };
    json!({
        "cpu": within(cpu, before.cpu, after.cpu, 0),
        "memory": within(memory, before.memory, after.memory, MEMORY_SLACK),
        "network": linux.network.is_some_and(|network| network.default_interface.is_some()),
        "processes": linux.process.is_some(),
    })
}

/// Numbers without their values: wrapped ones (`{"1": [n]}`, or an empty message for 0), timestamps and plain ones.
fn shape(value: Value) -> Value {
    match value {
        Value::Number(_) => "<number>".into(),
        Value::String(text) if text.is_empty() => "<number>".into(),
        Value::Array(list) => list.into_iter().map(shape).collect(),
        Value::Object(map) if map.len() == 1 && map.get("1").is_some_and(|inner| inner[0].is_number()) => {
            "<number>".into()
        }
        Value::Object(mut map) => {
            // A container's disk usage (field 4, beside attributes with an id) is measured every ten seconds.
            if map.get("1").is_some_and(|attributes| attributes[0]["1"][0].is_string()) {
                map.remove("4");
            }
            map.into_iter().map(|(key, value)| (key, shape(value))).collect()
        }
        other => other,
    }
}
