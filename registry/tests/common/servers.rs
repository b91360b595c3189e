//! Servers for the tests: the real docker-registry, and one whose every answer a test decides.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test file uses its part")]

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use hullspeed_registry::{Client, ClientOptions, Credentials, Error, Login, Reference, RetryPolicy};

/// A user of the registries that [`Registry::start`] starts with a login.
pub const USER: &str = "hull";
/// Their password.
pub const PASSWORD: &str = "pw";
/// bcrypt of the password.
const HTPASSWD: &str = "hull:$2b$05$aaaaaaaaaaaaaaaaaaaaaOscpG3LiIv8VbJ.Xo.NYfhRB9T5lwoHC\n";

/// Debian's docker-registry on a free port.
pub struct Registry {
    pub host: String,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Registry {
    pub fn start(with_login: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Self::start_at(dir, address, with_login, "")
    }

    pub fn start_at(dir: tempfile::TempDir, address: SocketAddr, with_login: bool, http: &str) -> Self {
        let config = dir.path().join("config.yml");
        std::fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
        let auth = if with_login {
            format!(
                "auth: {{htpasswd: {{realm: test, path: {}/htpasswd}}}}\n",
                dir.path().display()
            )
        } else {
            String::new()
        };
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\n{auth}storage: {{filesystem: {{rootdirectory: {}/data}}}}\nhttp:\n  addr: {address}\n{http}",
            dir.path().display()
        );
        std::fs::write(&config, text).unwrap();
        let child = spawn(&config);
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self {
            host: address.to_string(),
            child,
            _dir: dir,
        }
    }
}

fn spawn(config: &Path) -> Child {
    let mut command = Command::new("docker-registry");
    command
        .arg("serve")
        .arg(config)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
        .spawn()
        .expect("docker-registry is installed (apt-get install docker-registry)")
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One request as the server saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub uri: String,
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
    /// A header of the tests' own.
    pub extra: Option<String>,
    pub body: Bytes,
}

/// A server on loopback that answers with a closure and remembers what it was asked.
pub struct Scripted {
    pub host: String,
    pub seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Scripted {
    pub async fn start(answer: impl Fn(&Seen) -> Response + Clone + Send + Sync + 'static) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let handler = move |request: Request| {
            let (log, answer) = (Arc::clone(&log), answer.clone());
            async move {
                let (parts, body) = request.into_parts();
                let header = |name: &str| parts.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
                let record = Seen {
                    method: parts.method.to_string(),
                    uri: parts.uri.to_string(),
                    path: parts.uri.path().to_owned(),
                    authorization: header("authorization"),
                    range: header("range"),
                    extra: header("x-extra"),
                    body: axum::body::to_bytes(body, 64 << 20).await.unwrap_or_default(),
                };
                log.lock().unwrap().push(record.clone());
                answer(&record)
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let app = axum::Router::new().fallback(handler);
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { host, seen, task }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn count(&self, path_part: &str) -> usize {
        self.seen().iter().filter(|seen| seen.uri.contains(path_part)).count()
    }

    pub fn image(&self, repository: &str) -> Reference {
        Reference::parse(&format!("{}/{repository}:t", self.host)).unwrap()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An answer with a status, headers and a body of known size.
pub fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response {
    let builder = Response::builder().status(status);
    let builder = headers
        .iter()
        .fold(builder, |builder, (name, value)| builder.header(*name, *value));
    builder.body(body.into()).unwrap()
}

/// A 206 (or 200 without a range) of `content`, as a good server gives it.
pub fn serve_range(content: &Bytes, range: Option<&str>) -> Response {
    let Some(range) = range.and_then(|range| range.strip_prefix("bytes=")) else {
        return answer(200, &[], content.clone());
    };
    let (first, last) = range.split_once('-').unwrap();
    let size = content.len();
    let (start, end) = match first {
        "" => (size.saturating_sub(last.parse().unwrap()), size),
        first => (first.parse().unwrap(), (last.parse::<usize>().unwrap() + 1).min(size)),
    };
    let content_range = format!("bytes {start}-{}/{size}", end - 1);
    answer(206, &[("content-range", &content_range)], content.slice(start..end))
}

/// A body that announces `length` bytes, sends `part` and then breaks the connection.
pub fn broken(status: u16, headers: &[(&str, &str)], part: Bytes, length: usize) -> Response {
    let pieces = [Ok(part), Err(std::io::Error::other("cut"))];
    let stream = futures_util::StreamExt::then(futures_util::stream::iter(pieces), |piece| async {
        // The cut must not overtake the bytes before it.
        if piece.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        piece
    });
    let length = length.to_string();
    let headers: Vec<_> = headers
        .iter()
        .copied()
        .chain([("content-length", length.as_str())])
        .collect();
    answer(status, &headers, Body::from_stream(stream))
}

pub fn client(host: &str, password: Option<&str>) -> Client {
    let login = |password: &str| Login::Basic {
        username: USER.to_owned(),
        password: password.to_owned(),
    };
    let credentials = match password {
        Some(password) => Credentials::anonymous().with_login(host, login(password)),
        None => Credentials::anonymous(),
    };
    let retry = RetryPolicy {
        attempts: 4,
        first: Duration::from_millis(5),
        longest: Duration::from_millis(20),
    };
    let idle_timeout = Duration::from_millis(700);
    Client::new(ClientOptions {
        credentials,
        retry,
        idle_timeout,
        ..ClientOptions::default()
    })
    .unwrap()
}

/// The whole chain of an error, as a log line would have it.
pub fn text(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Bytes in which every position can be told from its neighbours.
pub fn content(size: usize) -> Bytes {
    (0..size)
        .map(|n| u8::try_from((n * 31 + n / 251) % 256).unwrap())
        .collect()
}
