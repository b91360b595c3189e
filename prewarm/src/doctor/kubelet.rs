//! The kubelet: where its CRI calls go, as far as its command line and files tell.

use std::path::{Path, PathBuf};

use hullspeed_daemon::doctor::processes::{self, flag, read};

use super::{Places, Report};
use crate::config::Config;

const FLAG: &str = "--container-runtime-endpoint";
const CONFIG_FLAG: &str = "--config";
const KEY: &str = "containerRuntimeEndpoint:";

/// An endpoint and who says so.
#[derive(Debug, PartialEq, Eq)]
struct Endpoint {
    url: String,
    source: String,
}

pub(super) fn examine(config: &Config, places: &Places, report: &mut Report) {
    let Some(Endpoint { url, source }) = endpoint(places) else {
        let advice = format!("its {FLAG} should be unix://{}", config.socket.display());
        report.warn(
            "kubelet",
            "no kubelet, or it does not say where its CRI calls go",
            advice,
        );
        return;
    };
    let path = Path::new(url.strip_prefix("unix://").unwrap_or(&url));
    if path == config.socket {
        report.ok("kubelet", format!("comes to the relay ({source})"));
    } else if path == config.containerd.address {
        let advice = format!(
            "no pod gets a hull like this; set it to unix://{} and restart the kubelet",
            config.socket.display()
        );
        report.warn("kubelet", format!("goes to containerd directly ({source})"), advice);
    } else {
        let advice =
            "the relay and its containerd are for another kubelet, or the keys socket and containerd.address are wrong";
        report.warn("kubelet", format!("goes to {url} ({source})"), advice);
    }
}

/// As the kubelet decides: its flag, then its file; without a kubelet, what kubeadm would start it with.
fn endpoint(places: &Places) -> Option<Endpoint> {
    let arguments = running(&places.proc);
    let running = arguments.is_some();
    let arguments = arguments.unwrap_or_else(|| {
        let text = read(&places.kubelet.join("kubeadm-flags.env")).unwrap_or_default();
        text.split(|c: char| c.is_whitespace() || c == '"' || c == '\'')
            .map(str::to_owned)
            .collect()
    });
    if let Some(url) = flag(&arguments, FLAG) {
        let source = if running {
            "flag of the running kubelet"
        } else {
            "kubeadm-flags.env"
        };
        return Some(Endpoint {
            url,
            source: source.to_owned(),
        });
    }
    let file = flag(&arguments, CONFIG_FLAG).map_or_else(|| places.kubelet.join("config.yaml"), PathBuf::from);
    let text = read(&file)?;
    // One key at the top level of a document that the kubelet's own parser has checked.
    let value = text.lines().find_map(|line| line.strip_prefix(KEY))?;
    let value = value.split(" #").next().unwrap_or_default();
    let url = value.trim().trim_matches(['"', '\'']).to_owned();
    let source = file.display().to_string();
    (!url.is_empty()).then_some(Endpoint { url, source })
}

/// The arguments of a process that is called kubelet.
fn running(proc: &Path) -> Option<Vec<String>> {
    let mut all = processes::all(proc).filter_map(|(_, process)| processes::arguments(&process));
    all.find(|arguments| {
        let program = arguments.first().map(Path::new).and_then(Path::file_name);
        program.is_some_and(|name| name == "kubelet")
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use hullspeed_daemon::doctor::Level;

    use super::*;

    struct Node {
        place: tempfile::TempDir,
        places: Places,
    }

    impl Node {
        fn new() -> Self {
            let place = tempfile::tempdir().unwrap();
            let places = Places {
                proc: place.path().join("proc"),
                kubelet: place.path().join("kubelet"),
                ..Places::default()
            };
            fs::create_dir_all(&places.kubelet).unwrap();
            Self { place, places }
        }

        fn process(&self, id: &str, command: &str) {
            let directory = self.places.proc.join(id);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("cmdline"), command.replace(' ', "\0")).unwrap();
        }

        fn found(&self) -> (Option<String>, Level) {
            let mut report = Report::default();
            examine(&Config::default(), &self.places, &mut report);
            (
                endpoint(&self.places).map(|endpoint| endpoint.url),
                report.findings[0].level,
            )
        }
    }

    #[test]
    fn what_the_kubelet_itself_would_take_is_found() {
        let node = Node::new();
        assert_eq!(node.found(), (None, Level::Warn));
        let yaml = node.places.kubelet.join("config.yaml");
        fs::write(&yaml, "kind: x\ncontainerRuntimeEndpoint: \"\"\n").unwrap();
        assert_eq!(node.found(), (None, Level::Warn));
        fs::write(
            &yaml,
            "a: b\ncontainerRuntimeEndpoint: \"unix:///run/hullspeed/cri.sock\" # x\n",
        )
        .unwrap();
        assert_eq!(
            node.found(),
            (Some("unix:///run/hullspeed/cri.sock".to_owned()), Level::Ok)
        );
        let environment =
            "KUBELET_KUBEADM_ARGS=\"--container-runtime-endpoint=unix:///run/containerd/containerd.sock --x\"\n";
        fs::write(node.places.kubelet.join("kubeadm-flags.env"), environment).unwrap();
        let direct = "unix:///run/containerd/containerd.sock";
        assert_eq!(node.found(), (Some(direct.to_owned()), Level::Warn));
        // A kubelet that runs is right, whatever the files say; others of a similar name are none.
        node.process("7", "/usr/bin/kubelet-exporter --container-runtime-endpoint=unix:///x");
        node.process(
            "8",
            "/usr/bin/kubelet --a --container-runtime-endpoint /run/hullspeed/cri.sock --b",
        );
        assert_eq!(node.found(), (Some("/run/hullspeed/cri.sock".to_owned()), Level::Ok));
        let other = node.place.path().join("other.yaml");
        fs::write(&other, "containerRuntimeEndpoint: unix:///o.sock\n").unwrap();
        node.process("8", &format!("kubelet --config={}", other.display()));
        assert_eq!(node.found(), (Some("unix:///o.sock".to_owned()), Level::Warn));
        node.process("8", "kubelet --container-runtime-endpoint");
        fs::remove_file(&yaml).unwrap();
        assert_eq!(node.found(), (None, Level::Warn));
    }
}
