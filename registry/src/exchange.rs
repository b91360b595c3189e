//! One request from start to end: authorisation, redirects by hand, re-authentication, retries.
//!
//! Invariants: an `Authorization`, and the headers of `hosts.toml`, are only ever sent to the origin (scheme, host and port) of the
//! host that is asked; https is never
//! left for http on the word of a redirect or of the address of an upload; the number of requests made for one [`Ask`] is bounded.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use http::{Method, StatusCode};
use reqwest::{RequestBuilder, Response};
use url::Url;

use crate::auth::{Authorization, Challenge, Giver, Grant, Scope, Slot};
use crate::body;
use crate::client::Client;
use crate::endpoint::{Endpoint, authority};
use crate::error::{Error, ErrorClass, Fault};
use crate::limits::{MAX_LOGINS_TRIED, MAX_REDIRECTS};
use crate::upload::FileBody;

/// What to ask.
pub(crate) struct Ask {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) scope: Scope,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Payload,
    /// For error messages: "pull of manifest x of a/b".
    pub(crate) asked: String,
}

/// What to send along.
#[derive(Clone)]
pub(crate) enum Payload {
    None,
    Bytes(Bytes),
    File(FileBody),
}

/// An answer and the address that gave it.
pub(crate) struct Answer {
    pub(crate) response: Response,
    pub(crate) url: Url,
}

impl Ask {
    pub(crate) fn new(method: Method, url: Url, scope: Scope, asked: String) -> Self {
        let mut headers = HeaderMap::new();
        // Stored bytes as they are: a transfer coding would change ranges, sizes and digests.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        Self {
            method,
            url,
            scope,
            headers,
            payload: Payload::None,
            asked,
        }
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.append(name, value);
        self
    }
}

impl Client {
    /// Sends until a success, a final fault, or the end of the `attempts`.
    pub(crate) async fn send(&self, endpoint: &Endpoint, ask: &Ask, attempts: u32) -> Result<Answer, Error> {
        let mut attempt = 0;
        loop {
            match self.send_once(endpoint, ask).await {
                Ok(answer) => return Ok(answer),
                Err(fault) => self
                    .pause(&mut attempt, attempts, fault)
                    .await
                    .map_err(|fault| fault.at(&endpoint.name, &ask.asked))?,
            }
        }
    }

    /// Waits before the next attempt, or gives the fault back if there is none.
    pub(crate) async fn pause(&self, attempt: &mut u32, attempts: u32, fault: Fault) -> Result<(), Fault> {
        let policy = self.retry();
        if !fault.is_transient() || *attempt + 1 >= attempts {
            return Err(fault);
        }
        let wait = policy.wait(*attempt, fault.retry_after());
        tracing::debug!(%fault, attempt = *attempt, ?wait, "registry request is tried again");
        *attempt += 1;
        tokio::time::sleep(wait).await;
        Ok(())
    }

    /// Sends once, authenticating as the registry wants it; any status but success is a fault.
    pub(crate) async fn send_once(&self, endpoint: &Endpoint, ask: &Ask) -> Result<Answer, Fault> {
        if !endpoint.is_own(&ask.url) {
            // The final address of a redirected blob, or an upload address elsewhere: no credentials go there.
            return self.judge(self.follow(endpoint, ask, None).await?).await;
        }
        let slot = self.tokens().slot(endpoint.key(), &ask.scope);
        let known = self.known_grant(endpoint, &ask.scope, &slot).await?;
        let answer = self
            .follow(endpoint, ask, known.as_ref().map(|grant| &grant.authorization))
            .await?;
        let status = answer.response.status();
        // Some registries answer 403 to a token that has expired; a token made for this very request is believed.
        if !is_refusal(&answer, endpoint) || (status == StatusCode::FORBIDDEN && known.is_none()) {
            return self.judge(answer).await;
        }
        let challenge = match Challenge::from_headers(answer.response.headers()) {
            Ok(challenge) => challenge,
            Err(fault) if status == StatusCode::UNAUTHORIZED => return Err(fault),
            Err(_) => match self.tokens().challenge(endpoint.key()) {
                Some(challenge) => challenge,
                None => return self.judge(answer).await,
            },
        };
        drop(answer);
        self.tokens().note_challenge(endpoint.key(), &challenge);
        self.send_with_others(endpoint, ask, &slot, &challenge, known).await
    }

