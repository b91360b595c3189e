//! A relay between a client and a peer that both speak raw HTTP/2 and can do anything.

use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Request, Response};
use hullspeed_prewarm::relay::{Api, Call, Limits, Method, Relay, RelayOptions, Reply, Rules, Watch};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Code;

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Whatever it is, it comes.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it does not come")
}

type Handler = Arc<dyn Fn(Request<RecvStream>, SendResponse<Bytes>) -> BoxFuture<'static, ()> + Send + Sync>;

/// A server in containerd's place. Dropped, its connections break and its socket is gone.
pub(crate) struct Peer {
    task: JoinHandle<()>,
    socket: PathBuf,
    /// Told to all connections: go away gracefully.
    pub(crate) leaving: CancellationToken,
    /// How many connections it has had.
    pub(crate) accepted: Arc<Mutex<usize>>,
}

impl Peer {
    pub(crate) fn start<F, T>(socket: &Path, handler: F) -> Self
    where
        F: Fn(Request<RecvStream>, SendResponse<Bytes>) -> T + Send + Sync + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |request, respond| Box::pin(handler(request, respond)));
        let listener = UnixListener::bind(socket).unwrap();
        let accepted = Arc::new(Mutex::new(0));
        let leaving = CancellationToken::new();
        let task = tokio::spawn(listen(listener, handler, Arc::clone(&accepted), leaving.clone()));
        Self {
            task,
            socket: socket.to_owned(),
            leaving,
            accepted,
        }
    }

    pub(crate) fn accepted(&self) -> usize {
        *self.accepted.lock().unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn listen(listener: UnixListener, handler: Handler, accepted: Arc<Mutex<usize>>, leaving: CancellationToken) {
    // Dropped with this task, and the connections with it.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        *accepted.lock().unwrap() += 1;
        let (handler, leaving) = (Arc::clone(&handler), leaving.clone());
        connections.spawn(async move {
            let mut builder = h2::server::Builder::new();
            builder
                .initial_window_size(1 << 16)
                .max_header_list_size(1 << 20)
                // As patient as servers in Go.
                .max_pending_accept_reset_streams(100_000)
                .max_concurrent_reset_streams(100_000)
                .max_local_error_reset_streams(None);
            let mut connection = builder.handshake::<_, Bytes>(stream).await.unwrap();
            let mut calls = tokio::task::JoinSet::new();
            let mut left = false;
            loop {
                tokio::select! {
                    () = leaving.cancelled(), if !left => { left = true; connection.graceful_shutdown(); }
                    call = connection.accept() => match call {
                        Some(Ok((request, respond))) => { calls.spawn(handler(request, respond)); }
                        _ => break,
                    },
                }
            }
        });
    }
}

/// Rules made of a list and a closure.
pub(crate) struct Rule {
    wanted: Vec<Method>,
    answer: Box<dyn Fn(Call) -> BoxFuture<'static, Reply> + Send + Sync>,
}

impl Rule {
    pub(crate) fn new<F, T>(wanted: &[Method], answer: F) -> Arc<Self>
    where
        F: Fn(Call) -> T + Send + Sync + 'static,
        T: Future<Output = Reply> + Send + 'static,
    {
        Arc::new(Self {
            wanted: wanted.to_vec(),
            answer: Box::new(move |call| Box::pin(answer(call))),
        })
    }

    /// Wants nothing.
    pub(crate) fn none() -> Arc<Self> {
        Self::new(&[], |_| async { unreachable!("no rule wants anything") })
    }

    /// Asks containerd and gives its answer.
    pub(crate) fn forward(wanted: &[Method]) -> Arc<Self> {
        Self::new(
            wanted,
            |call| async move { call.upstream.unary(call.message).await.into() },
        )
    }
}

#[async_trait]
impl Rules for Rule {
    fn wants(&self, method: Method, _api: Api) -> bool {
        self.wanted.contains(&method)
    }

    async fn call(&self, call: Call) -> Reply {
        (self.answer)(call).await
    }
}

/// What was told.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) calls: Mutex<Vec<(&'static str, Code)>>,
    pub(crate) connections: Mutex<Vec<usize>>,
}

impl Watch for Told {
    fn call_ended(&self, method: &'static str, code: Code) {
        self.calls.lock().unwrap().push((method, code));
    }

    fn connections(&self, open: usize) {
        self.connections.lock().unwrap().push(open);
    }
}

/// A relay that runs.
pub(crate) struct Stand {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) told: Arc<Told>,
    pub(crate) stopping: CancellationToken,
    pub(crate) served: JoinHandle<()>,
}

impl Stand {
    pub(crate) fn start(rules: Arc<dyn Rules>) -> Self {
        Self::with(rules, Limits::default(), Duration::from_secs(5))
    }

    pub(crate) fn with(rules: Arc<dyn Rules>, limits: Limits, drain: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let told = Arc::new(Told::default());
        let relay = Relay::new(RelayOptions {
            containerd_socket: directory.path().join("containerd.sock"),
            rules,
            watch: told.clone(),
            limits,
        });
        let listener = UnixListener::bind(directory.path().join("relay.sock")).unwrap();
        let stopping = CancellationToken::new();
        let token = stopping.clone();
        let served = tokio::spawn(async move { relay.serve(listener, token, drain).await });
        Self {
            directory,
            told,
            stopping,
            served,
        }
    }

