//! Hands the credentials of pulls to the snapshotter, so that it can read the image's layers.
//!
//! A pull does not wait for it: containerd asks its registry for manifest and configuration before it asks the snapshotter for the
//! first layer, and the way over the socket is shorter than that. A login goes over as tentative when the pull begins, and is confirmed or
//! withdrawn when it ends: only then it is known whether it is good. Messages go one after the other, in order. Logins are in
//! memory until their pull has ended, and nowhere else: no log line, error or metric has them. A snapshotter that is not there, or serves
//! no layer lazily, has no use for them, so that is counted and not complained about.

use std::sync::Arc;
use std::time::Duration;

use hullspeed_proto::cri::v1::AuthConfig;
use hullspeed_proto::hullspeed::control::v1 as api;
use hullspeed_proto::hullspeed::control::v1::set_credentials_request::{Place, Standing};
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request};

use crate::metrics::Metrics;
use crate::metrics::defs::ResultLabels;
use crate::rules::CredentialSink;
use crate::snapshotter::Snapshotter;
use crate::warm::seen::SeenImages;

/// Logins that wait for their turn; a pull that meets more goes without.
const MAX_WAITING: usize = 256;
/// Bytes of all of them together.
const MAX_WAITING_BYTES: usize = 4 << 20;
/// Longest part of a login that is passed on; the snapshotter takes no longer one.
const MAX_SECRET: usize = 64 << 10;
/// Longest name of an image or a registry that is passed on; no reference is as long.
const MAX_NAME: usize = 2048;
/// Longest that one login may keep the next waiting.
const LIMIT: Duration = Duration::from_secs(1);

/// Takes what [`crate::rules`] sees in pulls. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HandOver {
    waiting: Option<mpsc::Sender<Waiting>>,
    room: Arc<Semaphore>,
    images: SeenImages,
    metrics: Metrics,
}

/// A message that waits for its turn, and its part of [`MAX_WAITING_BYTES`].
struct Waiting {
    request: Box<api::SetCredentialsRequest>,
    _room: OwnedSemaphorePermit,
}

/// A pull under way whose login was seen. Dropped before it [succeeded](Self::succeeded), it has failed.
pub struct SeenPull {
    sink: Arc<dyn CredentialSink>,
    image: String,
    auth: AuthConfig,
    succeeded: bool,
}

impl SeenPull {
    /// Tells `sink` of a pull that begins.
    #[must_use]
    pub fn begin(sink: Arc<dyn CredentialSink>, image: String, auth: AuthConfig) -> Self {
        sink.seen(&image, &auth);
        Self {
            sink,
            image,
            auth,
            succeeded: false,
        }
    }

    /// The pull is over, and all went well.
    pub fn succeeded(mut self) {
        self.succeeded = true;
    }
}

impl Drop for SeenPull {
    fn drop(&mut self) {
        self.sink.settled(&self.image, &self.auth, self.succeeded);
    }
}

/// Passes the logins on, while it runs.
pub struct HandOvers {
    waiting: mpsc::Receiver<Waiting>,
    snapshotter: Snapshotter,
    metrics: Metrics,
}

impl HandOver {
    /// What takes logins, and what passes them on to `snapshotter`. Names of images go to `images`.
    #[must_use]
    pub fn new(snapshotter: Snapshotter, images: SeenImages, metrics: Metrics) -> (Self, HandOvers) {
        let (sender, waiting) = mpsc::channel(MAX_WAITING);
        let taker = Self {
            waiting: Some(sender),
            room: Arc::new(Semaphore::new(MAX_WAITING_BYTES)),
            images,
            metrics: metrics.clone(),
        };
        let passer = HandOvers {
            waiting,
            snapshotter,
            metrics,
        };
        (taker, passer)
    }

    /// Takes names of images only, where the configuration keeps logins from the snapshotter.
    #[must_use]
    pub fn names_only(images: SeenImages, metrics: Metrics) -> Self {
        Self {
            waiting: None,
            room: Arc::new(Semaphore::new(0)),
            images,
            metrics,
        }
    }
}

