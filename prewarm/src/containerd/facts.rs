//! What containerd says of itself: version, directories, runtime handlers, network configuration.
//!
//! CRI's `Status` gives, when asked to be verbose, the CRI plugin's whole configuration as JSON. Its keys differ a little
//! between 1.6 and 2.x; those that we need are checked for their types, all others are ignored.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use hullspeed_proto::cri::v1::{ImageSpec, ImageStatusRequest, ListImagesRequest, StatusRequest, VersionRequest};
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::{CallError, Containerd, limited};

/// More handlers, or patterns of one, are not a configuration that somebody wrote.
const MAX_HANDLERS: usize = 1024;
const MAX_PATTERNS: usize = 1024;

/// Why there are no facts.
#[derive(Debug, thiserror::Error)]
pub enum FactsError {
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// There is no configuration in the answer.
    #[error("containerd's status has no configuration (key {key:?} of the verbose information)")]
    Missing {
        /// Of the information.
        key: &'static str,
    },
    /// The configuration is not JSON.
    #[error("containerd's configuration is not JSON")]
    Syntax(#[source] serde_json::Error),
    /// A value is missing or of another type.
    #[error("{key:?} of containerd's configuration is not {expected}")]
    Value {
        /// Path of the value.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
}

/// containerd's CRI plugin as it is configured and runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// `RuntimeVersion` of CRI's Version call, such as `1.6.20~ds1` or `2.1.9`.
    pub version: String,
    /// CRI's persistent directory; sandboxes' files are in `<root>/sandboxes/<id>/`.
    pub root: PathBuf,
    /// Handler of pods that name none.
    pub default_handler: String,
    /// Handlers by name.
    pub handlers: BTreeMap<String, Handler>,
    /// Whether cgroups of the default handler are systemd's, so that a parent is a slice.
    pub systemd_cgroup: bool,
    /// Whether SELinux labels are put on containers.
    pub selinux: bool,
    /// Whether pods with a network of their own may use low ports without a capability.
    pub enable_unprivileged_ports: bool,
    /// Whether everybody in them may send ICMP echo requests.
    pub enable_unprivileged_icmp: bool,
    /// Directory of CNI configurations.
    pub cni_conf_dir: PathBuf,
    /// How many of them are used, in the order of their names; 0 means all.
    pub cni_max_conf_num: usize,
    /// The CNI configuration that containerd has loaded, as it describes it.
    pub cni_loaded: Option<String>,
    /// Reference of the pause image; empty where containerd does not tell (2.x, before it has one).
    pub sandbox_image: String,
    /// Id of the pause image, or ids of all images that containerd pins if it does not tell which it is; none before it
    /// has been pulled.
    pub pause_images: Vec<String>,
    /// SHA-256 of version and configuration as containerd reports them, in hex.
    pub fingerprint: String,
}

/// A runtime handler.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Handler {
    /// Its shim, such as `io.containerd.runc.v2`.
    pub runtime_type: String,
    /// Its sandbox controller; `podsandbox` or empty is containerd's own.
    pub sandboxer: String,
    /// Patterns of pod annotations that reach the OCI specification.
    pub pod_annotations: Vec<String>,
    /// Whether its cgroups are systemd's.
    pub systemd_cgroup: bool,
    /// Directory of CNI configurations, where it has its own.
    pub cni_conf_dir: Option<PathBuf>,
    /// How many of those are used; 0 means all.
    pub cni_max_conf_num: usize,
}

impl Facts {
    /// Asks containerd.
    pub async fn read(containerd: &Containerd) -> Result<Self, FactsError> {
        let mut runtime = containerd.runtime();
        let version = limited("Version", runtime.version(VersionRequest::default())).await?;
        let status = limited("Status", runtime.status(StatusRequest { verbose: true })).await?;
        let mut facts = Self::from_information(&version.runtime_version, &status.info)?;
        facts.read_pause_images(containerd).await?;
        Ok(facts)
    }