    pub(crate) fn upstream(&self) -> PathBuf {
        self.directory.path().join("containerd.sock")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("relay.sock")
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.socket()).await
    }

    /// The calls that were told of, once there are as many.
    pub(crate) async fn calls(&self, count: usize) -> Vec<(&'static str, Code)> {
        soon(async {
            loop {
                let calls = self.told.calls.lock().unwrap().clone();
                if calls.len() >= count {
                    return calls;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await
    }
}

/// A raw client. Dropped, its connection breaks.
pub(crate) struct Client {
    pub(crate) requests: SendRequest<Bytes>,
    connection: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// An answer, whole.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) head: http::response::Parts,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Option<HeaderMap>,
}

impl Whole {
    /// The status, wherever it is.
    pub(crate) fn status(&self) -> (i32, String) {
        let headers = self.trailers.as_ref().unwrap_or(&self.head.headers);
        let status = tonic::Status::from_header_map(headers).expect("no grpc-status");
        (status.code() as i32, status.message().to_owned())
    }

    pub(crate) fn is_bare(&self) -> bool {
        self.trailers.is_none() && self.body.is_empty()
    }
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Self {
        Self::with_window(socket, 1 << 16).await
    }

    pub(crate) async fn with_window(socket: &Path, window: u32) -> Self {
        let stream = UnixStream::connect(socket).await.unwrap();
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(window)
            .initial_connection_window_size(16 << 20)
            .max_header_list_size(4 << 20);
        let (requests, connection) = builder.handshake::<_, Bytes>(stream).await.unwrap();
        let connection = tokio::spawn(async move { drop(connection.await) });
        Self { requests, connection }
    }

    pub(crate) async fn begin(
        &self,
        request: Request<()>,
        end: bool,
    ) -> (h2::client::ResponseFuture, SendStream<Bytes>) {
        let mut requests = soon(self.requests.clone().ready()).await.unwrap();
        requests.send_request(request, end).unwrap()
    }

    /// Sends `body` as it is, gives the whole answer.
    pub(crate) async fn call(&self, request: Request<()>, body: impl Into<Bytes>) -> Result<Whole, h2::Error> {
        let (response, mut upload) = self.begin(request, false).await;
        let body = body.into();
        let forth = tokio::spawn(async move { send(&mut upload, body, true).await });
        let whole = soon(async { whole(response.await?).await }).await;
        forth.abort();
        whole
    }
}

pub(crate) async fn whole(response: Response<RecvStream>) -> Result<Whole, h2::Error> {
    let (head, mut stream) = response.into_parts();
    let mut body = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data?;
        stream.flow_control().release_capacity(data.len())?;
        body.extend_from_slice(&data);
    }
    let trailers = stream.trailers().await?;
    Ok(Whole { head, body, trailers })
}

/// Sends as the receiver reads; ends silently when it does not want any more.
pub(crate) async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes, end: bool) -> bool {
    if data.is_empty() {
        return stream.send_data(data, end).is_ok();
    }
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let capacity = match poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(Ok(capacity)) => capacity.min(data.len()),
            _ => return false,
        };
        let part = data.split_to(capacity);
        if stream.send_data(part, end && data.is_empty()).is_err() {
            return false;
        }
    }
    true
}

pub(crate) async fn read_all(body: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut all = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        all.extend_from_slice(&data);
    }
    Ok(all)
}

/// A gRPC request's head.
pub(crate) fn grpc(path: &str) -> Request<()> {
    Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

/// A message in its frame.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap().to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

pub(crate) fn ok_head() -> Response<()> {
    Response::builder()
        .header("content-type", "application/grpc")
        .body(())
        .unwrap()
}

pub(crate) fn trailers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| {
            (
                http::HeaderName::from_static(name),
                HeaderValue::from_str(value).unwrap(),
            )
        })
        .collect()
}

/// Answers with one message and status 0.
pub(crate) async fn answer(mut respond: SendResponse<Bytes>, message: &[u8]) {
    let Ok(mut stream) = respond.send_response(ok_head(), false) else {
        return;
    };
    if send(&mut stream, framed(message).into(), false).await {
        let _ = stream.send_trailers(trailers(&[("grpc-status", "0")]));
    }
    // Whoever reads slowly still gets it.
    let _ = poll_fn(|cx| stream.poll_reset(cx)).await;
}

/// Things that happen, told in order.
pub(crate) struct Events<T>(pub(crate) UnboundedSender<T>);

impl<T> Clone for Events<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Events<T> {
    pub(crate) fn new() -> (Self, UnboundedReceiver<T>) {
        let (sender, receiver) = unbounded_channel();
        (Self(sender), receiver)
    }

    pub(crate) fn tell(&self, event: T) {
        let _ = self.0.send(event);
    }
}

/// Waits until a stream is reset.
pub(crate) async fn reset_of(stream: &mut SendStream<Bytes>) -> Result<Reason, h2::Error> {
    poll_fn(|cx| stream.poll_reset(cx)).await
}

/// Tells that something is over, however it ended.
pub(crate) struct Over<T: Clone>(pub(crate) Events<T>, pub(crate) T);

impl<T: Clone> Drop for Over<T> {
    fn drop(&mut self) {
        self.0.tell(self.1.clone());
    }
}
