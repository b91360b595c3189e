//! Calls about containers.

use std::collections::HashMap;

use anyhow::{Context as _, Result};
use hullspeed_proto::cri::v1::{
    AttachRequest, ContainerConfig, ContainerMetadata, ContainerStatusRequest, ContainerStatusResponse,
    CreateContainerRequest, ExecRequest, ExecSyncRequest, ExecSyncResponse, RemoveContainerRequest,
    StartContainerRequest, StopContainerRequest,
};

use super::{Cri, Pod, spec};

/// Seconds between SIGTERM and SIGKILL when a container is stopped.
const STOP_SECONDS: i64 = 1;

/// Seconds that a command in a container may take.
const EXEC_SECONDS: i64 = 60;

/// A container of `image`, run as the image says unless `command` is not empty, logging to `<name>.log`.
#[must_use]
pub fn container_config(name: &str, image: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.into(),
            attempt: 0,
        }),
        image: spec(image),
        command: command.iter().map(ToString::to_string).collect(),
        log_path: format!("{name}.log"),
        labels: HashMap::from([("io.kubernetes.container.name".to_string(), name.to_string())]),
        ..Default::default()
    }
}

impl Cri {
    /// Creates a container of `image` in a sandbox, run as the image says; returns its id.
    pub async fn create_container(&mut self, sandbox: &str, pod: &Pod, name: &str, image: &str) -> Result<String> {
        self.create_container_with(sandbox, pod, name, image, &[]).await
    }

    /// As [`Self::create_container`], with another command unless `command` is empty.
    pub async fn create_container_with(
        &mut self,
        sandbox: &str,
        pod: &Pod,
        name: &str,
        image: &str,
        command: &[&str],
    ) -> Result<String> {
        let config = container_config(name, image, command);
        self.create_container_from(sandbox, pod, config).await
    }

    /// Creates a container as `config` says.
    pub async fn create_container_from(&mut self, sandbox: &str, pod: &Pod, config: ContainerConfig) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: Some(pod.config().clone()),
        };
        Ok(self
            .runtime
            .create_container(request)
            .await
            .context("CRI CreateContainer")?
            .into_inner()
            .container_id)
    }

    /// Starts a container.
    pub async fn start_container(&mut self, container: &str) -> Result<()> {
        let request = StartContainerRequest {
            container_id: container.into(),
        };
        self.runtime
            .start_container(request)
            .await
            .context("CRI StartContainer")?;
        Ok(())
    }

    /// A container's state, with the runtime's own details.
    pub async fn container(&mut self, container: &str) -> Result<ContainerStatusResponse> {
        let request = ContainerStatusRequest {
            container_id: container.into(),
            verbose: true,
        };
        Ok(self
            .runtime
            .container_status(request)
            .await
            .context("CRI ContainerStatus")?
            .into_inner())
    }

    /// Runs a command in a container to its end.
    pub async fn exec(&mut self, container: &str, command: &[&str]) -> Result<ExecSyncResponse> {
        let cmd = command.iter().map(ToString::to_string).collect();
        let request = ExecSyncRequest {
            container_id: container.into(),
            cmd,
            timeout: EXEC_SECONDS,
        };
        Ok(self
            .runtime
            .exec_sync(request)
            .await
            .context("CRI ExecSync")?
            .into_inner())
    }

    /// Where the runtime streams a command's standard streams.
    pub async fn exec_url(&mut self, container: &str, command: &[&str]) -> Result<String> {
        let request = ExecRequest {
            container_id: container.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            stdout: true,
            ..Default::default()
        };
        Ok(self.runtime.exec(request).await.context("CRI Exec")?.into_inner().url)
    }

    /// Where the runtime streams a container's own standard output.
    pub async fn attach_url(&mut self, container: &str) -> Result<String> {
        let request = AttachRequest {
            container_id: container.into(),
            stdout: true,
            ..Default::default()
        };
        Ok(self
            .runtime
            .attach(request)
            .await
            .context("CRI Attach")?
            .into_inner()
            .url)
    }

    /// Stops and removes a container.
    pub async fn remove_container(&mut self, container: &str) -> Result<()> {
        let stop = StopContainerRequest {
            container_id: container.into(),
            timeout: STOP_SECONDS,
        };
        self.runtime.stop_container(stop).await.context("CRI StopContainer")?;
        let remove = RemoveContainerRequest {
            container_id: container.into(),
        };
        self.runtime
            .remove_container(remove)
            .await
            .context("CRI RemoveContainer")?;
        Ok(())
    }
}