    /// 1.x names the pause image; 2.x pins it, and keeps its name for itself.
    async fn read_pause_images(&mut self, containerd: &Containerd) -> Result<(), FactsError> {
        let mut images = containerd.images();
        if !self.sandbox_image.is_empty() {
            let image = Some(ImageSpec {
                image: self.sandbox_image.clone(),
                ..Default::default()
            });
            let request = ImageStatusRequest { image, verbose: false };
            let status = limited("ImageStatus", images.image_status(request)).await?;
            self.pause_images = status.image.map(|image| image.id).into_iter().collect();
            return Ok(());
        }
        let list = limited("ListImages", images.list_images(ListImagesRequest::default())).await?;
        let mut pinned: Vec<_> = list.images.into_iter().filter(|image| image.pinned).collect();
        if let [only] = pinned.as_slice() {
            self.sandbox_image = only.repo_tags.first().cloned().unwrap_or_default();
        }
        pinned.sort_by(|a, b| a.id.cmp(&b.id));
        self.pause_images = pinned.into_iter().map(|image| image.id).collect();
        Ok(())
    }

    /// What the answers to Version and Status tell.
    fn from_information(version: &str, information: &HashMap<String, String>) -> Result<Self, FactsError> {
        let text = information.get("config").ok_or(FactsError::Missing { key: "config" })?;
        let config: Value = serde_json::from_str(text).map_err(FactsError::Syntax)?;
        let at = |path: &[&str]| Node::root(&config).at(path);
        let default_handler = at(&["containerd", "defaultRuntimeName"]).text()?;
        let everywhere = at(&["systemdCgroup"]).flag()?;
        let handlers = handlers(&at(&["containerd", "runtimes"]), everywhere)?;
        let systemd_cgroup = handlers
            .get(&default_handler)
            .map_or(everywhere, |handler| handler.systemd_cgroup);
        let mut digest = Sha256::new();
        digest.update(version.as_bytes());
        digest.update([0]);
        digest.update(text.as_bytes());
        Ok(Self {
            version: version.to_owned(),
            root: at(&["rootDir"]).directory()?,
            default_handler,
            handlers,
            systemd_cgroup,
            selinux: at(&["enableSelinux"]).flag()?,
            enable_unprivileged_ports: at(&["enableUnprivilegedPorts"]).flag()?,
            enable_unprivileged_icmp: at(&["enableUnprivilegedICMP"]).flag()?,
            cni_conf_dir: at(&["cni", "confDir"]).directory()?,
            cni_max_conf_num: at(&["cni", "maxConfNum"]).count()?,
            cni_loaded: information.get("cniconfig").cloned(),
            sandbox_image: at(&["sandboxImage"]).optional_text()?,
            pause_images: Vec::new(),
            fingerprint: hex::encode(digest.finalize()),
        })
    }

    /// The handler that a pod naming this one gets.
    #[must_use]
    pub fn handler(&self, name: &str) -> Option<&Handler> {
        let name = if name.is_empty() { &self.default_handler } else { name };
        self.handlers.get(name)
    }
}

fn handlers(runtimes: &Node<'_>, systemd_everywhere: bool) -> Result<BTreeMap<String, Handler>, FactsError> {
    let Some(Value::Object(map)) = runtimes.value else {
        return Err(runtimes.is_not("an object"));
    };
    if map.len() > MAX_HANDLERS {
        return Err(runtimes.is_not("an object of a reasonable size"));
    }
    map.keys()
        .map(|name| {
            let node = runtimes.at(&[name]);
            let conf_dir = node.at(&["cniConfDir"]);
            let own_conf_dir = !conf_dir.optional_text()?.is_empty();
            let handler = Handler {
                runtime_type: node.at(&["runtimeType"]).text()?,
                sandboxer: node.at(&["sandboxer"]).optional_text()?,
                pod_annotations: node.at(&["PodAnnotations"]).texts()?,
                systemd_cgroup: systemd_everywhere || node.at(&["options", "SystemdCgroup"]).flag()?,
                cni_conf_dir: own_conf_dir.then(|| conf_dir.directory()).transpose()?,
                cni_max_conf_num: node.at(&["cniMaxConfNum"]).count()?,
            };
            Ok((name.clone(), handler))
        })
        .collect()
}

