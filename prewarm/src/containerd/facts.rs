//! What containerd says of itself: version, directories, runtime handlers, network configuration.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// containerd's CRI plugin as it is configured and runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// `RuntimeVersion` of CRI's Version call, such as `1.6.20~ds1` or `2.1.9`.
    pub version: String,
    /// CRI's persistent directory; sandboxes' files are in `<root>/sandboxes/<id>/`.
    pub root: PathBuf,
    /// Handler of pods that name none.
    pub default_handler: String,
    /// Handlers by name.
    pub handlers: BTreeMap<String, Handler>,
    /// Whether cgroups are systemd's, so that a parent is a slice.
    pub systemd_cgroup: bool,
    /// Whether SELinux labels are put on containers.
    pub selinux: bool,
    /// Directory of CNI configurations.
    pub cni_conf_dir: PathBuf,
    /// How many of them are used, in the order of their names.
    pub cni_max_conf_num: usize,
    /// Reference of the pause image.
    pub sandbox_image: String,
    /// SHA-256 of the configuration as containerd reports it, in hex.
    pub fingerprint: String,
}

/// A runtime handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// Its shim, such as `io.containerd.runc.v2`.
    pub runtime_type: String,
    /// Its sandbox controller; `podsandbox` or empty is containerd's own.
    pub sandboxer: String,
    /// Patterns of pod annotations that reach the OCI specification.
    pub pod_annotations: Vec<String>,
}
