//! Hands the credentials of pulls to the snapshotter, so that it can read the image's layers.
//!
//! A pull does not wait for it: containerd asks its registry for manifest and configuration before it asks the snapshotter for the
//! first layer, and the way over the socket is shorter than that. Logins go one after the other, so that the newest is the one that
//! stays. They are in memory between the two calls, and nowhere else: no log line, error or metric has them. A snapshotter that
//! is not there, or serves no layer lazily, has no use for them, so that is counted and not complained about.

use std::time::Duration;

use hullspeed_proto::cri::v1::AuthConfig;
use hullspeed_proto::hullspeed::control::v1 as api;
use hullspeed_proto::hullspeed::control::v1::set_credentials_request::Place;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request};

use crate::metrics::Metrics;
use crate::metrics::defs::ResultLabels;
use crate::rules::CredentialSink;
use crate::snapshotter::Snapshotter;
use crate::warm::seen::SeenImages;

/// Logins that wait for their turn; a pull that meets more goes without.
const MAX_WAITING: usize = 256;
/// Longest that one login may keep the next waiting.
const LIMIT: Duration = Duration::from_secs(1);

/// Takes what [`crate::rules`] sees in pulls. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HandOver {
    waiting: Option<mpsc::Sender<Box<api::SetCredentialsRequest>>>,
    images: SeenImages,
    metrics: Metrics,
}

/// Passes the logins on, while it runs.
pub struct HandOvers {
    waiting: mpsc::Receiver<Box<api::SetCredentialsRequest>>,
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
            images,
            metrics,
        }
    }
}

impl CredentialSink for HandOver {
    fn seen(&self, image: &str, auth: &AuthConfig) {
        self.images.add(image);
        let Some(waiting) = &self.waiting else { return };
        let Some(request) = request(image, auth) else { return };
        if waiting.try_send(request).is_err() {
            count(&self.metrics, "dropped");
        }
    }
}

/// A login as a message; none if the pull has none.
fn request(image: &str, auth: &AuthConfig) -> Option<Box<api::SetCredentialsRequest>> {
    let secrets = [&auth.username, &auth.auth, &auth.identity_token, &auth.registry_token];
    if secrets.iter().all(|secret| secret.is_empty()) {
        return None;
    }
    Some(Box::new(api::SetCredentialsRequest {
        place: Some(Place::Image(image.to_owned())),
        registry: auth.server_address.clone(),
        username: auth.username.clone(),
        password: auth.password.clone(),
        auth: auth.auth.clone(),
        identity_token: auth.identity_token.clone(),
        registry_token: auth.registry_token.clone(),
        ttl_seconds: 0,
    }))
}

impl HandOvers {
    /// Passes logins on until `stopping`.
    pub async fn run(mut self, stopping: CancellationToken) {
        let passing = async {
            while let Some(request) = self.waiting.recv().await {
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
        count(&self.metrics, result);
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
        assert!(!format!("{:?} {taker:?}", request("r.io/x:1", &auth())).contains("secret"));
        HandOver::names_only(images, metrics.clone()).seen("r.io/y", &auth());
        assert_eq!(counted(&metrics, "dropped"), 3);
    }

    use std::path::Path;
}