    /// Sends with one login after the other, until the registry refuses none. `used` is what it has just refused.
    async fn send_with_others(
        &self,
        endpoint: &Endpoint,
        ask: &Ask,
        slot: &Slot,
        challenge: &Challenge,
        mut used: Option<Grant>,
    ) -> Result<Answer, Fault> {
        // A configured login is read again, and may be another one then.
        let own = used
            .iter()
            .filter(|grant| grant.is_login() && matches!(grant.giver, Giver::HandedOver(_)));
        let mut refused: Vec<Giver> = own.map(|grant| grant.giver).collect();
        let mut first = None;
        // What is handed over meanwhile must not keep this going; the last are the configured ones.
        for _ in 0..=MAX_LOGINS_TRIED + self.credentials().sources() {
            let renewed = self
                .renew(endpoint, &ask.scope, slot, challenge, used.as_ref(), &refused)
                .await;
            let grant = match (renewed, first.take()) {
                (Ok(grant), before) => {
                    first = before;
                    grant
                }
                (Err(fault), Some(before)) if fault.class() == ErrorClass::Auth => return Err(before),
                (Err(fault), _) => return Err(fault),
            };
            let answer = self.follow(endpoint, ask, Some(&grant.authorization)).await?;
            if !is_refusal(&answer, endpoint) {
                return self.judge(answer).await;
            }
            if answer.response.status() == StatusCode::UNAUTHORIZED {
                let mut held = slot.lock().await;
                if held.as_ref().is_some_and(|held| held.issued == grant.issued) {
                    *held = None;
                }
            }
            let fault = match self.judge(answer).await {
                Err(fault) => fault,
                answer => return answer,
            };
            let fault = first.unwrap_or(fault);
            if grant.giver == Giver::Nobody {
                return Err(fault);
            }
            first = Some(fault);
            refused.push(grant.giver);
            used = Some(grant);
        }
        Err(first.unwrap_or_else(|| self.unauthorized(Some("too many were refused"))))
    }

    /// The grant in the slot, made anew if it has expired or if this registry is known to want one.
    async fn known_grant(&self, endpoint: &Endpoint, scope: &Scope, slot: &Slot) -> Result<Option<Grant>, Fault> {
        let mut held = slot.lock().await;
        if let Some(grant) = held.as_ref().filter(|grant| self.is_fresh(endpoint, scope, grant)) {
            return Ok(Some(grant.clone()));
        }
        *held = None;
        if let Some(challenge) = self.tokens().challenge(endpoint.key()) {
            *held = match self.authenticate(endpoint, scope, &challenge, &[], None).await {
                Ok(grant) => Some(grant),
                // Nothing was asked of anybody. The registry wanted a login once, and may do without by now.
                Err(Fault::Unauthorized { .. } | Fault::Credentials(_)) if challenge == Challenge::Basic => None,
                Err(fault) => return Err(fault),
            };
        }
        Ok(held.clone())
    }

    /// A grant newer than `used` and from none of `refused`: another request's renewal, or an own one from scratch.
    async fn renew(
        &self,
        endpoint: &Endpoint,
        scope: &Scope,
        slot: &Slot,
        challenge: &Challenge,
        used: Option<&Grant>,
        refused: &[Giver],
    ) -> Result<Grant, Fault> {
        let mut held = slot.lock().await;
        let newer = |grant: &&Grant| {
            let other = used.is_none_or(|used| grant.issued > used.issued) && !refused.contains(&grant.giver);
            other && self.is_fresh(endpoint, scope, grant)
        };
        if let Some(grant) = held.as_ref().filter(newer) {
            return Ok(grant.clone());
        }
        *held = None;
        let since = used.filter(|used| used.is_login()).map(|used| used.issued);
        let grant = self.authenticate(endpoint, scope, challenge, refused, since).await?;
        *held = Some(grant.clone());
        Ok(grant)
    }

