//! The configuration file: version 2 of its format for containerd 1.6, version 3 with its other plugin names for 2.x.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{ContainerdOptions, SnapshotterChoice};
use crate::network::{CNI_PLUGINS, Network};
use crate::release::Release;
use crate::run::RunDir;

/// A TOML basic string: the escapes of JSON are a subset of TOML's.
fn quoted(value: impl AsRef<Path>) -> String {
    serde_json::Value::from(value.as_ref().to_string_lossy()).to_string()
}

/// The file's text.
pub(super) fn text(run: &RunDir, network: &Network, directory: &Path, options: &ContainerdOptions) -> Result<String> {
    let certificates = run.directory("certs.d")?;
    let common = common(directory, &options.snapshotter);
    let (version, cri) = match options.release {
        Release::One => (2, cri_of_1(network, directory, options, certificates)),
        Release::Two => (3, cri_of_2(network, directory, options, certificates)),
    };
    Ok(format!("version = {version}\n{common}{cri}"))
}

fn common(directory: &Path, snapshotter: &SnapshotterChoice) -> String {
    let at = |name: &str| quoted(directory.join(name));
    let proxy = match snapshotter {
        SnapshotterChoice::Overlayfs => String::new(),
        SnapshotterChoice::Proxy { name, address, root } => format!(
            "\n[proxy_plugins.{name}]\n  type = \"snapshot\"\n  address = {}\n  [proxy_plugins.{name}.exports]\n    root = {}\n",
            quoted(address),
            quoted(root),
        ),
    };
    format!(
        r#"root = {root}
state = {state}
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]

[grpc]
  address = {socket}

[ttrpc]
  address = {ttrpc}

[plugins."io.containerd.internal.v1.opt"]
  path = {opt}
{proxy}"#,
        root = at("root"),
        state = at("state"),
        socket = at("containerd.sock"),
        ttrpc = at("containerd.sock.ttrpc"),
        opt = at("opt"),
    )
}

fn cri_of_1(network: &Network, directory: &Path, options: &ContainerdOptions, certificates: PathBuf) -> String {
    format!(
        r#"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # The development machines lack CAP_SYS_RESOURCE, so no process may lower its OOM score.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  disable_tcp_service = true

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = {plugins}
    conf_dir = {conf_dir}

  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = {certificates}

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    disable_snapshot_annotations = false
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = {runc}
"#,
        runc = quoted(directory.join("runc")),
        pause = options.pause_image,
        plugins = quoted(CNI_PLUGINS),
        conf_dir = quoted(network.conf_dir()),
        certificates = quoted(certificates),
        snapshotter = options.snapshotter.name(),
    )
}

fn cri_of_2(network: &Network, directory: &Path, options: &ContainerdOptions, certificates: PathBuf) -> String {
    format!(
        r#"
# On, as by default, but not on the host's paths.
[plugins."io.containerd.nri.v1.nri"]
  socket_path = {nri}
  plugin_path = {nri_plugins}
  plugin_config_path = {nri_plugins}

[plugins."io.containerd.transfer.v1.local"]
  config_path = {certificates}

[plugins."io.containerd.grpc.v1.cri"]
  disable_tcp_service = true

[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{snapshotter}"
  disable_snapshot_annotations = false

  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{pause}"

  [plugins."io.containerd.cri.v1.images".registry]
    config_path = {certificates}

[plugins."io.containerd.cri.v1.runtime"]
  # The development machines lack CAP_SYS_RESOURCE, so no process may lower its OOM score.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true

  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [{plugins}]
    conf_dir = {conf_dir}

  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"

    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        Root = {runc}
"#,
        nri = quoted(directory.join("nri.sock")),
        nri_plugins = quoted(directory.join("nri")),
        runc = quoted(directory.join("runc")),
        pause = options.pause_image,
        plugins = quoted(CNI_PLUGINS),
        conf_dir = quoted(network.conf_dir()),
        certificates = quoted(certificates),
        snapshotter = options.snapshotter.name(),
    )
}
