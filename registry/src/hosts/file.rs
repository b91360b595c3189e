//! The text of a `hosts.toml`: which hosts are asked for the images of one registry, in which order, and how.
//!
//! The format and its rules are containerd's. Keys that it does not know are left alone, as containerd leaves them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use toml::de::{DeTable, DeValue};
use url::Url;

use crate::duration;
use crate::limits::{MAX_HOST_FILES, MAX_HOST_HEADERS, MAX_HOSTS};

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// What is named by a digest.
    pub(crate) pull: bool,
    /// Which digest a tag means.
    pub(crate) resolve: bool,
    /// To store something.
    pub(crate) push: bool,
}

impl Capabilities {
    pub(crate) const ALL: Self = Self {
        pull: true,
        resolve: true,
        push: true,
    };
    const NONE: Self = Self {
        pull: false,
        resolve: false,
        push: false,
    };

    /// Whether a host may be asked for all that another one may.
    pub(crate) fn contains(self, other: Self) -> bool {
        (self.pull || !other.pull) && (self.resolve || !other.resolve) && (self.push || !other.push)
    }
}

/// One host of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostEntry {
    /// The API's root, ending in a slash; none for the registry itself.
    pub(crate) api: Option<Url>,
    pub(crate) capabilities: Capabilities,
    pub(crate) tls: TlsFiles,
    pub(crate) headers: HeaderMap,
    /// Limit on connecting, where the file sets one.
    pub(crate) dial_timeout: Option<Duration>,
}

/// The files that TLS with a host takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    /// Authorities besides the system's.
    pub(crate) authorities: Vec<PathBuf>,
    /// Client certificates, each with its key if that has a file of its own.
    pub(crate) identities: Vec<(PathBuf, Option<PathBuf>)>,
    /// Whether any certificate will do.
    pub(crate) skip_verify: bool,
}

impl TlsFiles {
    pub(crate) fn is_empty(&self) -> bool {
        self.authorities.is_empty() && self.identities.is_empty() && !self.skip_verify
    }
}

impl HostEntry {
    /// The registry itself, as it is without any file.
    pub(crate) fn registry() -> Self {
        Self {
            api: None,
            capabilities: Capabilities::ALL,
            tls: TlsFiles::default(),
            headers: HeaderMap::new(),
            dial_timeout: None,
        }
    }
}

/// What is wrong with a `hosts.toml`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FileError {
    /// No TOML at all. The parser's own words would quote the file, which may hold tokens.
    #[error("line {line} is not TOML")]
    Syntax { line: usize },
    /// A value that makes no sense.
    #[error("{key}: {reason}")]
    Value { key: String, reason: &'static str },
}

/// Hosts in the order of the file, the server last. Relative paths are those of `directory`.
pub(crate) fn parse(text: &str, directory: &Path) -> Result<Vec<HostEntry>, FileError> {
    let document = DeTable::parse(text).map_err(|error| FileError::Syntax {
        line: line_of(text, error.span().map_or(0, |span| span.start)),
    })?;
    let root = document.get_ref();
    let mut named = Vec::new();
    for (key, value) in root {
        if key.get_ref() != "host" {
            continue;
        }
        let hosts = value.get_ref().as_table();
        for (name, host) in hosts.ok_or_else(|| bad("host", "must be written [host.\"https://…\"]"))? {
            // A table of its own may follow later than its header's table; the first of them counts.
            let inner = host.get_ref().as_table();
            let inner = inner.and_then(|table| table.keys().map(|key| key.span().start).min());
            let place = inner.map_or(name.span().start, |inner| inner.min(name.span().start));
            named.push((place, name.get_ref().as_ref(), host.get_ref()));
        }
    }
    if named.len() > MAX_HOSTS {
        return Err(bad("host", "there are too many"));
    }
    // Where a name stands first in the file; tables have an order of their own.
    named.sort_by_key(|(place, ..)| *place);
    let mut hosts = Vec::new();
    for (_, name, value) in named {
        let at = format!("host.{:?}", shortened(name));
        let table = value.as_table().ok_or_else(|| bad(&at, "must be a table"))?;
        let mut entry = entry(table, &format!("{at}."), directory)?;
        entry.api = Some(address(name, overrides_path(table, &at)?).map_err(|reason| bad(&at, reason))?);
        hosts.push(entry);
    }
    hosts.push(server(root, directory)?);
    Ok(hosts)
}

