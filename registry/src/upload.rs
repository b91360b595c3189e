//! Pushing blobs: not what is there already, by mount from a sister repository, else in one streamed PUT.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use http::{Method, StatusCode};
use reqwest::{Body, RequestBuilder, Response};
use tokio::io::AsyncReadExt;
use url::Url;

use crate::auth::Scope;
use crate::client::Client;
use crate::digest::Digest;
use crate::endpoint::Endpoint;
use crate::error::{Error, Fault};
use crate::exchange::{Ask, Payload};
use crate::limits::{COMMIT_TIMEOUT, UPLOAD_CHUNK_BYTES};
use crate::reference::Reference;

/// Told the number of bytes of each piece that went out.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

/// A blob to push. It must be readable again for a retry, hence bytes or a file and not a reader.
#[derive(Debug, Clone)]
pub enum Upload {
    /// A small blob in memory.
    Bytes(Bytes),
    /// A file of exactly the blob's bytes.
    File(PathBuf),
}

/// How a blob got where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uploaded {
    /// It was there.
    Existed,
    /// It was sent.
    Sent,
}

impl Client {
    /// Makes the repository of `image` have the blob.
    pub async fn push_blob(
        &self,
        image: &Reference,
        digest: &Digest,
        size: u64,
        content: Upload,
        progress: Option<Progress>,
    ) -> Result<Uploaded, Error> {
        if self.blob_exists(image, digest).await? {
            return Ok(Uploaded::Existed);
        }
        let endpoint = self.endpoint(image)?;
        let asked = format!("push of blob {digest} to {}", image.repository());
        let payload = match content {
            Upload::Bytes(bytes) => Payload::Bytes(bytes),
            Upload::File(path) => Payload::File(FileBody { path, size, progress }),
        };
        let mut attempt = 0;
        loop {
            // An upload address is good for one try: a retry starts with a new one.
            let fault = match self.push_once(&endpoint, image, digest, &payload, &asked).await {
                Ok(uploaded) => return Ok(uploaded),
                Err(fault) => fault,
            };
            self.pause(&mut attempt, self.retry().attempts, fault)
                .await
                .map_err(|fault| fault.at(&endpoint.name, &asked))?;
        }
    }

    /// Asks the registry to take the blob from `from`; `false` means that it has to be sent.
    pub async fn mount_blob(&self, image: &Reference, digest: &Digest, from: &Reference) -> Result<bool, Error> {
        if from.host() != image.host() {
            return Ok(false);
        }
        if self.blob_exists(image, digest).await? {
            return Ok(true);
        }
        let endpoint = self.endpoint(image)?;
        let asked = format!(
            "mount of blob {digest} from {} to {}",
            from.repository(),
            image.repository()
        );
        match self.start_upload(&endpoint, image, digest, Some(from), &asked).await {
            Ok(session) => Ok(session.is_none()),
            // A registry that does not let this login read the other repository is no reason to give up.
            Err(Fault::Denied { .. } | Fault::Unauthorized { .. } | Fault::NotFound { .. } | Fault::Token { .. }) => {
                Ok(false)
            }
            Err(fault) => Err(fault.at(&endpoint.name, asked)),
        }
    }