/// A value and its path, for errors that name it.
struct Node<'a> {
    path: String,
    value: Option<&'a Value>,
}

impl<'a> Node<'a> {
    fn root(value: &'a Value) -> Self {
        Self {
            path: String::new(),
            value: Some(value),
        }
    }

    /// Absent steps lead to an absent value.
    fn at(&self, steps: &[&str]) -> Self {
        let value = self
            .value
            .and_then(|from| steps.iter().try_fold(from, |value, step| value.get(step)));
        let path = [self.path.as_str()].into_iter().chain(steps.iter().copied());
        let path: Vec<&str> = path.filter(|step| !step.is_empty()).collect();
        Self {
            path: path.join("."),
            value: value.filter(|value| !value.is_null()),
        }
    }

    fn is_not(&self, expected: &'static str) -> FactsError {
        FactsError::Value {
            key: self.path.clone(),
            expected,
        }
    }

    fn text(&self) -> Result<String, FactsError> {
        let text = self.value.and_then(Value::as_str);
        text.map(str::to_owned).ok_or_else(|| self.is_not("a text"))
    }

    fn optional_text(&self) -> Result<String, FactsError> {
        self.value.map_or(Ok(String::new()), |_| self.text())
    }

    fn directory(&self) -> Result<PathBuf, FactsError> {
        let path = PathBuf::from(self.text()?);
        if path.is_absolute() {
            Ok(path)
        } else {
            Err(self.is_not("an absolute path"))
        }
    }

