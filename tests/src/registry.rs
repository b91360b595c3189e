//! A real docker-registry on a loopback port, with its storage in a directory of the run.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};

use crate::process::{self, Process};
use crate::run::RunDir;

const START_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(20);

/// Another program may take the free port between our look and the registry's bind; then the next one is tried.
const PORT_TRIES: usize = 5;

/// A running registry.
pub struct Registry {
    process: Process,
    address: SocketAddr,
    storage: PathBuf,
}

impl Registry {
    /// Starts a registry that keeps its blobs in `storage`.
    pub fn start(run: &RunDir, storage: &Path) -> Result<Self> {
        Self::start_named(run, "registry", storage, None)
    }

    /// Starts one that serves `storage`, maybe another's, to the users of this htpasswd text alone.
    pub fn start_private(run: &RunDir, storage: &Path, users: &str) -> Result<Self> {
        Self::start_named(run, "private", storage, Some(users))
    }

    fn start_named(run: &RunDir, name: &str, storage: &Path, users: Option<&str>) -> Result<Self> {
        let mut last = None;
        for _ in 0..PORT_TRIES {
            match Self::start_on(run, name, storage, users, free_port()?) {
                Ok(registry) => return Ok(registry),
                Err(error) => last = Some(error),
            }
        }
        Err(last.map_or_else(
            || anyhow::anyhow!("no port was tried"),
            |error| error.context("docker-registry did not start"),
        ))
    }

    fn start_on(run: &RunDir, name: &str, storage: &Path, users: Option<&str>, port: u16) -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        fs::create_dir_all(storage).with_context(|| format!("cannot create {}", storage.display()))?;
        let directory = run.directory(name)?;
        let config = directory.join("config.yml");
        // JSON is YAML.
        let mut text = serde_json::json!({
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": true}},
            "storage": {"filesystem": {"rootdirectory": storage}, "delete": {"enabled": true}},
            "http": {"addr": address.to_string()},
        });
        if let Some(users) = users {
            let path = directory.join("htpasswd");
            fs::write(&path, users).with_context(|| format!("cannot write {}", path.display()))?;
            text["auth"] = serde_json::json!({"htpasswd": {"realm": name, "path": path}});
        }
        fs::write(&config, text.to_string()).with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
        let mut registry = Self {
            process: run.spawn(name, command)?,
            address,
            storage: storage.into(),
        };
        let end = Instant::now() + START_LIMIT;
        while TcpStream::connect(address).is_err() {
            registry.process.check_running()?;
            if Instant::now() > end {
                bail!("docker-registry does not listen on {address} after {START_LIMIT:?}");
            }
            std::thread::sleep(POLL);
        }
        Ok(registry)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it keeps its blobs.
    #[must_use]
    pub fn storage(&self) -> &Path {
        &self.storage
    }

    /// Copies `SOURCE` (as skopeo names it, `oci:DIR:TAG`) to `repository:tag` here, all platforms, digests unchanged.
    pub fn push(&self, source: &str, name: &str) -> Result<()> {
        let target = format!("docker://{}/{name}", self.address);
        let mut command = Command::new("skopeo");
        command
            .args([
                "copy",
                "--quiet",
                "--all",
                "--preserve-digests",
                "--dest-tls-verify=false",
            ])
            .args([source, &target]);
        process::output(&mut command).with_context(|| format!("cannot push {source}"))?;
        Ok(())
    }

    /// Reads every blob once, so that the registry answers from memory as a busy one does.
    pub fn warm(&self) -> Result<()> {
        let blobs = self.storage.join("docker/registry/v2/blobs/sha256");
        let mut directories = vec![blobs];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
                let path = entry?.path();
                if path.is_dir() {
                    directories.push(path);
                } else {
                    let mut file = fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
                    std::io::copy(&mut file, &mut std::io::sink())?;
                }
            }
        }
        Ok(())
    }
}

/// Ports that are tried: below the range from which the kernel picks ports of outgoing connections, so that none of
/// those takes a port between our look and its use, or while a daemon is restarted.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// A loopback port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    let count = u32::from(PORTS.end - PORTS.start);
    // Processes that look at the same time should look at different places.
    let first = (now / 1000).wrapping_add(std::process::id().wrapping_mul(97));
    let ports = (0..count).filter_map(|step| u16::try_from(first.wrapping_add(step) % count).ok());
    let free = ports
        .map(|offset| PORTS.start + offset)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
    free.context("no free loopback port")
}
