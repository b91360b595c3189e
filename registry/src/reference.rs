//! Image references: `host[:port]/repository[:tag][@digest]` with Docker Hub's short forms.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

/// Longest repository name that registries accept.
const MAX_NAME: usize = 255;
/// Longest tag that registries accept.
const MAX_TAG: usize = 128;

/// A parsed image reference; every part is valid by construction and safe in a URL path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// What of a repository is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Version {
    /// A tag, which may move.
    Tag(String),
    /// A digest, which cannot.
    Digest(Digest),
}

/// A text that is no image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reference:?} is not an image reference: {reason}")]
pub struct ReferenceError {
    /// The text, shortened.
    pub reference: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl Reference {
    /// Parses a reference; Docker Hub's short names are completed, an absent tag stays absent.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        parse(text).map_err(|reason| ReferenceError {
            reference: text.chars().take(300).collect(),
            reason,
        })
    }

    /// The registry as it is named, `docker.io` for Docker Hub, with its port if it has one.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository without the host.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one is given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one is given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// What the reference points to: its digest, else its tag, else `latest`.
    pub fn version(&self) -> Version {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => Version::Digest(digest.clone()),
            (None, Some(tag)) => Version::Tag(tag.clone()),
            (None, None) => Version::Tag("latest".to_owned()),
        }
    }

    /// The same repository at `digest`.
    pub fn at(&self, digest: Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => fmt::Display::fmt(digest, f),
        }
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (
            rest,
            Some(digest.parse().map_err(|_| "the part behind @ is not a sha256 digest")?),
        ),
        None => (text, None),
    };
    // A colon behind the last slash separates the tag; an earlier one belongs to the port.
    let name_end = rest.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match rest[name_end..].split_once(':') {
        Some((last, tag)) => (&rest[..name_end + last.len()], Some(tag)),
        None => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err("the tag must be 1 to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'");
    }
    let (host, repository) = match name.split_once('/') {
        Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest),
        _ => ("docker.io", name),
    };
    if !is_host(host) {
        return Err("the registry must be a host name or address with an optional port");
    }
    if !is_repository(repository) {
        return Err("the repository must be lower-case letters, digits and single separators (., _, __, -, /)");
    }
    let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") {
        "docker.io"
    } else {
        host
    };
    let official = host == "docker.io" && !repository.contains('/');
    let repository = if official {
        format!("library/{repository}")
    } else {
        repository.to_owned()
    };
    Ok(Reference {
        host: host.to_owned(),
        repository,
        tag: tag.map(str::to_owned),
        digest,
    })
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_host(host: &str) -> bool {
    let port_ok = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else {
            return false;
        };
        return address.parse::<std::net::Ipv6Addr>().is_ok()
            && (port.is_empty() || port.strip_prefix(':').is_some_and(port_ok));
    }
    let (name, port) = host
        .split_once(':')
        .map_or((host, None), |(name, port)| (name, Some(port)));
    let label_ok = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    name.len() <= MAX_NAME && name.split('.').all(label_ok) && port.is_none_or(port_ok)
}

fn is_repository(repository: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let component_ok = |component: &str| {
        let edges = component.bytes().next().is_some_and(alphanumeric)
            && component.bytes().next_back().is_some_and(alphanumeric);
        let separators = component.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        edges && { separators }.all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
    };
    repository.len() <= MAX_NAME && repository.split('/').all(component_ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed_as_docker_does() {
        for (text, full, version) in [
            ("ubuntu", "docker.io/library/ubuntu", "latest"),
            ("ubuntu:22.04", "docker.io/library/ubuntu:22.04", "22.04"),
            ("index.docker.io/grafana/grafana", "docker.io/grafana/grafana", "latest"),
            ("localhost/x", "localhost/x", "latest"),
            ("localhost:5000/x/y:t", "localhost:5000/x/y:t", "t"),
            ("[::1]:5000/x", "[::1]:5000/x", "latest"),
            ("127.0.0.1:5000/x", "127.0.0.1:5000/x", "latest"),
            ("ghcr.io/a/b__c/d--e.f:V1_-.", "ghcr.io/a/b__c/d--e.f:V1_-.", "V1_-."),
            ("foo_bar.com:8080", "docker.io/library/foo_bar.com:8080", "8080"),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.to_string(), full);
            assert_eq!(reference.version().to_string(), version);
        }
        let both = Reference::parse(&format!("quay.io/x:t@{D}")).unwrap();
        assert_eq!((both.tag(), both.version().to_string().as_str()), (Some("t"), D));
        assert_eq!(both.to_string(), format!("quay.io/x:t@{D}"));
    }

    #[test]
    fn nothing_that_could_leave_the_path_parses() {
        for bad in [
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "A/b",
            "a/../b",
            "host.io/",
            "host.io:0/x",
            "host.io:99999/x",
            "a:",
            "a:-x",
            "a@",
            "a@sha256:00",
            "a b",
            "a?x",
            "ho$t.io/x",
            "[::1/x",
            "[::1]x/y",
            "-a.io/x",
            "a.io/x_-y",
            "a.io/x___y",
            "http://a.io/x",
            "user:pw@host/x",
            "a.io/é",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad:?} parsed");
        }
        assert!(Reference::parse(&"a".repeat(300)).is_err());
    }
}