    /// Follows redirects of reads by hand.
    async fn follow(&self, endpoint: &Endpoint, ask: &Ask, auth: Option<&Authorization>) -> Result<Answer, Fault> {
        let mut url = ask.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let request = endpoint
                .http(&url)?
                .request(ask.method.clone(), url.clone())
                .headers(ask.headers.clone());
            let request = endpoint.identify(&url, request, auth);
            let response = match &ask.payload {
                Payload::None => self.head_of(request).await?,
                Payload::Bytes(bytes) => self.head_of(request.body(bytes.clone())).await?,
                Payload::File(file) => file.send(request, self.idle()).await?,
            };
            let read = matches!(ask.method, Method::GET | Method::HEAD);
            if !read || !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer { response, url });
            }
            url = self.redirect_target(&response, &url)?;
        }
        Err(Fault::Redirect(format!("more than {MAX_REDIRECTS} in a row")))
    }

    /// Where an answer sends the next request: never from https to http, loopback and hosts named plain excepted.
    pub(crate) fn redirect_target(&self, response: &Response, from: &Url) -> Result<Url, Fault> {
        let next = location(response, from)?;
        if from.scheme() == "https" && next.scheme() != "https" && !self.is_plain(&authority(&next)) {
            return Err(Fault::Redirect(format!(
                "from https to {} at {}",
                next.scheme(),
                authority(&next)
            )));
        }
        Ok(next)
    }

    /// The head of the answer to a request with a small or no body.
    pub(crate) async fn head_of(&self, request: RequestBuilder) -> Result<Response, Fault> {
        let wait = self.head_wait();
        let sent = tokio::time::timeout(wait, request.send())
            .await
            .map_err(|_| Fault::Stalled(wait))?;
        sent.map_err(Fault::connect)
    }

    /// Turns every status but success into a fault.
    async fn judge(&self, answer: Answer) -> Result<Answer, Fault> {
        let status = answer.response.status();
        if status.is_success() {
            return Ok(answer);
        }
        let seconds = answer
            .response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let retry_after = seconds.map(Duration::from_secs);
        let reason = body::reason(answer.response, self.idle()).await;
        Err(match status {
            StatusCode::UNAUTHORIZED => self.unauthorized(Some("the one given was refused")),
            StatusCode::FORBIDDEN => Fault::Denied { reason },
            StatusCode::NOT_FOUND | StatusCode::GONE => Fault::NotFound { reason },
            StatusCode::TOO_MANY_REQUESTS => Fault::RateLimited { retry_after, reason },
            StatusCode::REQUEST_TIMEOUT => Fault::Server {
                status: 408,
                retry_after,
                reason,
            },
            // What a server does not implement it will not implement a second later.
            status if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => Fault::Server {
                status: status.as_u16(),
                retry_after,
                reason,
            },
            status => Fault::Status {
                status: status.as_u16(),
                reason,
            },
        })
    }
}

/// Whether the registry itself refuses the login, or wants one.
fn is_refusal(answer: &Answer, endpoint: &Endpoint) -> bool {
    let status = answer.response.status();
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) && endpoint.is_own(&answer.url)
}

/// The `Location` of an answer, resolved against the address that gave it.
fn location(response: &Response, from: &Url) -> Result<Url, Fault> {
    let bad = |reason: &str| Fault::Header {
        name: "location",
        reason: reason.to_owned(),
    };
    let value = response.headers().get(LOCATION).ok_or_else(|| bad("missing"))?;
    let text = value.to_str().map_err(|_| bad("not text"))?;
    let mut url = from.join(text).map_err(|_| bad("not a URL"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(bad("not an http address"));
    }
    // A name and password in the address would be sent as credentials.
    let cleared = url.set_username("").and_then(|()| url.set_password(None));
    cleared.map_err(|()| bad("not an http address"))?;
    Ok(url)
}
