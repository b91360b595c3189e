//! Every bound of this crate in one place.

use std::time::Duration;

/// Largest manifest or index that is read (the distribution specification asks registries to accept this much).
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Largest answer of a token server.
pub const MAX_TOKEN_BYTES: u64 = 1 << 20;
/// Part of an error body that is read to quote the server's reason.
pub const MAX_ERROR_BYTES: u64 = 8 << 10;
/// Longest reason quoted from a server.
pub const MAX_REASON_CHARS: usize = 200;
/// Largest docker configuration file.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Largest file of certificate authorities; the whole public list takes a twentieth of it.
pub const MAX_CA_FILE_BYTES: u64 = 4 << 20;
/// Redirects followed for one request.
pub const MAX_REDIRECTS: usize = 5;
/// Token slots kept; beyond it the unused ones are dropped.
pub const MAX_TOKENS: usize = 512;
/// Final addresses of redirected blobs kept; beyond it the oldest are dropped.
pub const MAX_URLS: usize = 4096;
/// Longest wait that a `Retry-After` can impose.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// Default time to open a connection, TLS included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Default time without a single byte after which a transfer counts as stalled.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time a registry has to store an upload whose last byte it has received.
pub const COMMIT_TIMEOUT: Duration = Duration::from_secs(300);
/// Time a credential helper has.
pub const HELPER_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest answer of a credential helper.
pub const MAX_HELPER_ANSWER: u64 = 1 << 20;
/// Credential helpers that run at once.
pub const MAX_HELPERS: usize = 8;
/// Piece size in which an upload is read from its file.
pub const UPLOAD_CHUNK_BYTES: usize = 256 << 10;
/// Logins kept that were handed over at run time; beyond it the oldest is dropped.
pub const MAX_HANDED_OVER: usize = 1024;
/// Confirmed logins kept for one place: the newest, and the one before it for when the newest is refused.
pub const MAX_CONFIRMED_OF_PLACE: usize = 2;
/// Tentative logins kept for one place; beyond it the oldest is dropped.
pub const MAX_TENTATIVE_OF_PLACE: usize = 4;
/// How long a login is tentative if nobody says how its pull ended.
pub const TENTATIVE_HELD: Duration = Duration::from_secs(3600);
/// Logins handed over that are tried for one request, before the configured one.
pub const MAX_LOGINS_TRIED: usize = 8;
/// Longest part of a login that is taken; tokens of clouds have a few KiB.
pub const MAX_SECRET_BYTES: usize = 64 << 10;
/// Longest time that a login handed over is kept.
pub const MAX_HELD: Duration = Duration::from_secs(24 * 3600);
/// Largest `hosts.toml`.
pub const MAX_HOSTS_FILE_BYTES: u64 = 1 << 20;
/// Hosts that one `hosts.toml` may list.
pub const MAX_HOSTS: usize = 32;
/// Files of authorities, or of client certificates, that one host may have.
pub const MAX_HOST_FILES: usize = 32;
/// Headers that one host may have.
pub const MAX_HOST_HEADERS: usize = 32;
/// Registries whose hosts are kept; beyond it the one that was not asked for the longest is read again when it is.
pub const MAX_REGISTRIES: usize = 512;
/// How long what is known of a registry's hosts is used before its files are looked at again.
pub const HOSTS_CHECKED: Duration = Duration::from_secs(1);
/// How long a host that failed is asked after the others, at first; it doubles with each failure.
pub const HOST_AVOIDED: Duration = Duration::from_secs(1);
/// Longest time that a host that failed is asked after the others.
pub const HOST_AVOIDED_MOST: Duration = Duration::from_secs(60);
/// Largest file of logins.
pub const MAX_LOGINS_BYTES: u64 = 1 << 20;
/// Largest configuration of the kubelet's credential providers.
pub const MAX_PROVIDERS_BYTES: u64 = 1 << 20;
/// Credential providers that are used; the kubelet's own configurations have a few.
pub const MAX_PROVIDERS: usize = 64;
/// Largest answer of a credential provider.
pub const MAX_PROVIDER_ANSWER: u64 = 1 << 20;
/// Time that a credential provider has; the kubelet's value.
pub const PROVIDER_TIMEOUT: Duration = Duration::from_secs(60);
/// Answers of credential providers kept.
pub const MAX_PROVIDER_ANSWERS: usize = 256;
/// A login of a credential provider that a registry refused is asked for again unless it is younger than this.
pub const PROVIDER_ASKED_AGAIN: Duration = Duration::from_secs(10);
