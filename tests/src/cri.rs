//! The kubelet's side of CRI: just what it takes to run a pod, with a limit on every call.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hullspeed_proto::cri::v1::image_service_client::ImageServiceClient;
use hullspeed_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use hullspeed_proto::cri::v1::{
    Image, ImageFsInfoRequest, ImageFsInfoResponse, ImageSpec, ImageStatusRequest, ListContainersRequest,
    ListImagesRequest, PodSandboxFilter, PullImageRequest, RemoveImageRequest, StatusRequest, VersionRequest,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

mod containers;
mod pod;
mod sandboxes;

pub use containers::container_config;
pub use pod::{Pod, Security};

/// No call of the experiments may take longer; a real pull over the shaped link takes seconds.
const CALL_LIMIT: Duration = Duration::from_secs(300);

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The longest message that is read: what containerd itself sends at most.
const MAX_MESSAGE: usize = 16 << 20;

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
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
        })
    }

    /// Every call of the runtime service, with the status that it answers.
    pub fn runtime(&mut self) -> &mut RuntimeServiceClient<Channel> {
        &mut self.runtime
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
        for sandbox in self.sandboxes(PodSandboxFilter::default()).await? {
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
