//! The kubelet's side of CRI: just what it takes to run a pod, with a limit on every call.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hullspeed_proto::cri::v1::image_service_client::ImageServiceClient;
use hullspeed_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use hullspeed_proto::cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerStatusRequest, ContainerStatusResponse, CreateContainerRequest,
    ExecSyncRequest, ExecSyncResponse, Image, ImageFsInfoRequest, ImageFsInfoResponse, ImageSpec, ImageStatusRequest,
    LinuxPodSandboxConfig, ListContainersRequest, ListImagesRequest, ListPodSandboxRequest, PodSandboxConfig,
    PodSandboxMetadata, PodSandboxStatusRequest, PullImageRequest, RemoveContainerRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StatusRequest, StopContainerRequest,
    StopPodSandboxRequest, VersionRequest,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// No call of the experiments may take longer; a real pull over the shaped link takes seconds.
const CALL_LIMIT: Duration = Duration::from_secs(300);

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Seconds between SIGTERM and SIGKILL when a container is stopped.
const STOP_SECONDS: i64 = 1;

/// Connects to a gRPC server on a Unix socket.
pub async fn connect(socket: &Path) -> Result<Channel> {
    let path = socket.to_path_buf();
    // The authority is not used on a Unix socket, but the request line needs one.
    let endpoint = Endpoint::from_static("http://localhost")
        .timeout(CALL_LIMIT)
        .connect_timeout(CONNECT_LIMIT);
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    endpoint
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("cannot connect to {}", socket.display()))
}

/// A pod to run.
#[derive(Debug, Clone)]
pub struct Pod {
    config: PodSandboxConfig,
}

impl Pod {
    /// A pod named `name`, logging below `logs`, in the run's cgroup. CRI wants names unique among live pods.
    #[must_use]
    pub fn new(name: &str, logs: &Path, cgroup: &str) -> Self {
        let metadata = PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "hullspeed".into(),
            attempt: 0,
        };
        let linux = LinuxPodSandboxConfig {
            cgroup_parent: format!("/{cgroup}"),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.into(),
            log_directory: logs.to_string_lossy().into_owned(),
            linux: Some(linux),
            ..Default::default()
        };
        Self { config }
    }

    /// Where the container's output goes.
    #[must_use]
    pub fn log(&self, container: &str) -> PathBuf {
        Path::new(&self.config.log_directory).join(format!("{container}.log"))
    }
}

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec {
        image: image.into(),
        ..Default::default()
    })
}

/// A CRI client.
#[derive(Debug, Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Cri {
    /// Connects to a CRI endpoint.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let channel = connect(socket).await?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()),
            images: ImageServiceClient::new(channel),
        })
    }

    /// The runtime's name and version.
    pub async fn version(&mut self) -> Result<String> {
        let version = self
            .runtime
            .version(VersionRequest::default())
            .await
            .context("CRI Version")?
            .into_inner();
        Ok(format!("{} {}", version.runtime_name, version.runtime_version))
    }

    /// Why the runtime is not ready; `None` when it is.
    pub async fn not_ready(&mut self) -> Result<Option<String>> {
        let status = self
            .runtime
            .status(StatusRequest { verbose: false })
            .await
            .context("CRI Status")?
            .into_inner();
        let conditions = status.status.unwrap_or_default().conditions;
        let failing = conditions.iter().find(|condition| !condition.status);
        Ok(failing.map(|condition| format!("{}: {} {}", condition.r#type, condition.reason, condition.message)))
    }

    /// Pulls an image; returns its id.
    pub async fn pull(&mut self, image: &str) -> Result<String> {
        let request = PullImageRequest {
            image: spec(image),
            ..Default::default()
        };
        let answer = self
            .images
            .pull_image(request)
            .await
            .with_context(|| format!("CRI PullImage {image}"))?;
        Ok(answer.into_inner().image_ref)
    }

    /// What is known of an image.
    pub async fn image(&mut self, image: &str) -> Result<Option<Image>> {
        let request = ImageStatusRequest {
            image: spec(image),
            verbose: false,
        };
        Ok(self
            .images
            .image_status(request)
            .await
            .context("CRI ImageStatus")?
            .into_inner()
            .image)
    }

    /// All images.
    pub async fn images(&mut self) -> Result<Vec<Image>> {
        Ok(self
            .images
            .list_images(ListImagesRequest::default())
            .await
            .context("CRI ListImages")?
            .into_inner()
            .images)
    }

    /// Removes an image; containerd removes its snapshots before it answers.
    pub async fn remove_image(&mut self, image: &str) -> Result<()> {
        let request = RemoveImageRequest { image: spec(image) };
        self.images
            .remove_image(request)
            .await
            .with_context(|| format!("CRI RemoveImage {image}"))?;
        Ok(())
    }

    /// Disk use of images.
    pub async fn image_fs_info(&mut self) -> Result<ImageFsInfoResponse> {
        Ok(self
            .images
            .image_fs_info(ImageFsInfoRequest {})
            .await
            .context("CRI ImageFsInfo")?
            .into_inner())
    }

    /// Runs a pod's sandbox; returns its id.
    pub async fn run_sandbox(&mut self, pod: &Pod) -> Result<String> {
        let request = RunPodSandboxRequest {
            config: Some(pod.config.clone()),
            runtime_handler: String::new(),
        };
        Ok(self
            .runtime
            .run_pod_sandbox(request)
            .await
            .context("CRI RunPodSandbox")?
            .into_inner()
            .pod_sandbox_id)
    }

    /// A sandbox's IP address.
    pub async fn sandbox_ip(&mut self, sandbox: &str) -> Result<IpAddr> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: sandbox.into(),
            verbose: false,
        };
        let status = self
            .runtime
            .pod_sandbox_status(request)
            .await
            .context("CRI PodSandboxStatus")?
            .into_inner()
            .status;
        let ip = status
            .and_then(|status| status.network)
            .map(|network| network.ip)
            .unwrap_or_default();
        ip.parse()
            .with_context(|| format!("sandbox {sandbox} has no IP address ({ip:?})"))
    }

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
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: spec(image),
            command: command.iter().map(ToString::to_string).collect(),
            log_path: format!("{name}.log"),
            labels: HashMap::from([("io.kubernetes.container.name".to_string(), name.to_string())]),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
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
        let seconds = i64::try_from(CALL_LIMIT.as_secs()).context("a limit beyond i64")?;
        let cmd = command.iter().map(ToString::to_string).collect();
        let request = ExecSyncRequest {
            container_id: container.into(),
            cmd,
            timeout: seconds,
        };
        Ok(self
            .runtime
            .exec_sync(request)
            .await
            .context("CRI ExecSync")?
            .into_inner())
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

    /// Removes every container and sandbox, then every image, and checks that nothing is left.
    pub async fn remove_everything(&mut self) -> Result<()> {
        let containers = self
            .runtime
            .list_containers(ListContainersRequest::default())
            .await
            .context("CRI ListContainers")?;
        for container in containers.into_inner().containers {
            self.remove_container(&container.id).await?;
        }
        let sandboxes = self
            .runtime
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await
            .context("CRI ListPodSandbox")?;
        for sandbox in sandboxes.into_inner().items {
            self.remove_sandbox(&sandbox.id).await?;
        }
        for image in self.images().await? {
            self.remove_image(&image.id).await?;
        }
        let left = self.images().await?;
        if !left.is_empty() {
            bail!("{} images are left after removal", left.len());
        }
        Ok(())
    }
}
