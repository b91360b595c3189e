//! The control API in front of [`Warmer`] and [`Explainer`]: translation and the table of statuses. Nothing is decided here.

use std::pin::Pin;
use std::time::Duration;

use estargz::digest::Digest;
use futures_util::{Stream, stream};
use hullspeed_daemon::error::chain;
use hullspeed_proto::hullspeed::control::v1 as api;
use hullspeed_registry::{Keeping, Login, Place, PlaceError, Reference};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use crate::explain::{ExplainError, Explainer};
use crate::layer::layers::inspector::{Inspector, VerifyError, Verifying};
use crate::layer::layers::warming::{
    LayerReport, LayerState, Share, WarmError, WarmReport, WarmRequest, Warmer, Warming,
};
use crate::layer::platform::Platform;
use crate::layer::source::SourceError;

mod view;

/// How long a login is kept after its last use if its giver does not say.
const DEFAULT_HELD: Duration = Duration::from_secs(12 * 3600);

/// The server for tonic.
pub struct Control {
    warmer: Option<Warmer>,
    explainer: Explainer,
    stopping: CancellationToken,
}

impl Control {
    /// Serves `warmer` (none where no layer is lazy) and `explainer` until `stopping`.
    pub fn new(warmer: Option<Warmer>, explainer: Explainer, stopping: CancellationToken) -> Self {
        Self {
            warmer,
            explainer,
            stopping,
        }
    }

    fn warmer(&self) -> Result<&Warmer, Status> {
        self.warmer.as_ref().ok_or_else(no_lazy_layers)
    }

    async fn usage(&self) -> Result<api::CacheUsageResponse, Status> {
        let usage = self.explainer.usage().await.map_err(|error| explain_status(&error))?;
        Ok(view::usage(usage, self.explainer.space()))
    }
}

fn no_lazy_layers() -> Status {
    Status::failed_precondition("lazy layers are switched off in the configuration")
}

fn explain_status(error: &ExplainError) -> Status {
    let code = match error {
        ExplainError::Subject { .. } => Code::InvalidArgument,
        ExplainError::Unknown { .. } => Code::NotFound,
        ExplainError::Snapshots(_) => Code::Internal,
    };
    Status::new(code, chain(error))
}

fn verify_status(error: &VerifyError) -> Status {
    let code = match error {
        VerifyError::Busy => Code::ResourceExhausted,
        VerifyError::NotFound { .. } => Code::NotFound,
        VerifyError::Stopping => Code::Unavailable,
    };
    Status::new(code, chain(error))
}

/// A digest of a message; none where the text is absent.
fn digest(field: &str, text: &str) -> Result<Option<Digest>, Status> {
    let bad = |_| Status::invalid_argument(format!("{field} is not sha256:<64 hex digits>"));
    (!text.is_empty()).then(|| text.parse().map_err(bad)).transpose()
}

fn stopping() -> Status {
    Status::unavailable("the snapshotter is stopping")
}

fn warm_request(request: api::WarmRequest) -> Result<WarmRequest, Status> {
    let share = match request.share() {
        api::Share::Unspecified | api::Share::Toc => Share::Toc,
        api::Share::Hot => Share::Hot,
        api::Share::All => Share::All,
    };
    // What `share()` takes for the default may be a share of another version.
    if api::Share::try_from(request.share).is_err() {
        return Err(Status::invalid_argument(format!("share {} is unknown", request.share)));
    }
    let api::WarmRequest {
        image,
        manifest_digest,
        share: _,
        platform,
    } = request;
    let manifest = digest("manifest_digest", &manifest_digest)?;
    let platform = match platform.as_str() {
        "" => Platform::own(),
        platform => platform
            .parse()
            .map_err(|error| Status::invalid_argument(chain(&error)))?,
    };
    Ok(WarmRequest {
        image,
        manifest,
        share,
        platform,
    })
}

fn warm_status(error: &WarmError) -> Status {
    let code = match error {
        WarmError::Reference(_) => Code::InvalidArgument,
        WarmError::Busy => Code::ResourceExhausted,
        WarmError::Stopping => Code::Unavailable,
        WarmError::Manifest { source, .. } => match &**source {
            SourceError::Transient { .. } => Code::Unavailable,
            SourceError::Permanent { class, .. } => match *class {
                "auth" => Code::Unauthenticated,
                "not_found" => Code::NotFound,
                "reference" => Code::InvalidArgument,
                _ => Code::Internal,
            },
        },
    };
    Status::new(code, chain(error))
}

fn to_progress(report: WarmReport) -> api::WarmProgress {
    let WarmReport { manifest, layers, done } = report;
    let sum = |bytes: fn(&LayerReport) -> u64| layers.iter().map(bytes).fold(0, u64::saturating_add);
    api::WarmProgress {
        manifest_digest: manifest.to_string(),
        bytes_wanted: sum(|layer| layer.extent.wanted),
        bytes_resident: sum(|layer| layer.extent.resident),
        layers: layers.into_iter().map(to_layer).collect(),
        done,
    }
}

