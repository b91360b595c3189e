//! Calls about sandboxes.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hullspeed_proto::cri::v1::{
    ContainerEventResponse, GetEventsRequest, ListPodSandboxRequest, PodSandbox, PodSandboxFilter,
    PodSandboxStatusRequest, PodSandboxStatusResponse, PortForwardRequest, RemovePodSandboxRequest,
    StopPodSandboxRequest,
};
use tonic::Streaming;

use super::{Cri, Pod};

/// No test listens longer.
const EVENTS_LIMIT: Duration = Duration::from_secs(600);

impl Cri {
    /// Runs a pod's sandbox; returns its id.
    pub async fn run_sandbox(&mut self, pod: &Pod) -> Result<String> {
        Ok(self
            .runtime
            .run_pod_sandbox(pod.request())
            .await
            .context("CRI RunPodSandbox")?
            .into_inner()
            .pod_sandbox_id)
    }

    /// A sandbox's state, with the runtime's own details as JSON texts.
    pub async fn sandbox(&mut self, sandbox: &str) -> Result<PodSandboxStatusResponse> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: sandbox.into(),
            verbose: true,
        };
        Ok(self
            .runtime
            .pod_sandbox_status(request)
            .await
            .context("CRI PodSandboxStatus")?
            .into_inner())
    }

    /// A sandbox's IP address.
    pub async fn sandbox_ip(&mut self, sandbox: &str) -> Result<IpAddr> {
        let status = self.sandbox(sandbox).await?.status;
        let ip = status
            .and_then(|status| status.network)
            .map(|network| network.ip)
            .unwrap_or_default();
        ip.parse()
            .with_context(|| format!("sandbox {sandbox} has no IP address ({ip:?})"))
    }

    /// The sandboxes that a filter lets through.
    pub async fn sandboxes(&mut self, filter: PodSandboxFilter) -> Result<Vec<PodSandbox>> {
        let request = ListPodSandboxRequest { filter: Some(filter) };
        Ok(self
            .runtime
            .list_pod_sandbox(request)
            .await
            .context("CRI ListPodSandbox")?
            .into_inner()
            .items)
    }

    /// The stream of events of sandboxes and containers, from now on.
    pub async fn events(&mut self) -> Result<Streaming<ContainerEventResponse>> {
        // The limit on calls is for answers that end.
        let mut request = tonic::Request::new(GetEventsRequest {});
        request.set_timeout(EVENTS_LIMIT);
        Ok(self
            .runtime
            .get_container_events(request)
            .await
            .context("CRI GetContainerEvents")?
            .into_inner())
    }

    /// Where the runtime forwards connections to ports of a sandbox.
    pub async fn port_forward(&mut self, sandbox: &str, ports: &[i32]) -> Result<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: sandbox.into(),
            port: ports.to_vec(),
        };
        Ok(self
            .runtime
            .port_forward(request)
            .await
            .context("CRI PortForward")?
            .into_inner()
            .url)
    }

    /// Stops and removes a sandbox with its containers.
    pub async fn remove_sandbox(&mut self, sandbox: &str) -> Result<()> {
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: sandbox.into(),
        };
        self.runtime
            .stop_pod_sandbox(stop)
            .await
            .context("CRI StopPodSandbox")?;
        let remove = RemovePodSandboxRequest {
            pod_sandbox_id: sandbox.into(),
        };
        self.runtime
            .remove_pod_sandbox(remove)
            .await
            .context("CRI RemovePodSandbox")?;
        Ok(())
    }
}
