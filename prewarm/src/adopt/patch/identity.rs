//! What of a pod's configuration is written into its sandbox, as containerd would have written it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use hullspeed_proto::cri::v1::{DnsConfig, PodSandboxConfig};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag,
    fsmount, fsopen, fspick,
};
use rustix::system::{setdomainname, sethostname, uname};

use super::namespaces::{Home, Kind};
use super::{Hull, PatchError};
use crate::adopt::eligibility::{EmptyDns, empty_dns, is_safe_sysctl};
use crate::adopt::fault;
use crate::adopt::hull::{Files, HOST_HOSTS, MAX_FILE_BYTES, Stamp};
use crate::containerd::facts::Facts;
use crate::containerd::has_writable_sysfs;

/// The host's resolver configuration, for pods without one of their own.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";

/// A sandbox's resolver configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ResolvConf {
    /// A copy of the host's.
    Host,
    /// This text.
    Text(String),
}

/// What a sandbox gets of its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Empty for the node's.
    hostname: String,
    resolv_conf: ResolvConf,
    sysctls: Vec<(String, String)>,
    /// Whether its containers may write to sysfs.
    writes_sysfs: bool,
}

impl Identity {
    /// That of a pod, as this containerd reads its configuration.
    #[must_use]
    pub fn of(config: &PodSandboxConfig, facts: &Facts) -> Self {
        let sysctls = config.linux.iter().flat_map(|linux| linux.sysctls.clone());
        let mut sysctls: Vec<_> = sysctls.collect();
        sysctls.sort();
        let context = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        Self {
            hostname: config.hostname.clone(),
            resolv_conf: resolv_conf(config.dns_config.as_ref(), &facts.version),
            sysctls,
            writes_sysfs: context.is_some_and(|context| context.privileged) && has_writable_sysfs(&facts.version),
        }
    }

    /// Writes it into the hull. Doing so again changes nothing.
    pub(super) fn apply(&self, hull: &Hull, home: &Home) -> Result<(), PatchError> {
        let node = uname();
        let (nodename, domain) = (node.nodename().to_bytes(), node.domainname().to_bytes());
        let hostname = if self.hostname.is_empty() {
            nodename
        } else {
            self.hostname.as_bytes()
        };
        home.away(Kind::Uts, &hull.namespaces.uts, || name_host(hostname, domain))?;
        fault::point("hostname");
        self.write_files(hostname, &hull.files)?;
        fault::point("files");
        if self.writes_sysfs {
            home.away(Kind::Net, &hull.namespaces.net, || {
                make_sysfs_writable().map_err(PatchError::Sysfs)
            })?;
        }
        self.write_sysctls(hull, home)?;
        fault::point("sysctls");
        Ok(())
    }

    fn write_files(&self, hostname: &[u8], files: &Files) -> Result<(), PatchError> {
        replace(&files.hostname, "hostname", &[hostname, b"\n"].concat())?;
        match &self.resolv_conf {
            ResolvConf::Text(text) => replace(&files.resolv_conf, "resolv.conf", text.as_bytes())?,
            ResolvConf::Host => replace(&files.resolv_conf, "resolv.conf", &host_file(HOST_RESOLV_CONF)?)?,
        }
        // The hull has a copy from when it was made; most often that is still what the host has.
        let stamp = Stamp::of(Path::new(HOST_HOSTS));
        if stamp.is_none() || stamp != files.hosts_stamp {
            replace(&files.hosts, "hosts", &host_file(HOST_HOSTS)?)?;
        }
        Ok(())
    }

    fn write_sysctls(&self, hull: &Hull, home: &Home) -> Result<(), PatchError> {
        if let Some((name, _)) = self.sysctls.iter().find(|(name, _)| !is_safe_sysctl(name)) {
            return Err(PatchError::Unsafe { name: name.clone() });
        }
        let of_net = |(name, _): &&(String, String)| name.starts_with("net.");
        let (net, ipc): (Vec<_>, Vec<_>) = self.sysctls.iter().partition(of_net);
        for (kind, namespace, sysctls) in [
            (Kind::Net, &hull.namespaces.net, net),
            (Kind::Ipc, &hull.namespaces.ipc, ipc),
        ] {
            if !sysctls.is_empty() {
                let write_all = || sysctls.iter().try_for_each(|(name, value)| write_sysctl(name, value));
                home.away(kind, namespace, write_all)?;
            }
        }
        Ok(())
    }
}