    async fn push_once(
        &self,
        endpoint: &Endpoint,
        image: &Reference,
        digest: &Digest,
        payload: &Payload,
        asked: &str,
    ) -> Result<Uploaded, Fault> {
        // A registry is free to find the blob elsewhere by itself.
        let Some(mut url) = self.start_upload(endpoint, image, digest, None, asked).await? else {
            return Ok(Uploaded::Existed);
        };
        url.query_pairs_mut().append_pair("digest", digest.as_str());
        let mut ask = Ask::new(
            Method::PUT,
            url,
            Scope::push(&endpoint.repository(image)),
            asked.to_owned(),
        )
        .header(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
        .header(CONTENT_LENGTH, HeaderValue::from(payload.len()));
        ask.payload = payload.clone();
        self.send_once(endpoint, &ask).await.map(|_| Uploaded::Sent)
    }

    /// Opens an upload; `None` if the blob was mounted instead.
    async fn start_upload(
        &self,
        endpoint: &Endpoint,
        image: &Reference,
        digest: &Digest,
        mount_from: Option<&Reference>,
        asked: &str,
    ) -> Result<Option<Url>, Fault> {
        let mut url = endpoint.url(image, "blobs/uploads/")?;
        if let Some(from) = mount_from {
            url.query_pairs_mut()
                .append_pair("mount", digest.as_str())
                .append_pair("from", from.repository());
        }
        let scope = Scope::push(&endpoint.repository(image));
        let scope = mount_from
            .iter()
            .fold(scope, |scope, from| scope.and_pull(&endpoint.repository(from)));
        let ask =
            Ask::new(Method::POST, url, scope, asked.to_owned()).header(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let answer = self.send_once(endpoint, &ask).await?;
        if answer.response.status() == StatusCode::CREATED {
            return Ok(None);
        }
        // The blob goes there: an https registry does not get to send it over the wire in the clear.
        self.redirect_target(&answer.response, &answer.url).map(Some)
    }
}

impl Payload {
    fn len(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(file) => file.size,
        }
    }
}

/// A file as a request body.
#[derive(Clone)]
pub(crate) struct FileBody {
    path: PathBuf,
    size: u64,
    progress: Option<Progress>,
}

impl fmt::Debug for FileBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileBody({}, {} bytes)", self.path.display(), self.size)
    }
}

/// What the body of a running upload tells its watcher.
#[derive(Default)]
struct Sent {
    bytes: AtomicU64,
    all: AtomicBool,
    failed: Mutex<Option<std::io::Error>>,
}

impl FileBody {
    /// Sends the request with the file as its body and waits for the head of the answer. The wait is bounded by
    /// progress while bytes go out, then by [`COMMIT_TIMEOUT`].
    pub(crate) async fn send(&self, request: RequestBuilder, idle: Duration) -> Result<Response, Fault> {
        let file_error = |source| Fault::File {
            path: self.path.display().to_string(),
            source,
        };
        let file = tokio::fs::File::open(&self.path).await.map_err(file_error)?;
        let sent = Arc::new(Sent::default());
        let answer = request.body(self.body(file, Arc::clone(&sent))).send();
        let result = tokio::select! {
            result = answer => result,
            fault = watch(&sent, idle) => return Err(fault),
        };
        match sent.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(file_error(error)),
            None => result.map_err(Fault::broken),
        }
    }

    fn body(&self, file: tokio::fs::File, sent: Arc<Sent>) -> Body {
        // One byte more than announced is enough to notice that the file has grown.
        let file = file.take(self.size.saturating_add(1));
        let (size, progress) = (self.size, self.progress.clone());
        Body::wrap_stream(futures_util::stream::try_unfold(file, move |mut file| {
            let (sent, progress) = (Arc::clone(&sent), progress.clone());
            async move {
                let mut piece = BytesMut::with_capacity(UPLOAD_CHUNK_BYTES);
                let read = file.read_buf(&mut piece).await;
                let so_far = sent.bytes.load(Ordering::Relaxed) + piece.len() as u64;
                let read = read.and_then(|read| match read {
                    0 if so_far < size => Err(std::io::Error::other(format!(
                        "file ends after {so_far} of {size} bytes"
                    ))),
                    _ if so_far > size => Err(std::io::Error::other(format!("file has more than {size} bytes"))),
                    read => Ok(read),
                });
                match read {
                    Ok(read) => {
                        sent.bytes.store(so_far, Ordering::Relaxed);
                        sent.all.store(so_far == size, Ordering::Relaxed);
                        if let Some(progress) = progress.filter(|_| read > 0) {
                            progress(read as u64);
                        }
                        Ok((read > 0).then(|| (piece.freeze(), file)))
                    }
                    Err(error) => {
                        let told = std::io::Error::new(error.kind(), error.to_string());
                        *sent.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        Err(told)
                    }
                }
            }
        }))
    }
}

/// Ends when an upload has stalled.
async fn watch(sent: &Sent, idle: Duration) -> Fault {
    let mut seen = 0;
    loop {
        if sent.all.load(Ordering::Relaxed) {
            tokio::time::sleep(COMMIT_TIMEOUT).await;
            return Fault::Stalled(COMMIT_TIMEOUT);
        }
        tokio::time::sleep(idle).await;
        let now = sent.bytes.load(Ordering::Relaxed);
        if now == seen && !sent.all.load(Ordering::Relaxed) {
            return Fault::Stalled(idle);
        }
        seen = now;
    }
}