impl HandOver {
    fn pass(&self, image: &str, auth: &AuthConfig, standing: Standing) {
        let Some(waiting) = &self.waiting else { return };
        if is_empty(auth) {
            return;
        }
        let entry = fits(image, auth)
            .then(|| request(image, auth, standing))
            .and_then(|request| {
                let bytes = u32::try_from(request.encoded_len()).ok()?;
                let room = self.room.clone().try_acquire_many_owned(bytes).ok()?;
                Some(Waiting { request, _room: room })
            });
        if entry.is_none_or(|entry| waiting.try_send(entry).is_err()) {
            count(&self.metrics, "dropped");
        }
    }
}

impl CredentialSink for HandOver {
    fn seen(&self, image: &str, auth: &AuthConfig) {
        self.images.add(image);
        self.pass(image, auth, Standing::Tentative);
    }

    fn settled(&self, image: &str, auth: &AuthConfig, succeeded: bool) {
        let standing = if succeeded {
            Standing::Confirmed
        } else {
            Standing::Withdrawn
        };
        self.pass(image, auth, standing);
    }
}

/// Whether a pull has no login.
fn is_empty(auth: &AuthConfig) -> bool {
    let secrets = [&auth.username, &auth.auth, &auth.identity_token, &auth.registry_token];
    secrets.iter().all(|secret| secret.is_empty())
}

/// Whether a login is within the limits, each part of it.
fn fits(image: &str, auth: &AuthConfig) -> bool {
    let AuthConfig {
        username,
        password,
        auth,
        server_address,
        identity_token,
        registry_token,
    } = auth;
    let secrets = [username, password, auth, identity_token, registry_token];
    secrets.iter().all(|secret| secret.len() <= MAX_SECRET)
        && server_address.len() <= MAX_NAME
        && image.len() <= MAX_NAME
}

/// A login as a message.
fn request(image: &str, auth: &AuthConfig, standing: Standing) -> Box<api::SetCredentialsRequest> {
    Box::new(api::SetCredentialsRequest {
        place: Some(Place::Image(image.to_owned())),
        registry: auth.server_address.clone(),
        username: auth.username.clone(),
        password: auth.password.clone(),
        auth: auth.auth.clone(),
        identity_token: auth.identity_token.clone(),
        registry_token: auth.registry_token.clone(),
        ttl_seconds: 0,
        standing: standing.into(),
    })
}

impl HandOvers {
    /// Passes logins on until `stopping`.
    pub async fn run(mut self, stopping: CancellationToken) {
        let passing = async {
            while let Some(Waiting { request, _room }) = self.waiting.recv().await {
                self.pass(request).await;
            }
        };
        stopping.run_until_cancelled(passing).await;
    }

    async fn pass(&self, request: Box<api::SetCredentialsRequest>) {
        let image = match &request.place {
            Some(Place::Image(image)) => image.clone(),
            Some(Place::Prefix(_)) | None => String::new(),
        };
        let is_first = request.standing() == Standing::Tentative;
        let mut request = Request::new(*request);
        request.set_timeout(LIMIT);
        let mut control = self.snapshotter.control();
        let result = match tokio::time::timeout(LIMIT, control.set_credentials(request)).await {
            Ok(Ok(_)) => "ok",
            Ok(Err(status)) => match status.code() {
                // No snapshotter, none of ours, or one without lazy layers.
                Code::Unavailable | Code::Unimplemented | Code::FailedPrecondition => "unavailable",
                code => {
                    // Its message tells what is wrong and never quotes a secret.
                    tracing::warn!(
                        image,
                        ?code,
                        why = status.message(),
                        "the snapshotter does not take a pull's login"
                    );
                    "refused"
                }
            },
            Err(_) => "unavailable",
        };
        tracing::debug!(image, result, "a pull's login was handed over");
        // A login counts once, not again at the end of its pull.
        if is_first {
            count(&self.metrics, result);
        }
    }
}

