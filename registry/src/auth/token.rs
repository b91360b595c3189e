//! Tokens of a registry's token server.

use std::time::{Duration, Instant};

use http::header::CONTENT_TYPE;
use http::{Method, StatusCode};
use reqwest::RequestBuilder;
use url::Url;

use super::{Challenge, Scope};
use crate::body;
use crate::client::Client;
use crate::credentials::Login;
use crate::endpoint::Endpoint;
use crate::error::Fault;
use crate::limits::MAX_TOKEN_BYTES;

/// Lifetime of a token whose server names none (the value of the token specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// Name under which identity tokens are presented.
const CLIENT_ID: &str = "hullspeed";

#[derive(serde::Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Client {
    /// A token, its end and its beginning.
    pub(super) async fn token(
        &self,
        endpoint: &Endpoint,
        scope: &Scope,
        challenge: &Challenge,
        login: Option<Login>,
    ) -> Result<(String, Instant, Instant), Fault> {
        let Challenge::Bearer {
            realm,
            service,
            repository,
        } = challenge
        else {
            return Err(self.unauthorized(None));
        };
        let realm_host = realm.host_str().unwrap_or_default().to_owned();
        let refused = |reason: String| Fault::Token {
            realm: realm_host.clone(),
            reason,
        };
        if realm.scheme() != "https" && (realm.scheme() != "http" || endpoint.origin.scheme() != "http") {
            return Err(refused("its address is not https".to_owned()));
        }
        let anonymous = login.is_none();
        let issued = Instant::now();
        let wanted = scope.wanted(repository.as_deref());
        let request = token_request(endpoint, realm, service.as_deref(), &wanted, login)?;
        let response = self.head_of(request).await?;
        let status = response.status();
        if !status.is_success() {
            let reason = body::reason(response, self.idle()).await;
            return Err(match status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST if anonymous => {
                    self.unauthorized(None)
                }
                StatusCode::TOO_MANY_REQUESTS => Fault::RateLimited {
                    retry_after: None,
                    reason,
                },
                status if status.is_server_error() => Fault::Server {
                    status: status.as_u16(),
                    retry_after: None,
                    reason,
                },
                status => refused(format!("refused with status {}: {reason}", status.as_u16())),
            });
        }
        let bytes = body::collect(response, MAX_TOKEN_BYTES, self.idle()).await?;
        let answer: TokenAnswer =
            serde_json::from_slice(&bytes).map_err(|_| refused("answer is not a token".to_owned()))?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| refused("answer holds no token".to_owned()))?;
        // Used up a little before its end, so that no request starts with a token that dies on the way.
        let lifetime = answer
            .expires_in
            .map_or(DEFAULT_LIFETIME, Duration::from_secs)
            .min(Duration::from_secs(86400));
        let lifetime = lifetime.saturating_sub((lifetime / 5).min(Duration::from_secs(30)));
        Ok((token, issued + lifetime, issued))
    }
}

fn token_request(
    endpoint: &Endpoint,
    realm: &Url,
    service: Option<&str>,
    scopes: &[String],
    login: Option<Login>,
) -> Result<RequestBuilder, Fault> {
    if let Some(Login::IdentityToken(token)) = login {
        let mut form = url::form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "refresh_token")
            .append_pair("client_id", CLIENT_ID);
        form.append_pair("scope", &scopes.join(" "))
            .append_pair("refresh_token", &token);
        if let Some(service) = service {
            form.append_pair("service", service);
        }
        let request = endpoint.http(realm)?.request(Method::POST, realm.clone());
        return Ok(endpoint
            .with_headers(realm, request, true)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(form.finish()));
    }
    let mut url = realm.clone();
    url.query_pairs_mut()
        .extend_pairs(service.map(|service| ("service", service)));
    url.query_pairs_mut()
        .extend_pairs(scopes.iter().map(|scope| ("scope", scope)));
    let request = endpoint.http(&url)?.request(Method::GET, url.clone());
    // What hosts.toml has for the host may be what its token server wants, too.
    let request = endpoint.with_headers(&url, request, login.is_some());
    Ok(match login {
        Some(Login::Basic { username, password }) => request.basic_auth(username, Some(password)),
        _ => request,
    })
}
