//! Where this machine's own apt takes packages from, and by which proxies: the demo's image is made from there.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process;

/// One line an index of packages: component, suite as configured, suite's real name, archive.
const TARGET_FORMAT: &str = "$(COMPONENT)|$(RELEASE)|$(CODENAME)|$(REPO_URI)";

/// Proxy variables, and apt's option of the same meaning.
const PROXIES: [(&str, &str); 2] = [
    ("http_proxy", "Acquire::http::Proxy"),
    ("https_proxy", "Acquire::https::Proxy"),
];

/// An archive with the main packages of this machine's release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackageSource {
    /// The archive, `http` or `https`.
    pub uri: String,
    /// The release's name, which every archive has, whatever the machine calls it (`stable`).
    pub suite: String,
}

impl PackageSource {
    /// Asks apt, which is made to fetch its lists if it has none.
    pub fn of_machine() -> Result<Self> {
        let os_release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let suite = release_name(&os_release).context("/etc/os-release names no release")?;
        let mut targets = targets()?;
        if targets.is_empty() {
            process::output(Command::new("apt-get").args(["update", "-q"]))?;
            targets = self::targets()?;
        }
        match archive(&targets, suite, |path| fs::read_to_string(path).ok()) {
            Some(uri) => Ok(Self {
                uri,
                suite: suite.into(),
            }),
            None => bail!("apt on this machine has no http or https source for main of {suite}"),
        }
    }
}

/// Environment variables for programs that fetch packages: apt's own proxies, else those of our environment.
pub fn proxy_variables() -> Result<Vec<(&'static str, String)>> {
    let mut variables = Vec::new();
    for (variable, option) in PROXIES {
        let text = process::output(Command::new("apt-config").args(["--format", "%f %v%n", "dump", option]))?;
        let configured = configured(&String::from_utf8_lossy(&text), option);
        if let Some(value) = configured.or_else(|| std::env::var(variable).ok()) {
            variables.push((variable, value));
        }
    }
    if let Ok(value) = std::env::var("no_proxy") {
        variables.push(("no_proxy", value));
    }
    Ok(variables)
}

fn targets() -> Result<String> {
    let mut command = Command::new("apt-get");
    command.args(["indextargets", "--format", TARGET_FORMAT, "Created-By: Packages"]);
    Ok(String::from_utf8_lossy(&process::output(&mut command)?).into_owned())
}

fn release_name(os_release: &str) -> Option<&str> {
    let name = os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(name.trim_matches('"'))
}

/// The first archive of `targets` that has main of the release `suite`, under this name or an alias.
fn archive(targets: &str, suite: &str, read: impl Fn(&str) -> Option<String>) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut fields = line.splitn(4, '|');
        let (component, configured, real, uri) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        // An archive's updates have a name of their own in both fields on most mirrors, but some say the release's.
        let chosen = configured == suite || (real == suite && !configured.contains(['-', '/']));
        if component != "main" || !chosen {
            return None;
        }
        match uri.strip_prefix("mirror+file:") {
            Some(list) => mirror(&read(&format!("/{}", list.trim_matches('/')))?),
            None => is_web(uri).then(|| uri.to_string()),
        }
    })
}

/// The first usable archive of a mirror list: an URI a line, maybe followed by a tab and attributes.
fn mirror(list: &str) -> Option<String> {
    let uris = list.lines().filter_map(|line| line.split_whitespace().next());
    uris.into_iter().find(|uri| is_web(uri)).map(Into::into)
}

fn is_web(uri: &str) -> bool {
    uri.starts_with("http://") || uri.starts_with("https://")
}

/// The value of `option` in a dump of apt's configuration; `DIRECT` is apt's word for no proxy.
fn configured(dump: &str, option: &str) -> Option<String> {
    let values = dump
        .lines()
        .filter_map(|line| line.strip_prefix(option)?.strip_prefix(' '));
    let mut values = values
        .map(str::trim)
        .filter(|value| !value.is_empty() && *value != "DIRECT");
    values.next().map(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_found_under_its_name_and_its_aliases() {
        let find = |targets: &str| archive(targets, "bookworm", |_| None);
        let named = "main|bookworm-updates|bookworm-updates|http://u/\nmain|bookworm|bookworm|http://a/debian/";
        assert_eq!(find(named).unwrap(), "http://a/debian/");
        assert_eq!(find("main|stable|bookworm|https://b/").unwrap(), "https://b/");
        for other in [
            "",
            "nonsense",
            "contrib|bookworm|bookworm|http://a/",
            "main|trixie|trixie|http://a/",
            "main|stable|trixie|http://a/",
            "main|stable-updates|bookworm|http://a/",
            "main|bookworm|bookworm|cdrom:[disc]/",
            "main|bookworm|bookworm|mirror+file:/missing",
        ] {
            assert_eq!(find(other), None, "{other}");
        }
    }

    #[test]
    fn a_mirror_list_is_resolved_to_its_first_web_archive() {
        let read = |path: &str| {
            assert_eq!(path, "/etc/apt/mirrors/debian.list");
            Some("# a comment\nfile:/srv/debian\nhttps://a/debian\tpriority:1\nhttp://b/debian\n".to_string())
        };
        for uri in [
            "mirror+file:/etc/apt/mirrors/debian.list",
            "mirror+file:/etc/apt/mirrors/debian.list/",
        ] {
            let targets = format!("main|bookworm|bookworm|{uri}");
            assert_eq!(archive(&targets, "bookworm", read).unwrap(), "https://a/debian");
        }
    }

    #[test]
    fn apts_proxy_is_read_from_its_dump() {
        let option = PROXIES[0].1;
        let dump = "Acquire::http::Proxy http://proxy:3128/\nAcquire::http::Proxy::host DIRECT\n";
        assert_eq!(configured(dump, option).unwrap(), "http://proxy:3128/");
        assert_eq!(configured("Acquire::http::Proxy::host http://x/\n", option), None);
        assert_eq!(configured("Acquire::http::Proxy DIRECT\n", option), None);
        assert_eq!(configured("", option), None);
    }

    #[test]
    fn the_release_is_named_by_os_release() {
        assert_eq!(
            release_name("ID=debian\nVERSION_CODENAME=\"bookworm\"\n"),
            Some("bookworm")
        );
        assert_eq!(release_name("ID=arch\n"), None);
    }
}