fn count(metrics: &Metrics, result: &'static str) {
    metrics.warm_credentials.get_or_create(&ResultLabels { result }).inc();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth() -> AuthConfig {
        AuthConfig {
            username: "user".to_owned(),
            password: "secret".to_owned(),
            server_address: "r.io".to_owned(),
            ..AuthConfig::default()
        }
    }

    fn counted(metrics: &Metrics, result: &'static str) -> u64 {
        metrics.warm_credentials.get_or_create(&ResultLabels { result }).get()
    }

    #[tokio::test]
    async fn without_a_snapshotter_a_pull_is_not_held_up_and_there_is_a_bound() {
        let metrics = Metrics::unregistered();
        let images = SeenImages::default();
        let snapshotter = Snapshotter::at(Path::new("/nonexistent/snapshotter.sock"));
        let (taker, passer) = HandOver::new(snapshotter, images.clone(), metrics.clone());
        for _ in 0..MAX_WAITING + 3 {
            taker.seen("r.io/x:1", &auth());
        }
        taker.seen("r.io/public:1", &AuthConfig::default());
        assert_eq!(counted(&metrics, "dropped"), 3);
        assert_eq!(images.names(), ["r.io/public:1", "r.io/x:1"]);
        let stopping = CancellationToken::new();
        let running = tokio::spawn(passer.run(stopping.clone()));
        let all = u64::try_from(MAX_WAITING).unwrap();
        while counted(&metrics, "unavailable") < all {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        stopping.cancel();
        running.await.unwrap();
        assert!(!format!("{:?} {taker:?}", request("r.io/x:1", &auth(), Standing::Tentative)).contains("secret"));
        HandOver::names_only(images, metrics.clone()).seen("r.io/y", &auth());
        assert_eq!(counted(&metrics, "dropped"), 3);
    }

    #[tokio::test]
    async fn logins_that_nobody_takes_are_not_kept_and_bytes_are_bounded() {
        let metrics = Metrics::unregistered();
        let snapshotter = Snapshotter::at(Path::new("/nonexistent/snapshotter.sock"));
        let (taker, mut passer) = HandOver::new(snapshotter, SeenImages::default(), metrics.clone());
        let long = |length: usize| AuthConfig {
            password: "s".repeat(length),
            ..auth()
        };
        taker.seen("r.io/x:1", &long(MAX_SECRET + 1));
        taker.seen(&"x".repeat(MAX_NAME + 1), &auth());
        assert_eq!(counted(&metrics, "dropped"), 2);
        for _ in 0..MAX_WAITING {
            taker.seen("r.io/x:1", &long(MAX_SECRET));
        }
        let kept = MAX_WAITING_BYTES / (MAX_SECRET + 64);
        let dropped = u64::try_from(MAX_WAITING - kept).unwrap();
        assert_eq!(counted(&metrics, "dropped"), 2 + dropped);
        // What is passed on makes room.
        drop(passer.waiting.recv().await);
        taker.seen("r.io/x:1", &long(MAX_SECRET));
        assert_eq!(counted(&metrics, "dropped"), 2 + dropped);
    }

    #[tokio::test]
    async fn a_pull_is_confirmed_if_it_succeeds_and_withdrawn_if_not() {
        let snapshotter = Snapshotter::at(Path::new("/nonexistent/snapshotter.sock"));
        let (taker, mut passer) = HandOver::new(snapshotter, SeenImages::default(), Metrics::unregistered());
        let begin = || SeenPull::begin(Arc::new(taker.clone()), "r.io/x:1".to_owned(), auth());
        begin().succeeded();
        drop(begin());
        for expected in [
            Standing::Tentative,
            Standing::Confirmed,
            Standing::Tentative,
            Standing::Withdrawn,
        ] {
            let request = passer.waiting.recv().await.unwrap().request;
            assert_eq!(request.standing(), expected);
            assert_eq!(request.password, "secret");
        }
    }

    use std::path::Path;
}