fn to_layer(report: LayerReport) -> api::LayerProgress {
    use api::layer_progress::State;
    let state = match report.state {
        LayerState::Waiting => State::Waiting,
        LayerState::Opening => State::Opening,
        LayerState::Fetching => State::Fetching,
        LayerState::Resident => State::Resident,
        LayerState::NotLazy => State::NotLazy,
        LayerState::Failed => State::Failed,
    };
    let (reason, error) = report.problem.unwrap_or_default();
    api::LayerProgress {
        digest: report.digest.to_string(),
        toc_digest: report.toc_digest.map(|digest| digest.to_string()).unwrap_or_default(),
        blob_bytes: report.blob_bytes,
        state: state.into(),
        bytes_wanted: report.extent.wanted,
        bytes_resident: report.extent.resident,
        reason: reason.to_owned(),
        error,
    }
}

/// The place that a message names, as an image or as a prefix.
enum Named {
    Image(String),
    Prefix(String),
}

fn place(named: Option<Named>) -> Result<Place, Status> {
    match named {
        Some(Named::Image(image)) => match Reference::parse(&image) {
            Ok(image) => Ok(Place::of(&image)),
            Err(error) => Err(Status::invalid_argument(chain(&error))),
        },
        Some(Named::Prefix(prefix)) => Place::prefix(&prefix).map_err(|error| place_status(&error)),
        None => Err(Status::invalid_argument("neither an image nor a prefix is given")),
    }
}

fn place_status(error: &PlaceError) -> Status {
    Status::invalid_argument(chain(error))
}

/// The login of a message, by the same order of precedence as containerd's.
fn login(request: &mut api::SetCredentialsRequest) -> Result<Login, Status> {
    let take = |text: &mut String| Some(std::mem::take(text)).filter(|text| !text.is_empty());
    if let Some(username) = take(&mut request.username) {
        let password = std::mem::take(&mut request.password);
        return Ok(Login::Basic { username, password });
    }
    if let Some(token) = take(&mut request.identity_token) {
        return Ok(Login::IdentityToken(token));
    }
    if let Some(auth) = take(&mut request.auth) {
        return Login::from_base64(&auth).map_err(|error| place_status(&error));
    }
    let token = take(&mut request.registry_token).map(Login::RegistryToken);
    token.ok_or_else(|| Status::invalid_argument("no login is given"))
}

type ProgressStream = Pin<Box<dyn Stream<Item = Result<api::WarmProgress, Status>> + Send>>;

/// A warm as messages. The work stops with the stream.
fn progress(warming: Warming, stop: CancellationToken) -> ProgressStream {
    Box::pin(stream::unfold(Some((warming, stop)), |under_way| async move {
        let (mut warming, stop) = under_way?;
        match stop.run_until_cancelled(warming.next()).await {
            Some(Some(report)) => Some((Ok(to_progress(report)), Some((warming, stop)))),
            Some(None) => None,
            // A stream that went on would hold up the stop.
            None => Some((Err(stopping()), None)),
        }
    }))
}

type VerifyStream = Pin<Box<dyn Stream<Item = Result<api::VerifyCacheProgress, Status>> + Send>>;

/// A verification as messages. The work stops with the stream.
fn verification(verifying: Verifying, stop: CancellationToken) -> VerifyStream {
    Box::pin(stream::unfold(Some((verifying, stop)), |under_way| async move {
        let (mut verifying, stop) = under_way?;
        match stop.run_until_cancelled(verifying.next()).await {
            Some(Some(report)) => Some((Ok(view::verified(report)), Some((verifying, stop)))),
            Some(None) => None,
            None => Some((Err(stopping()), None)),
        }
    }))
}

#[tonic::async_trait]
impl api::snapshotter_control_server::SnapshotterControl for Control {
    type WarmStream = ProgressStream;

    async fn warm(&self, request: Request<api::WarmRequest>) -> Result<Response<Self::WarmStream>, Status> {
        let warmer = self.warmer()?;
        let request = warm_request(request.into_inner())?;
        let (image, share) = (request.image.clone(), request.share);
        let begun = self.stopping.run_until_cancelled(warmer.warm(request)).await;
        let warming = begun.ok_or_else(stopping)?.map_err(|error| warm_status(&error))?;
        tracing::debug!(image, ?share, "warming an image");
        Ok(Response::new(progress(warming, self.stopping.clone())))
    }

