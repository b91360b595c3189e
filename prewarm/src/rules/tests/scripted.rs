//! A containerd that says what a test scripts: as the upstream of a call, and on a socket for the rules' own questions.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, stream};
use hullspeed_proto::cri::v1::AuthConfig;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};

use super::*;
use crate::adopt::hull::Hull;
use crate::adopt::{HullSource, Miss};
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::relay::{Answer, Api, Call, Failure, Messages, Method, Reply, Rules as _, Upstream};
use crate::rules::events::EventOptions;
use crate::rules::question::Raw;
use crate::rules::{CredentialSink, CriRules, Events, PoolHooks, RuleOptions, Sandboxes};

/// What is said to a method's message.
type Answerer = dyn Fn(&str, &[u8]) -> Result<Vec<u8>, Status> + Send + Sync;

/// A scripted containerd, and everything around the rules, which note what they hear.
pub(super) struct World {
    pub(super) ledger: Ledger,
    pub(super) rules: CriRules,
    pub(super) containerd: Containerd,
    facts: watch::Sender<Option<Arc<Facts>>>,
    pub(super) events: Events,
    /// Messages that reached containerd through a call.
    pub(super) sent: Shared<Vec<Bytes>>,
    /// What the adopter, the pool and the warmer were told.
    pub(super) told: Shared<Vec<String>>,
    answers: Arc<Answerer>,
    _directory: tempfile::TempDir,
}

struct Around(Ledger, Shared<Vec<String>>);

impl Around {
    fn note(&self, what: String) {
        self.1.lock().unwrap().push(what);
    }
}

#[async_trait]
impl Sandboxes for Around {
    async fn run_pod_sandbox(&self, _call: Call) -> Reply {
        self.note("run".into());
        Reply::One(Answer::default())
    }

    fn removed(&self, sandbox_id: &str) {
        self.0.forget(sandbox_id);
        self.note(format!("removed {sandbox_id}"));
    }
}

impl HullSource for Around {
    fn take(&self, _runtime_handler: &str) -> Result<Hull, Miss> {
        Err(Miss::Empty)
    }

    fn discard(&self, _hull: Hull, _why: &'static str) {}

    fn give_back(&self, _hull: Hull) {}

    fn start_begins(&self, _sandbox_id: &str) {}

    fn start_ended(&self, sandbox_id: &str) {
        self.note(format!("started {sandbox_id}"));
    }
}

impl PoolHooks for Around {
    fn flush(&self, reason: &'static str) {
        self.note(format!("flush {reason}"));
    }
}

impl CredentialSink for Around {
    fn seen(&self, image: &str, auth: &AuthConfig) {
        self.note(format!("credentials {image} {}", auth.username));
    }
}

struct Scripted {
    method: String,
    answers: Arc<Answerer>,
    sent: Shared<Vec<Bytes>>,
    items: Mutex<Option<Messages>>,
}

#[async_trait]
impl Upstream for Scripted {
    async fn unary(&self, message: Bytes) -> Result<Answer, Failure> {
        self.sent.lock().unwrap().push(message.clone());
        let answer = (self.answers)(&self.method, &message);
        answer.map(Answer::ours).map_err(|status| Failure::Answered {
            status,
            metadata: http::HeaderMap::new(),
        })
    }

    async fn stream(&self, message: Bytes) -> Result<Messages, Failure> {
        self.sent.lock().unwrap().push(message);
        Ok(self
            .items
            .lock()
            .unwrap()
            .take()
            .unwrap_or_else(|| stream::pending().boxed()))
    }
}

impl World {
    /// A world whose containerd says what `answers` says, to calls and to questions alike.
    pub(super) fn new(answers: impl Fn(&str, &[u8]) -> Result<Vec<u8>, Status> + Send + Sync + 'static) -> Self {
        let answers: Arc<Answerer> = Arc::new(answers);
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("containerd.sock");
        let service = Service(Arc::clone(&answers));
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        let (ledger, containerd) = (ledger(), Containerd::at(&socket));
        let told = Shared::default();
        let around = Arc::new(Around(ledger.clone(), Arc::clone(&told)));
        let facts = watch::Sender::new(None);
        let events = Events::new(EventOptions {
            ledger: ledger.clone(),
            containerd: containerd.clone(),
            facts: facts.subscribe(),
            supply: true,
            metrics: crate::metrics::Metrics::unregistered(),
        });
        let rules = CriRules::new(RuleOptions {
            ledger: ledger.clone(),
            containerd: containerd.clone(),
            sandboxes: around.clone(),
            hulls: around.clone(),
            hooks: around.clone(),
            credentials: around,
            events: events.clone(),
        });
        Self {
            ledger,
            rules,
            containerd,
            facts,
            events,
            sent: Shared::default(),
            told,
            answers,
            _directory: directory,
        }
    }

    /// Calls a method through the rules.
    pub(super) async fn call(&self, method: Method, message: Vec<u8>) -> Reply {
        self.call_with(method, message, None).await
    }

    /// The same, where containerd answers with a stream.
    pub(super) async fn call_with(&self, method: Method, message: Vec<u8>, items: Option<Messages>) -> Reply {
        let upstream = Scripted {
            method: format!("{method:?}"),
            answers: Arc::clone(&self.answers),
            sent: Arc::clone(&self.sent),
            items: Mutex::new(items),
        };
        let call = Call {
            method,
            api: Api::V1,
            message: message.into(),
            upstream: Box::new(upstream),
        };
        assert!(self.rules.wants(method, Api::V1));
        self.rules.call(call).await
    }

    /// The message of an answer.
    pub(super) async fn answer(&self, method: Method, message: Vec<u8>) -> Result<Bytes, Status> {
        match self.call(method, message).await {
            Reply::One(answer) => Ok(answer.message),
            Reply::Failed(failure) => Err(failure.status().clone()),
            Reply::Stream(_) => panic!("a stream"),
        }
    }

    /// containerd's facts become known.
    pub(super) fn learn(&self, facts: Facts) {
        self.facts.send_replace(Some(Arc::new(facts)));
    }

    pub(super) fn last_sent(&self) -> Bytes {
        self.sent.lock().unwrap().last().cloned().unwrap_or_default()
    }
}

/// CRI on a socket.
#[derive(Clone)]
struct Service(Arc<Answerer>);

impl NamedService for Service {
    const NAME: &'static str = "runtime.v1.RuntimeService";
}

impl tower::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let one = One(method, Arc::clone(&self.0));
        Box::pin(async move { Ok(Grpc::new(Raw).unary(one, request).await) })
    }
}

struct One(String, Arc<Answerer>);

impl UnaryService<Bytes> for One {
    type Response = Bytes;
    type Future = Ready<Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let answer = (self.1)(&self.0, &request.into_inner());
        ready(answer.map(|message| Response::new(message.into())))
    }
}
