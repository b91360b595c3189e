//! containerd's snapshots service from a client's side: image snapshots mounted for the tests to look into.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use hullspeed_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use hullspeed_proto::containerd::services::snapshots::v1::{
    Info, ListSnapshotsRequest, RemoveSnapshotRequest, UsageRequest, ViewSnapshotRequest,
};
use hullspeed_proto::containerd::types::Mount;
use sha2::{Digest as _, Sha256};
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status};

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

    /// A read-only view of the committed snapshot `parent`, mounted at `target`.
    pub async fn view(&mut self, key: &str, parent: &str, target: &Path) -> Result<View> {
        let request = ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.into(),
            parent: parent.into(),
            // Without it containerd's garbage collection removes the view as soon as it runs.
            labels: [("containerd.io/gc.root".to_string(), "test".to_string())].into(),
        };
        let answer = self
            .client
            .view(in_namespace(request))
            .await
            .with_context(|| format!("Snapshots View of {parent}"))?;
        let mounts = answer.into_inner().mounts;
        let [mount] = mounts.as_slice() else {
            bail!("a view of {} mounts where one is expected", mounts.len())
        };
        std::fs::create_dir_all(target).with_context(|| format!("cannot create {}", target.display()))?;
        mount_at(mount, target)?;
        Ok(View {
            path: target.into(),
            key: key.into(),
        })
    }

    /// Unmounts a view and removes its snapshot.
    pub async fn remove(&mut self, view: View) -> Result<()> {
        let key = view.key.clone();
        drop(view);
        let request = RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key,
        };
        self.client
            .remove(in_namespace(request))
            .await
            .context("Snapshots Remove")?;
        Ok(())
    }
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
