//! Where an image is: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]`, `docker://REF`.

use std::fmt;
use std::path::PathBuf;

use hullspeed_registry::Reference;

/// A parsed location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Location {
    /// A directory in OCI image layout.
    Layout { dir: PathBuf, tag: Option<String> },
    /// A tar file of an OCI image layout.
    Archive { file: PathBuf, tag: Option<String> },
    /// A registry.
    Docker(Reference),
}

impl Location {
    /// Parses a location; the path of `oci:` and `oci-archive:` ends at the first colon.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let Some((transport, rest)) = text.split_once(':') else {
            return Err("write oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://REF".to_owned());
        };
        let path_and_tag = || {
            let (path, tag) = rest
                .split_once(':')
                .map_or((rest, None), |(path, tag)| (path, Some(tag.to_owned())));
            match tag {
                _ if path.is_empty() => Err(format!("{transport}: needs a path")),
                Some(tag) if tag.is_empty() => Err("the tag behind the colon is empty".to_owned()),
                tag => Ok((PathBuf::from(path), tag)),
            }
        };
        match transport {
            "oci" => path_and_tag().map(|(dir, tag)| Self::Layout { dir, tag }),
            "oci-archive" => path_and_tag().map(|(file, tag)| Self::Archive { file, tag }),
            "docker" => {
                let reference = rest.strip_prefix("//").ok_or("write docker://REF with two slashes")?;
                Reference::parse(reference)
                    .map(Self::Docker)
                    .map_err(|error| error.to_string())
            }
            other => Err(format!(
                "unknown transport {other:?}; there are oci:, oci-archive: and docker://"
            )),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (transport, path, tag) = match self {
            Self::Layout { dir, tag } => ("oci", dir, tag),
            Self::Archive { file, tag } => ("oci-archive", file, tag),
            Self::Docker(reference) => return write!(f, "docker://{reference}"),
        };
        write!(f, "{transport}:{}", path.display())?;
        tag.as_ref().map_or(Ok(()), |tag| write!(f, ":{tag}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_parse_and_mistakes_say_what_to_write() {
        for text in [
            "oci:/a/b",
            "oci:a:t",
            "oci-archive:x.tar:v1",
            "docker://localhost:5000/a:t",
        ] {
            assert_eq!(Location::parse(text).unwrap().to_string(), text);
        }
        for (text, wanted) in [
            ("ubuntu", "docker://"),
            ("oci:", "path"),
            ("oci:a:", "empty"),
            ("docker:ubuntu", "two slashes"),
            ("docker://UP", "reference"),
            ("dir:/x", "unknown transport"),
            ("docker-archive:x", "unknown transport"),
        ] {
            let message = Location::parse(text).unwrap_err();
            assert!(message.contains(wanted), "{text}: {message}");
        }
    }
}