    /// Absent means no.
    fn flag(&self) -> Result<bool, FactsError> {
        let Some(value) = self.value else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.is_not("true or false"))
    }

    /// Absent and negative mean 0, as in containerd.
    fn count(&self) -> Result<usize, FactsError> {
        let Some(value) = self.value else { return Ok(0) };
        let number = value.as_i64().ok_or_else(|| self.is_not("a whole number"))?;
        Ok(usize::try_from(number).unwrap_or(0))
    }

    /// Absent means none.
    fn texts(&self) -> Result<Vec<String>, FactsError> {
        let Some(value) = self.value else { return Ok(Vec::new()) };
        let list = value.as_array().filter(|list| list.len() <= MAX_PATTERNS);
        let texts = list.and_then(|list| list.iter().map(|item| item.as_str().map(str::to_owned)).collect());
        texts.ok_or_else(|| self.is_not("a list of texts"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What containerd 1.6.20 answers, without the keys that nobody reads.
    fn of_1_6() -> Value {
        serde_json::json!({
            "containerd": {"snapshotter": "overlayfs", "defaultRuntimeName": "runc",
                "defaultRuntime": {"runtimeType": "", "options": null},
                "runtimes": {"runc": {"runtimeType": "io.containerd.runc.v2", "PodAnnotations": ["a.b/*"],
                    "ContainerAnnotations": null, "options": {"SystemdCgroup": true}, "cniConfDir": "", "cniMaxConfNum": 0}}},
            "cni": {"binDir": "/opt/cni/bin", "confDir": "/etc/cni/net.d", "maxConfNum": 1},
            "enableSelinux": false, "sandboxImage": "registry.k8s.io/pause:3.6", "systemdCgroup": false,
            "rootDir": "/var/lib/containerd/io.containerd.grpc.v1.cri",
        })
    }

    /// What containerd 2.1.9 answers, likewise.
    fn of_2_1() -> Value {
        serde_json::json!({
            "containerd": {"defaultRuntimeName": "runc", "runtimes": {
                "runc": {"runtimeType": "io.containerd.runc.v2", "PodAnnotations": null,
                    "options": {"BinaryName": "", "SystemdCgroup": false}, "cniConfDir": "", "cniMaxConfNum": 0,
                    "sandboxer": "podsandbox"},
                "kata": {"runtimeType": "io.containerd.kata.v2", "PodAnnotations": [], "options": null,
                    "cniConfDir": "/etc/cni/kata.d", "cniMaxConfNum": 2, "sandboxer": "shim"}}},
            "cni": {"binDir": "", "binDirs": ["/usr/lib/cni"], "confDir": "/etc/cni/net.d", "maxConfNum": 0},
            "enableUnprivilegedPorts": true, "enableUnprivilegedICMP": true,
            "enableSelinux": true, "rootDir": "/var/lib/containerd/io.containerd.grpc.v1.cri",
        })
    }

    fn parse(config: &Value) -> Result<Facts, FactsError> {
        Facts::from_information("2.1.9", &HashMap::from([("config".to_owned(), config.to_string())]))
    }

    #[test]
    fn both_generations_are_understood() {
        let facts = parse(&of_1_6()).unwrap();
        assert_eq!((facts.default_handler.as_str(), facts.cni_max_conf_num), ("runc", 1));
        assert_eq!(facts.sandbox_image, "registry.k8s.io/pause:3.6");
        assert!(facts.systemd_cgroup && !facts.selinux);
        assert!(!facts.enable_unprivileged_ports && !facts.enable_unprivileged_icmp);
        assert_eq!(facts.handler("").unwrap().pod_annotations, ["a.b/*"]);
        assert_eq!(facts.handler(""), facts.handler("runc"));
        let facts = parse(&of_2_1()).unwrap();
        assert!(!facts.systemd_cgroup && facts.selinux && facts.sandbox_image.is_empty());
        assert!(facts.enable_unprivileged_ports && facts.enable_unprivileged_icmp);
        let kata = facts.handler("kata").unwrap();
        assert_eq!((kata.sandboxer.as_str(), kata.cni_max_conf_num), ("shim", 2));
        assert_eq!(kata.cni_conf_dir, Some(PathBuf::from("/etc/cni/kata.d")));
        assert_eq!(facts.handler("other"), None);
        assert_ne!(facts.fingerprint, parse(&of_1_6()).unwrap().fingerprint);
    }

    #[test]
    fn errors_name_the_key() {
        for (path, value) in [
            ("/rootDir", Value::from("relative")),
            ("/rootDir", Value::Null),
            ("/cni/confDir", Value::from(7)),
            ("/cni/maxConfNum", Value::from("many")),
            ("/containerd/defaultRuntimeName", Value::Null),
            ("/containerd/runtimes", Value::from(vec![1])),
            ("/containerd/runtimes/runc/PodAnnotations", Value::from(vec![1])),
            ("/containerd/runtimes/runc/options/SystemdCgroup", Value::from("yes")),
        ] {
            let mut config = of_1_6();
            *config.pointer_mut(path).unwrap() = value;
            let error = parse(&config).unwrap_err().to_string();
            let key = path.trim_start_matches('/').replace('/', ".");
            assert!(error.contains(&key), "{path}: {error}");
        }
        let none = Facts::from_information("1", &HashMap::new()).unwrap_err();
        assert!(none.to_string().contains("config"));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-z/]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Whatever stands at any key, there is an answer or an error, no panic.
        #[test]
        fn any_value_anywhere_is_survived(value in any_json(), which in 0..9_usize, second in any::<bool>()) {
            let paths = ["/rootDir", "/cni", "/cni/confDir", "/cni/maxConfNum", "/containerd", "/containerd/runtimes",
                "/containerd/runtimes/runc", "/containerd/runtimes/runc/options", "/enableSelinux"];
            let mut config = if second { of_2_1() } else { of_1_6() };
            if let Some(place) = config.pointer_mut(paths[which]) {
                *place = value;
            }
            if let Ok(facts) = parse(&config) {
                prop_assert!(facts.root.is_absolute() && facts.cni_conf_dir.is_absolute());
            }
        }
    }
}
