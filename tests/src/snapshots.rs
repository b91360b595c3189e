//! containerd's snapshots service from a client's side: image snapshots mounted for the tests to look into.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use hullspeed_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use hullspeed_proto::containerd::services::snapshots::v1::{
    Info, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, UsageRequest, ViewSnapshotRequest,
};
use hullspeed_proto::containerd::types::Mount;
use sha2::{Digest as _, Sha256};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// The namespace that CRI uses.
const NAMESPACE: &str = "k8s.io";

/// A client of one snapshotter of a containerd.
#[derive(Debug, Clone)]
pub struct Snapshots {
    client: SnapshotsClient<Channel>,
    snapshotter: String,
}

impl Snapshots {
    /// Connects to containerd, or straight to a snapshotter.
    pub async fn connect(socket: &Path, snapshotter: &str) -> Result<Self> {
        let channel = crate::cri::connect(socket).await?;
        Ok(Self {
            client: SnapshotsClient::new(channel),
            snapshotter: snapshotter.into(),
        })
    }

    /// All snapshots.
    pub async fn list(&mut self) -> Result<Vec<Info>> {
        let request = ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            ..Default::default()
        };
        let mut stream = self
            .client
            .list(in_namespace(request))
            .await
            .context("Snapshots List")?
            .into_inner();
        let mut found = Vec::new();
        while let Some(part) = stream.message().await.context("Snapshots List")? {
            found.extend(part.info);
        }
        Ok(found)
    }

    /// Bytes and inodes of a snapshot.
    pub async fn usage(&mut self, key: &str) -> Result<(i64, i64), Status> {
        let request = UsageRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.into(),
        };
        let usage = self.client.usage(in_namespace(request)).await?.into_inner();
        Ok((usage.size, usage.inodes))
    }

    /// Offers a layer for lazy use, as containerd does before it would pull it: whether the snapshot `target` on `parent`
    /// (empty for none) is there now. If it is not, the layer would have to be unpacked.
    pub async fn offer(&mut self, target: &str, parent: &str, labels: Vec<(String, String)>) -> Result<bool> {
        let key = format!("extract-{target}");
        let named = [("containerd.io/snapshot.ref".to_owned(), target.to_owned())];
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.clone(),
            parent: parent.into(),
            labels: labels.into_iter().chain(named).collect(),
        };
        match self.client.prepare(in_namespace(request)).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(true),
            Err(status) => Err(status).with_context(|| format!("Snapshots Prepare of {target}")),
            Ok(_) => {
                self.remove_key(&key).await?;
                Ok(false)
            }
        }
    }

    /// A read-only view of the committed snapshot `parent`, mounted at `target`.
    pub async fn view(&mut self, key: &str, parent: &str, target: &Path) -> Result<View> {
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.into(),
            parent: parent.into(),
            // Without it containerd's garbage collection removes the view as soon as it runs.
            labels: [("containerd.io/gc.root".to_string(), "test".to_string())].into(),
        };
        let answer = self.client.view(in_namespace(request)).await;
        let answer = answer.with_context(|| format!("Snapshots View of {parent}"))?;
        mounted(&answer.into_inner().mounts, key, target)
    }

    /// What a container gets: a snapshot of its own on the committed snapshot `parent`, mounted at `target`.
    pub async fn container(&mut self, key: &str, parent: &str, target: &Path) -> Result<View> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.into(),
            parent: parent.into(),
            labels: [("containerd.io/gc.root".to_string(), "test".to_string())].into(),
        };
        let answer = self.client.prepare(in_namespace(request)).await;
        let answer = answer.with_context(|| format!("Snapshots Prepare on {parent}"))?;
        mounted(&answer.into_inner().mounts, key, target)
    }

    /// Unmounts a view and removes its snapshot.
    pub async fn remove(&mut self, view: View) -> Result<()> {
        let key = view.key.clone();
        drop(view);
        self.remove_key(&key).await
    }

    /// Removes a snapshot.
    pub async fn remove_key(&mut self, key: &str) -> Result<()> {
        let request = RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.into(),
        };
        self.client
            .remove(in_namespace(request))
            .await
            .context("Snapshots Remove")?;
        Ok(())
    }
}

fn mounted(mounts: &[Mount], key: &str, target: &Path) -> Result<View> {
    let [mount] = mounts else {
        bail!("{} mounts of {key} where one is expected", mounts.len())
    };
    std::fs::create_dir_all(target).with_context(|| format!("cannot create {}", target.display()))?;
    mount_at(mount, target)?;
    Ok(View {
        path: target.into(),
        key: key.into(),
    })
}

fn in_namespace<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("containerd-namespace", MetadataValue::from_static(NAMESPACE));
    request
}

/// A mounted view. Dropping it unmounts.
#[derive(Debug)]
pub struct View {
    path: PathBuf,
    key: String,
}

impl View {
    /// The mount point.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Mounts what a snapshotter answered, with mount(8), as any client would.
pub fn mount_at(mount: &Mount, target: &Path) -> Result<()> {
    let mut command = Command::new("mount");
    if mount.r#type != "bind" {
        command.args(["-t", &mount.r#type]);
    }
    command
        .args(["-o", &mount.options.join(","), "--", &mount.source])
        .arg(target);
    crate::process::output(&mut command)?;
    Ok(())
}

/// The chain id of a stack of layers, from their diff ids, lowest first.
#[must_use]
pub fn chain_id(diff_ids: &[String]) -> String {
    let mut ids = diff_ids.iter();
    let first = ids.next().cloned().unwrap_or_default();
    ids.fold(first, |chain, diff| {
        format!("sha256:{}", hex::encode(Sha256::digest(format!("{chain} {diff}"))))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_of_one_layer_is_its_diff_id_and_order_matters() {
        let (a, b) = ("sha256:aa".to_string(), "sha256:bb".to_string());
        assert_eq!(chain_id(std::slice::from_ref(&a)), a);
        assert_ne!(chain_id(&[a.clone(), b.clone()]), chain_id(&[b, a]));
    }
}