    async fn set_credentials(
        &self,
        request: Request<api::SetCredentialsRequest>,
    ) -> Result<Response<api::SetCredentialsResponse>, Status> {
        use api::set_credentials_request::{Place, Standing};
        let warmer = self.warmer()?;
        let mut request = request.into_inner();
        let place = place(request.place.take().map(|place| match place {
            Place::Image(image) => Named::Image(image),
            Place::Prefix(prefix) => Named::Prefix(prefix),
        }))?;
        place
            .check_registry(&request.registry)
            .map_err(|error| place_status(&error))?;
        let standing = Standing::try_from(request.standing)
            .map_err(|_| Status::invalid_argument(format!("standing {} is unknown", request.standing)))?;
        let login = login(&mut request)?;
        let keeping = match request.ttl_seconds {
            0 => Keeping::WhileUsed(DEFAULT_HELD),
            seconds => Keeping::For(Duration::from_secs(seconds)),
        };
        tracing::debug!(%place, ?standing, "a login was handed over");
        let held = warmer.handed_over();
        let taken = match standing {
            Standing::Confirmed => held.set(place, login, keeping),
            Standing::Tentative => held.try_out(place, login),
            Standing::Withdrawn => {
                held.withdraw(&place, &login);
                Ok(())
            }
        };
        taken.map_err(|error| place_status(&error))?;
        Ok(Response::new(api::SetCredentialsResponse {}))
    }

    async fn forget_credentials(
        &self,
        request: Request<api::ForgetCredentialsRequest>,
    ) -> Result<Response<api::ForgetCredentialsResponse>, Status> {
        use api::forget_credentials_request::Place;
        let warmer = self.warmer()?;
        let place = place(request.into_inner().place.map(|place| match place {
            Place::Image(image) => Named::Image(image),
            Place::Prefix(prefix) => Named::Prefix(prefix),
        }))?;
        let forgotten = warmer.handed_over().forget(&place);
        Ok(Response::new(api::ForgetCredentialsResponse {
            forgotten: view::count(forgotten),
        }))
    }