fn server(root: &DeTable<'_>, directory: &Path) -> Result<HostEntry, FileError> {
    let mut server = entry(root, "", directory)?;
    let text = match field(root, "server") {
        None => "",
        Some(value) => value.as_str().ok_or_else(|| bad("server", "must be a text"))?,
    };
    if text.is_empty() {
        // What the file says of a registry that it does not name is how to connect, not what it may be asked.
        server.capabilities = Capabilities::ALL;
    } else {
        let api = address(text, overrides_path(root, "")?).map_err(|reason| bad("server", reason))?;
        server.api = Some(api);
    }
    Ok(server)
}

/// Everything of a host but its address.
fn entry(table: &DeTable<'_>, at: &str, directory: &Path) -> Result<HostEntry, FileError> {
    let skip_verify = switch(table, at, "skip_verify")?;
    let tls = TlsFiles {
        authorities: authorities(table, at, directory)?,
        identities: identities(table, at, directory)?,
        skip_verify,
    };
    Ok(HostEntry {
        api: None,
        capabilities: capabilities(table, at)?,
        tls,
        headers: headers(table, at)?,
        dial_timeout: dial_timeout(table, at)?,
    })
}

fn capabilities(table: &DeTable<'_>, at: &str) -> Result<Capabilities, FileError> {
    let wrong = || bad(&format!("{at}capabilities"), "must be a list of pull, resolve and push");
    let Some(value) = field(table, "capabilities") else {
        return Ok(Capabilities::ALL);
    };
    let list = value.as_array().ok_or_else(wrong)?;
    if list.is_empty() {
        return Ok(Capabilities::ALL);
    }
    let mut found = Capabilities::NONE;
    for value in list {
        let text = value.get_ref().as_str().ok_or_else(wrong)?;
        match text.to_ascii_lowercase().as_str() {
            "pull" => found.pull = true,
            "resolve" => found.resolve = true,
            "push" => found.push = true,
            _ => return Err(wrong()),
        }
    }
    Ok(found)
}

fn authorities(table: &DeTable<'_>, at: &str, directory: &Path) -> Result<Vec<PathBuf>, FileError> {
    let key = format!("{at}ca");
    let Some(value) = field(table, "ca") else {
        return Ok(Vec::new());
    };
    let path = |text: &str| directory.join(text);
    if let Some(text) = value.as_str() {
        return Ok(vec![path(text)]);
    }
    let wrong = "must be a path or a list of paths";
    let list = value.as_array().ok_or_else(|| bad(&key, wrong))?;
    let texts = list
        .iter()
        .map(|value| value.get_ref().as_str().map(path).ok_or_else(|| bad(&key, wrong)));
    at_most(MAX_HOST_FILES, &key, texts.collect::<Result<_, _>>()?)
}

type Pair = (PathBuf, Option<PathBuf>);

fn identities(table: &DeTable<'_>, at: &str, directory: &Path) -> Result<Vec<Pair>, FileError> {
    let key = format!("{at}client");
    let Some(value) = field(table, "client") else {
        return Ok(Vec::new());
    };
    let wrong = || bad(&key, "must be a path, a list of paths, or a list of pairs of paths");
    let path = |text: &str| directory.join(text);
    if let Some(text) = value.as_str() {
        return Ok(vec![(path(text), None)]);
    }
    let pair = |value: &DeValue<'_>| {
        if let Some(text) = value.as_str() {
            return Ok((path(text), None));
        }
        let mut texts = value.as_array().ok_or_else(wrong)?.iter();
        let mut next = || texts.next().map(|value| value.get_ref().as_str().ok_or_else(wrong));
        match (next().transpose()?, next().transpose()?, next()) {
            (Some(certificate), Some(key), None) => Ok((path(certificate), (!key.is_empty()).then(|| path(key)))),
            _ => Err(wrong()),
        }
    };
    let list = value.as_array().ok_or_else(wrong)?;
    let pairs = list.iter().map(|value| pair(value.get_ref()));
    at_most(MAX_HOST_FILES, &key, pairs.collect::<Result<_, _>>()?)
}

fn headers(table: &DeTable<'_>, at: &str) -> Result<HeaderMap, FileError> {
    let mut headers = HeaderMap::new();
    let Some(value) = field(table, "header") else {
        return Ok(headers);
    };
    let key = format!("{at}header");
    let lines = value.as_table().ok_or_else(|| bad(&key, "must be a table"))?;
    for (name, value) in lines {
        let key = format!("{key}.{:?}", shortened(name.get_ref()));
        let name = HeaderName::from_bytes(name.get_ref().as_bytes()).map_err(|_| bad(&key, "is no header's name"))?;
        if is_ours(&name) {
            tracing::warn!(key, "the header is set by this client; that of hosts.toml is not sent");
            continue;
        }
        let wrong = || bad(&key, "must be a text that fits in a header, or a list of such");
        let line = |value: &DeValue<'_>| {
            let mut line = HeaderValue::from_str(value.as_str().ok_or_else(wrong)?).map_err(|_| wrong())?;
            // Tokens are put there.
            line.set_sensitive(true);
            Ok(line)
        };
        let values = match value.get_ref().as_array() {
            Some(list) => list
                .iter()
                .map(|value| line(value.get_ref()))
                .collect::<Result<_, _>>()?,
            None => vec![line(value.get_ref())?],
        };
        for value in at_most(MAX_HOST_HEADERS, &key, values)? {
            headers.append(name.clone(), value);
        }
        if headers.len() > MAX_HOST_HEADERS {
            return Err(bad(&key, "there are too many"));
        }
    }
    Ok(headers)
}