/// A sandbox's UTS namespace was the host's once; containerd sets the hostname in it, and the rest stays.
fn name_host(hostname: &[u8], domain: &[u8]) -> Result<(), PatchError> {
    let failed = |what| move |source| PatchError::Name { what, source };
    sethostname(hostname).map_err(failed("hostname"))?;
    if uname().domainname().to_bytes() != domain {
        setdomainname(domain).map_err(failed("domain name"))?;
    }
    Ok(())
}

/// A network namespace has one sysfs, whoever mounts it. A hull's pause process was the first to, for reading only, as
/// suits a pod that is not privileged; a privileged one's containers mount it for writing, and would get it as it is.
fn make_sysfs_writable() -> rustix::io::Result<()> {
    let sysfs = fsopen("sysfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&sysfs)?;
    // Nobody sees this mount, and it goes with its descriptor.
    let mount = fsmount(&sysfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let picked = fspick(&mount, "", flags)?;
    fsconfig_set_flag(&picked, "rw")?;
    fsconfig_reconfigure(&picked)
}

/// In `/proc/sys` a thread sees the values of its own namespaces.
fn write_sysctl(name: &str, value: &str) -> Result<(), PatchError> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    let write = || File::options().write(true).open(&path)?.write_all(value.as_bytes());
    write().map_err(|source| PatchError::Sysctl {
        name: name.to_owned(),
        source,
    })
}

/// Containers may have the file mounted: it stays the same file, and is never empty in between.
fn replace(file: &File, name: &'static str, content: &[u8]) -> Result<(), PatchError> {
    let write = || {
        let before = file.metadata()?.len();
        let length = content.len() as u64;
        if before == length && is_content(file, content) {
            return Ok(());
        }
        file.write_all_at(content, 0)?;
        // Truncating makes some file systems write to disk when the file is closed.
        if before > length {
            file.set_len(length)?;
        }
        Ok(())
    };
    write().map_err(PatchError::file("write", Path::new(name)))
}

fn is_content(file: &File, content: &[u8]) -> bool {
    let mut found = vec![0; content.len()];
    file.read_exact_at(&mut found, 0).is_ok() && found == content
}

fn host_file(path: &str) -> Result<Vec<u8>, PatchError> {
    let path = Path::new(path);
    let read = || {
        let mut content = Vec::new();
        File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut content)?;
        if content.len() as u64 > MAX_FILE_BYTES {
            return Err(std::io::Error::other("it is too large"));
        }
        Ok(content)
    };
    read().map_err(PatchError::file("read", path))
}

/// containerd's text: a line of search domains, one for each server, a line of options, each only if there is any.
fn resolv_conf(dns: Option<&DnsConfig>, version: &str) -> ResolvConf {
    let Some(dns) = dns else {
        return ResolvConf::Host;
    };
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    if !dns.servers.is_empty() {
        text.push_str(&format!("nameserver {}\n", dns.servers.join("\nnameserver ")));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    if text.is_empty() && empty_dns(version) == Some(EmptyDns::Host) {
        return ResolvConf::Host;
    }
    ResolvConf::Text(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_containerds() {
        let dns = |servers: &[&str], searches: &[&str], options: &[&str]| {
            let own = |list: &[&str]| list.iter().map(ToString::to_string).collect();
            DnsConfig {
                servers: own(servers),
                searches: own(searches),
                options: own(options),
            }
        };
        let table = [
            (dns(&["1.1.1.1"], &[], &[]), "nameserver 1.1.1.1\n"),
            (
                dns(&["1.1.1.1", "::1"], &["a.b", "c"], &["ndots:5", "edns0"]),
                "search a.b c\nnameserver 1.1.1.1\nnameserver ::1\noptions ndots:5 edns0\n",
            ),
            (dns(&[], &["a"], &[]), "search a\n"),
            (dns(&[""], &[], &[]), "nameserver \n"),
        ];
        for (dns, text) in table {
            assert_eq!(resolv_conf(Some(&dns), "1.6.20"), ResolvConf::Text(text.into()));
        }
        let empty = DnsConfig::default();
        assert_eq!(resolv_conf(Some(&empty), "1.6.20~ds1"), ResolvConf::Host);
        assert_eq!(resolv_conf(Some(&empty), "2.1.9"), ResolvConf::Text(String::new()));
        assert_eq!(resolv_conf(None, "2.1.9"), ResolvConf::Host);
    }

    #[test]
    fn files_are_rewritten_in_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hostname");
        std::fs::write(&path, "a-long-name-of-a-hull\n").unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        // A second name stands in for a container's mount.
        let mounted = directory.path().join("mounted");
        std::fs::hard_link(&path, &mounted).unwrap();
        for content in ["web\n", "web\n", "bew\n", "", "another name, longer than before\n"] {
            replace(&file, "hostname", content.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&mounted).unwrap(), content);
        }
    }
}
