//! Bearer tokens in front of the registry: 401 with a challenge, a token server at `/token`, tokens that expire.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// Where the token server answers.
pub const TOKEN_PATH: &str = "/token";

/// Tokens remembered; the oldest go first.
const MAX_TOKENS: usize = 1000;

struct Issued {
    token: String,
    until: Instant,
}

/// The token server, and the check at the registry's door.
pub(super) struct TokenServer {
    lifetime: Duration,
    issued: Mutex<(u64, VecDeque<Issued>)>,
}

impl TokenServer {
    pub(super) fn new(lifetime: Duration) -> Self {
        Self {
            lifetime,
            issued: Mutex::default(),
        }
    }

    fn issued(&self) -> std::sync::MutexGuard<'_, (u64, VecDeque<Issued>)> {
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new token for whoever asks.
    pub(super) fn issue(&self) -> Response {
        let mut issued = self.issued();
        let (count, tokens) = &mut *issued;
        *count += 1;
        let token = format!("token-{count}");
        tokens.push_back(Issued {
            token: token.clone(),
            until: Instant::now() + self.lifetime,
        });
        if tokens.len() > MAX_TOKENS {
            tokens.pop_front();
        }
        let body = serde_json::json!({"token": token, "expires_in": self.lifetime.as_secs().max(1)});
        let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        (StatusCode::OK, kind, body.to_string()).into_response()
    }

    /// From now on no token is good that was issued before, whatever lifetime it was promised.
    pub(super) fn revoke(&self) {
        self.issued().1.clear();
    }

    /// The answer to a request that comes without a good token; `None` lets it in.
    pub(super) fn refuse(&self, headers: &HeaderMap, own: SocketAddr) -> Option<Response> {
        let value = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = value.and_then(|value| value.strip_prefix("Bearer "));
        let now = Instant::now();
        let good = |shown: &str| {
            self.issued()
                .1
                .iter()
                .any(|issued| issued.token == shown && now < issued.until)
        };
        if shown.is_some_and(good) {
            return None;
        }
        let challenge = format!("Bearer realm=\"http://{own}{TOKEN_PATH}\",service=\"injected\"");
        let mut response = (StatusCode::UNAUTHORIZED, "a good token is needed\n").into_response();
        if let Ok(value) = HeaderValue::from_str(&challenge) {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
        }
        Some(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_good_until_they_expire_or_are_revoked() {
        let own = SocketAddr::from(([127, 0, 0, 1], 80));
        let shown = |token: &str| HeaderMap::from_iter([(header::AUTHORIZATION, token.parse().unwrap())]);
        let server = TokenServer::new(Duration::from_secs(60));
        let refused = server.refuse(&HeaderMap::new(), own).unwrap();
        assert!(refused.headers().contains_key(header::WWW_AUTHENTICATE));
        assert!(server.refuse(&shown("Bearer token-1"), own).is_some());
        server.issue();
        assert!(server.refuse(&shown("Bearer token-1"), own).is_none());
        assert!(server.refuse(&shown("Basic token-1"), own).is_some());
        server.revoke();
        assert!(server.refuse(&shown("Bearer token-1"), own).is_some());
        let server = TokenServer::new(Duration::ZERO);
        server.issue();
        assert!(server.refuse(&shown("Bearer token-1"), own).is_some());
    }
}
