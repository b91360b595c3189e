//! Whether NRI plugins are there. They see a hull's name and labels instead of its pod's, so with them no hulls are kept
//! unless the operator says so.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::snapshot::Off;

/// Largest table of sockets that is read.
const MAX_TABLE_BYTES: u64 = 16 << 20;

/// Largest configuration.
const MAX_CONF_BYTES: u64 = 1 << 20;

/// State of a connected socket in the kernel's table.
const CONNECTED: &str = "03";

/// Where traces of plugins are.
#[derive(Debug, Clone)]
pub(super) struct Places {
    /// Plugins that containerd starts.
    pub(super) plugins: PathBuf,
    /// Plugins of NRI's first version, in containerd 1.6.
    pub(super) legacy: PathBuf,
    /// The kernel's table of Unix sockets: plugins that run by themselves connect to containerd.
    pub(super) sockets: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            plugins: "/opt/nri/plugins".into(),
            legacy: "/etc/nri/conf.json".into(),
            sockets: "/proc/net/unix".into(),
        }
    }
}

/// Why hulls should not be kept, if plugins are there.
pub(super) fn objection(places: &Places) -> Option<Off> {
    let found = if has_entries(&places.plugins) {
        format!("{} is not empty", places.plugins.display())
    } else if has_legacy(&places.legacy) {
        format!("{} names plugins", places.legacy.display())
    } else if has_connection(&places.sockets) {
        "a plugin is connected to nri.sock".into()
    } else {
        return None;
    };
    Some(Off::new(
        "nri",
        format!("NRI plugins would see hulls instead of pods: {found}"),
    ))
}

fn has_entries(directory: &Path) -> bool {
    std::fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}

fn read(path: &Path, limit: u64) -> Option<String> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(limit).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

fn has_legacy(path: &Path) -> bool {
    if !std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return false;
    }
    let conf = read(path, MAX_CONF_BYTES).and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    match conf.as_ref().and_then(|conf| conf.get("plugins")) {
        Some(serde_json::Value::Array(plugins)) => !plugins.is_empty(),
        Some(plugins) => !plugins.is_null(),
        // What cannot be read may name some.
        None => conf.is_none(),
    }
}

/// Accepted connections carry the path of the socket that they were made to.
fn has_connection(table: &Path) -> bool {
    let table = read(table, MAX_TABLE_BYTES).unwrap_or_default();
    table.lines().any(|line| {
        let mut columns = line.split_whitespace();
        columns.nth(5) == Some(CONNECTED) && columns.nth(1).is_some_and(|path| path.ends_with("/nri.sock"))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn plugins_are_found_where_they_leave_traces() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let places = Places {
            plugins: at("plugins"),
            legacy: at("conf.json"),
            sockets: Places::default().sockets,
        };
        assert_eq!(objection(&places), None);
        std::fs::write(at("conf.json"), r#"{"version":"0.1","plugins":[]}"#).unwrap();
        assert_eq!(objection(&places), None);
        std::fs::write(at("conf.json"), r#"{"version":"0.1","plugins":[{"type":"x"}]}"#).unwrap();
        assert_eq!(objection(&places).unwrap().reason, "nri");
        std::fs::remove_file(at("conf.json")).unwrap();
        std::fs::create_dir(at("plugins")).unwrap();
        assert_eq!(objection(&places), None);
        std::fs::write(at("plugins/10-x"), "").unwrap();
        assert!(objection(&places).is_some());
        std::fs::remove_file(at("plugins/10-x")).unwrap();
        let listener = UnixListener::bind(at("nri.sock")).unwrap();
        assert_eq!(objection(&places), None);
        let _client = UnixStream::connect(at("nri.sock")).unwrap();
        let _server = listener.accept().unwrap();
        assert!(objection(&places).is_some());
    }
}
