//! What can go wrong with a registry, and how callers should react ([`ErrorClass`]).

use std::time::Duration;

use crate::credentials::CredentialError;
use crate::digest::Digest;

/// A request that failed for good.
#[derive(Debug, thiserror::Error)]
#[error("{asked} at {host} failed")]
pub struct Error {
    pub(crate) host: String,
    pub(crate) asked: String,
    #[source]
    pub(crate) fault: Box<Fault>,
}

/// How a caller should react.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Credentials are missing, wrong or insufficient.
    Auth,
    /// The registry does not have it.
    NotFound,
    /// It may work later or elsewhere.
    Transient,
    /// The server broke the protocol or the content is wrong; asking again will not help.
    Protocol,
    /// Something on this machine failed: a file, a configuration, the TLS set-up.
    Local,
}

/// The cause of an [`Error`].
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// 401 that no authentication got past.
    #[error("the registry wants a login ({hint})")]
    Unauthorized {
        /// Where credentials were looked for, or what is wrong with them.
        hint: String,
    },
    /// 403.
    #[error("access denied{}", quoted(.reason))]
    Denied {
        /// The server's words.
        reason: String,
    },
    /// Credentials could not be read.
    #[error("credentials cannot be read")]
    Credentials(#[source] CredentialError),
    /// The token server refused or answered nonsense.
    #[error("token server {realm}: {reason}")]
    Token {
        /// Host of the token server.
        realm: String,
        /// What was wrong.
        reason: String,
    },
    /// 404 or 410.
    #[error("not found{}", quoted(.reason))]
    NotFound {
        /// The server's words.
        reason: String,
    },
    /// 429.
    #[error("too many requests{}", quoted(.reason))]
    RateLimited {
        /// How long the server wants clients to wait.
        retry_after: Option<Duration>,
        /// The server's words.
        reason: String,
    },
    /// 408 or 5xx.
    #[error("status {status}{}", quoted(.reason))]
    Server {
        /// The status.
        status: u16,
        /// How long the server wants clients to wait.
        retry_after: Option<Duration>,
        /// The server's words.
        reason: String,
    },
    /// Any other status that was not asked for.
    #[error("unexpected status {status}{}", quoted(.reason))]
    Status {
        /// The status.
        status: u16,
        /// The server's words.
        reason: String,
    },
    /// No connection, no TLS session, or no HTTP on it.
    #[error("no connection")]
    Connect(#[source] reqwest::Error),
    /// The connection broke while data was moving.
    #[error("connection broke")]
    Broken(#[source] reqwest::Error),
    /// Not a byte moved for too long.
    #[error("no progress for {} s", .0.as_secs_f32())]
    Stalled(Duration),
    /// The body ended early.
    #[error("body ended after {got} of {expected} bytes")]
    Truncated {
        /// Bytes received.
        got: u64,
        /// Bytes announced.
        expected: u64,
    },
    /// The body is larger than allowed or announced.
    #[error("body is larger than {limit} bytes")]
    TooLarge {
        /// The bound.
        limit: u64,
    },
    /// The content is not what was asked for.
    #[error("content has digest {actual}, not {expected}")]
    Digest {
        /// What was asked for.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// The size is not what the descriptor says.
    #[error("size is {actual}, not {expected}")]
    Size {
        /// What was asked for.
        expected: u64,
        /// What was announced.
        actual: u64,
    },
    /// The answer to a range request does not fit it.
    #[error("range {asked}: {reason}")]
    Range {
        /// The range header sent.
        asked: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A redirect that is not followed.
    #[error("redirect refused: {0}")]
    Redirect(String),
    /// A header that is missing or nonsense.
    #[error("header {name}: {reason}")]
    Header {
        /// Its name.
        name: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A local file could not be read.
    #[error("{path} cannot be read")]
    File {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `hosts.toml` leaves nobody to ask.
    #[error("there is no host to ask: {0}")]
    NoHost(&'static str),
    /// The client cannot be set up.
    #[error("HTTP client cannot be set up: {0}")]
    Setup(String),
}

impl Error {
    /// Registry that was asked.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// What was asked of it.
    pub fn asked(&self) -> &str {
        &self.asked
    }

    /// The cause.
    pub fn fault(&self) -> &Fault {
        &self.fault
    }

    /// How to react.
    pub fn class(&self) -> ErrorClass {
        self.fault.class()
    }
}

impl Fault {
    /// How to react.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Unauthorized { .. } | Self::Denied { .. } | Self::Credentials(_) | Self::Token { .. } => {
                ErrorClass::Auth
            }
            Self::NotFound { .. } => ErrorClass::NotFound,
            Self::RateLimited { .. }
            | Self::Server { .. }
            | Self::Connect(_)
            | Self::Broken(_)
            | Self::Stalled(_)
            | Self::Truncated { .. } => ErrorClass::Transient,
            Self::Status { .. }
            | Self::TooLarge { .. }
            | Self::Digest { .. }
            | Self::Size { .. }
            | Self::Range { .. }
            | Self::Redirect(_)
            | Self::Header { .. } => ErrorClass::Protocol,
            Self::File { .. } | Self::NoHost(_) | Self::Setup(_) => ErrorClass::Local,
        }
    }

    pub(crate) fn is_transient(&self) -> bool {
        self.class() == ErrorClass::Transient
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Server { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    pub(crate) fn at(self, host: &str, asked: impl Into<String>) -> Error {
        Error {
            host: host.to_owned(),
            asked: asked.into(),
            fault: Box::new(self),
        }
    }

    /// The fault with its causes, for an error that is given more than once.
    pub(crate) fn into_text(self) -> String {
        let Self::Setup(text) = self else {
            let causes = std::iter::successors(std::error::Error::source(&self), |error| error.source());
            return causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"));
        };
        text
    }

    /// A failure before the first byte of the answer. Addresses are taken out: they may carry signatures.
    pub(crate) fn connect(error: reqwest::Error) -> Self {
        Self::Connect(error.without_url())
    }

    /// A failure while the body was moving.
    pub(crate) fn broken(error: reqwest::Error) -> Self {
        Self::Broken(error.without_url())
    }
}

fn quoted(reason: &str) -> String {
    if reason.is_empty() {
        String::new()
    } else {
        format!(": {reason}")
    }
}