/// Headers that say what is asked or how the connection is used.
fn is_ours(name: &HeaderName) -> bool {
    const OURS: [HeaderName; 12] = [
        header::HOST,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
        header::CONNECTION,
        header::UPGRADE,
        header::TE,
        header::TRAILER,
        header::RANGE,
        header::ACCEPT,
        header::ACCEPT_ENCODING,
        header::CONTENT_TYPE,
        header::EXPECT,
    ];
    OURS.contains(name)
}

fn dial_timeout(table: &DeTable<'_>, at: &str) -> Result<Option<Duration>, FileError> {
    let Some(value) = field(table, "dial_timeout") else {
        return Ok(None);
    };
    let wrong = || bad(&format!("{at}dial_timeout"), "must be a time such as \"5s\"");
    let text = value.as_str().ok_or_else(wrong)?;
    if text.is_empty() {
        return Ok(None);
    }
    let time = duration::parse(text).ok_or_else(wrong)?;
    // Zero is Go's word for no limit of its own.
    Ok((!time.is_zero()).then_some(time))
}

fn overrides_path(table: &DeTable<'_>, at: &str) -> Result<bool, FileError> {
    let at = if at.is_empty() { String::new() } else { format!("{at}.") };
    switch(table, &at, "override_path")
}

fn switch(table: &DeTable<'_>, at: &str, name: &str) -> Result<bool, FileError> {
    field(table, name).map_or(Ok(false), |value| {
        let wrong = || bad(&format!("{at}{name}"), "must be true or false");
        value.as_bool().ok_or_else(wrong)
    })
}

/// The API's root that an address means: with `/v2` at its end unless it has that, or `as_it_is`.
fn address(text: &str, as_it_is: bool) -> Result<Url, &'static str> {
    let wrong = "is no address of a registry";
    let whole = if text.contains("://") {
        text.to_owned()
    } else {
        format!("https://{text}")
    };
    let given = Url::parse(&whole).map_err(|_| wrong)?;
    if !matches!(given.scheme(), "http" | "https") {
        return Err("must begin with http:// or https://");
    }
    let host = given.host_str().filter(|host| !host.is_empty()).ok_or(wrong)?;
    // Docker Hub's API is not at the name that its images have.
    let host = if host == "docker.io" {
        "registry-1.docker.io"
    } else {
        host
    };
    let port = given.port().map(|port| format!(":{port}")).unwrap_or_default();
    // Names and passwords in an address are dropped, as is a query.
    let mut api = Url::parse(&format!("{}://{host}{port}/", given.scheme())).map_err(|_| wrong)?;
    let steps = given.path().split('/').filter(|step| !step.is_empty());
    let mut path = steps.collect::<Vec<_>>().join("/");
    if !path.ends_with("/v2") && path != "v2" && !as_it_is {
        path = if path.is_empty() {
            "v2".to_owned()
        } else {
            format!("{path}/v2")
        };
    }
    if !path.is_empty() {
        api.set_path(&format!("/{path}/"));
    }
    Ok(api)
}

fn field<'a, 'i>(table: &'a DeTable<'i>, name: &str) -> Option<&'a DeValue<'i>> {
    table
        .iter()
        .find(|(key, _)| key.get_ref() == name)
        .map(|(_, value)| value.get_ref())
}

fn at_most<T>(most: usize, key: &str, values: Vec<T>) -> Result<Vec<T>, FileError> {
    if values.len() > most {
        return Err(bad(key, "there are too many"));
    }
    Ok(values)
}

fn bad(key: &str, reason: &'static str) -> FileError {
    FileError::Value {
        key: key.to_owned(),
        reason,
    }
}

/// Names of hosts are shown in errors; no more of them than tells which is meant.
fn shortened(text: &str) -> String {
    text.chars().take(100).collect()
}

/// The line of a place in a text, from 1.
pub(crate) fn line_of(text: &str, place: usize) -> usize {
    text.bytes().take(place).filter(|byte| *byte == b'\n').count() + 1
}

#[cfg(test)]
mod tests;