    async fn status(&self, _: Request<api::StatusRequest>) -> Result<Response<api::StatusResponse>, Status> {
        let of = |number: fn(&Warmer) -> usize| self.warmer.as_ref().map_or(0, |warmer| view::count(number(warmer)));
        let own = api::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            lazy: self.warmer.is_some(),
            warms: of(Warmer::warms),
            credentials: of(|warmer| warmer.handed_over().len()),
            root: self.explainer.config().root.display().to_string(),
            cache: Some(self.usage().await?),
            ..api::StatusResponse::default()
        };
        Ok(Response::new(view::status(own, self.explainer.overview())))
    }

    async fn diagnose(&self, _: Request<api::DiagnoseRequest>) -> Result<Response<api::DiagnoseResponse>, Status> {
        let configured = self.explainer.config().layers.mount.name();
        let mounts = self.explainer.inspector().map(Inspector::mounts);
        Ok(Response::new(view::diagnosis(configured, mounts)))
    }

    async fn explain(&self, request: Request<api::ExplainRequest>) -> Result<Response<api::ExplainResponse>, Status> {
        let explained = self.explainer.explain(&request.get_ref().subject).await;
        let (found, more) = explained.map_err(|error| explain_status(&error))?;
        Ok(Response::new(view::explained(found, more)))
    }

    async fn list_layers(
        &self,
        request: Request<api::ListLayersRequest>,
    ) -> Result<Response<api::ListLayersResponse>, Status> {
        let api::ListLayersRequest { after, limit } = request.into_inner();
        let limit = if limit == 0 { usize::MAX } else { limit as usize };
        let listed = self.explainer.list(digest("after", &after)?, limit).await;
        let listed = listed.map_err(|error| explain_status(&error))?;
        Ok(Response::new(view::listing(listed)))
    }

    async fn cache_usage(
        &self,
        _: Request<api::CacheUsageRequest>,
    ) -> Result<Response<api::CacheUsageResponse>, Status> {
        Ok(Response::new(self.usage().await?))
    }

    async fn prune_cache(
        &self,
        request: Request<api::PruneCacheRequest>,
    ) -> Result<Response<api::PruneCacheResponse>, Status> {
        let api::PruneCacheRequest { all_unused } = request.into_inner();
        let inspector = self.explainer.inspector().ok_or_else(no_lazy_layers)?;
        let pruning = inspector.prune(all_unused);
        let pruned = self.stopping.run_until_cancelled(pruning).await.ok_or_else(stopping)?;
        tracing::info!(
            all_unused,
            layers = pruned.layers,
            bytes = pruned.bytes,
            "the operator pruned the cache"
        );
        Ok(Response::new(api::PruneCacheResponse {
            layers: view::count(pruned.layers),
            bytes: pruned.bytes,
            failed: view::count(pruned.failed),
        }))
    }

    type VerifyCacheStream = VerifyStream;

    async fn verify_cache(
        &self,
        request: Request<api::VerifyCacheRequest>,
    ) -> Result<Response<Self::VerifyCacheStream>, Status> {
        let layer = digest("layer", &request.get_ref().layer)?;
        let inspector = self.explainer.inspector().ok_or_else(no_lazy_layers)?;
        let begun = self.stopping.run_until_cancelled(inspector.verify(layer)).await;
        let verifying = begun.ok_or_else(stopping)?.map_err(|error| verify_status(&error))?;
        tracing::info!(?layer, "the operator verifies the cache");
        Ok(Response::new(verification(verifying, self.stopping.clone())))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::Config;
    use crate::metrics::Metrics;
    use crate::snapshot::no_layers::NoLayers;
    use crate::snapshot::{Service, ServiceOptions};

    fn request(set: impl FnOnce(&mut api::SetCredentialsRequest)) -> api::SetCredentialsRequest {
        let mut request = api::SetCredentialsRequest::default();
        set(&mut request);
        request
    }

    #[test]
    fn logins_are_taken_in_the_documented_order() {
        // echo -n "u:p:w" | base64
        let auth = "dTpwOnc=".to_owned();
        let basic = |username: &str, password: &str| Login::Basic {
            username: username.to_owned(),
            password: password.to_owned(),
        };
        let mut all = request(|all| {
            all.username = "user".to_owned();
            all.password = "secret".to_owned();
            all.identity_token = "identity".to_owned();
            all.auth = auth.clone();
            all.registry_token = "registry".to_owned();
        });
        let shown = format!("{all:?}");
        assert!(!shown.contains("secret") && !shown.contains("registry"), "{shown}");
        for expected in [
            basic("user", "secret"),
            Login::IdentityToken("identity".to_owned()),
            basic("u", "p:w"),
            Login::RegistryToken("registry".to_owned()),
        ] {
            assert_eq!(login(&mut all).unwrap(), expected);
        }
        assert_eq!(login(&mut all).unwrap_err().code(), Code::InvalidArgument);
        let mut bad = request(|bad| bad.auth = "secret!".to_owned());
        assert!(!format!("{:?}", login(&mut bad).unwrap_err()).contains("secret"));
    }

    #[test]
    fn requests_are_checked_before_anything_is_done() {
        let wrong = |set: fn(&mut api::WarmRequest)| {
            let mut request = api::WarmRequest::default();
            set(&mut request);
            warm_request(request).unwrap_err().code()
        };
        for code in [
            wrong(|request| request.share = 9),
            wrong(|request| request.manifest_digest = "sha256:0".to_owned()),
            wrong(|request| request.platform = "linux".to_owned()),
        ] {
            assert_eq!(code, Code::InvalidArgument);
        }
        assert_eq!(warm_request(api::WarmRequest::default()).unwrap().share, Share::Toc);
        assert!(place(None).is_err() && place(Some(Named::Prefix("UPPER".to_owned()))).is_err());
        let image = place(Some(Named::Image("ubuntu:24.04".to_owned())));
        assert_eq!(image.unwrap().to_string(), "docker.io/library/ubuntu");
    }

    #[tokio::test]
    async fn without_lazy_layers_there_is_a_status_and_nothing_else() {
        use api::snapshotter_control_server::SnapshotterControl as _;
        let place = tempfile::tempdir().unwrap();
        let config = Config {
            root: place.path().to_owned(),
            ..Config::default()
        };
        let service = Service::open(ServiceOptions {
            root: config.root.clone(),
            layers: Arc::new(NoLayers),
            metrics: Metrics::unregistered(),
            mount_timeout: Duration::from_secs(1),
            restore_parallelism: 1,
        })
        .unwrap();
        let explainer = Explainer::new(service, None, Arc::new(config));
        let control = Control::new(None, explainer, CancellationToken::new());
        let status = control.status(Request::new(api::StatusRequest {})).await.unwrap();
        let status = status.into_inner();
        assert!(!status.lazy && status.root == place.path().to_str().unwrap());
        assert!(status.cache.unwrap().filesystem_bytes > 0);
        let warm = control.warm(Request::new(api::WarmRequest::default())).await;
        assert_eq!(warm.err().map(|status| status.code()), Some(Code::FailedPrecondition));
        let prune = control
            .prune_cache(Request::new(api::PruneCacheRequest::default()))
            .await;
        assert_eq!(prune.err().map(|status| status.code()), Some(Code::FailedPrecondition));
        let listed = control
            .list_layers(Request::new(api::ListLayersRequest::default()))
            .await;
        assert!(listed.unwrap().into_inner().layers.is_empty());
        for (subject, code) in [("", Code::InvalidArgument), ("nonesuch:1", Code::NotFound)] {
            let request = api::ExplainRequest {
                subject: subject.to_owned(),
            };
            let explained = control.explain(Request::new(request)).await;
            assert_eq!(explained.err().map(|status| status.code()), Some(code), "{subject}");
        }
    }
}
