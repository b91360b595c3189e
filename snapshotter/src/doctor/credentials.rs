//! Where logins of registries come from: whether the files can be read, and the programs that they name are there.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hullspeed_daemon::doctor::Report;
use hullspeed_daemon::doctor::processes::read;
use serde_json::Value;

use super::Places;
use crate::config::Config;

/// What the names of credential helpers' programs begin with.
const HELPER: &str = "docker-credential-";
/// Longest configuration of docker that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// `process` is the running daemon, whose environment counts; else this command's does.
pub(super) fn examine(config: &Config, places: &Places, process: Option<u32>, report: &mut Report) {
    let registry = &config.registry;
    let environment = environment(process, places);
    let mut sources = Vec::new();
    // These were looked into when the configuration was read.
    if let Some(path) = &registry.credentials_file {
        sources.push(format!("logins of {}", path.display()));
    }
    if let (Some(path), Some(_)) = (
        &registry.credential_provider_config,
        &registry.credential_provider_bin_dir,
    ) {
        sources.push(format!("the providers of {}", path.display()));
    }
    let files = match &registry.docker_config {
        Some(path) => vec![(path.clone(), true)],
        None => docker_files(&environment),
    };
    for (path, required) in files {
        match logins(&path) {
            Ok(found) => {
                judge_helpers(
                    &path,
                    &found.helpers,
                    environment.get("PATH").map(String::as_str),
                    report,
                );
                sources.push(format!("{} of {}", count(found.logins, "login"), path.display()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {}
            Err(error) => report.fail(
                "credentials",
                format!("{}: {error}", path.display()),
                "make it a file of docker's that root can read, or name another: no login of it is used",
            ),
        }
    }
    if sources.is_empty() {
        report.ok(
            "credentials",
            "no file of logins; private images need those that hullspeed-prewarm hands over, or registry.credentials_file",
        );
    } else {
        report.ok("credentials", sources.join("; "));
    }
    judge_hosts(registry.hosts_directory.as_deref(), report);
}

fn count(number: usize, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        number => format!("{number} {what}s"),
    }
}

/// The variables of the daemon, or of this process where it does not run.
fn environment(process: Option<u32>, places: &Places) -> HashMap<String, String> {
    let text = process.and_then(|process| read(&places.proc.join(process.to_string()).join("environ")));
    match text {
        Some(text) => {
            let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
            pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        }
        None => std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect(),
    }
}

/// The files that the environment names, and whether they have to be there; see `Credentials::from_environment`.
fn docker_files(environment: &HashMap<String, String>) -> Vec<(PathBuf, bool)> {
    let variable = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    let home = || variable("HOME").map(|home| Path::new(home).join(".docker"));
    let named = variable("REGISTRY_AUTH_FILE").map(|path| (PathBuf::from(path), true));
    let docker = variable("DOCKER_CONFIG").map(PathBuf::from).or_else(home);
    let docker = docker.map(|directory| (directory.join("config.json"), false));
    let podman = variable("XDG_RUNTIME_DIR").map(|run| (Path::new(run).join("containers/auth.json"), false));
    [named, docker, podman].into_iter().flatten().collect()
}

/// What a configuration of docker names; no secret of it is kept.
struct Logins {
    logins: usize,
    helpers: BTreeSet<String>,
}

fn logins(path: &Path) -> io::Result<Logins> {
    if fs::metadata(path)?.len() > MAX_FILE_BYTES {
        return Err(io::Error::other("far too long"));
    }
    let config: Value = serde_json::from_slice(&fs::read(path)?).map_err(|_| io::Error::other("not JSON"))?;
    let object = |key: &str| config.get(key).and_then(Value::as_object);
    let names = object("credHelpers").into_iter().flat_map(|helpers| helpers.values());
    let helpers = names.chain(config.get("credsStore")).filter_map(Value::as_str);
    Ok(Logins {
        logins: object("auths").map_or(0, serde_json::Map::len),
        helpers: helpers.filter(|name| !name.is_empty()).map(str::to_owned).collect(),
    })
}

fn judge_helpers(path: &Path, helpers: &BTreeSet<String>, search: Option<&str>, report: &mut Report) {
    let directories = || search.unwrap_or_default().split(':').map(Path::new);
    let missing = helpers.iter().map(|helper| format!("{HELPER}{helper}"));
    let missing: Vec<String> = missing
        .filter(|program| !directories().any(|directory| directory.join(program).is_file()))
        .collect();
    if !missing.is_empty() {
        report.fail(
            "credentials",
            format!(
                "{} names {}, which the daemon does not find",
                path.display(),
                missing.join(", ")
            ),
            "install it into a directory of the daemon's PATH, or take it out of the file",
        );
    }
}

fn judge_hosts(directory: Option<&Path>, report: &mut Report) {
    let Some(directory) = directory else {
        return report.ok("mirrors", "none: registry.hosts_directory is empty");
    };
    match fs::read_dir(directory) {
        Ok(entries) => {
            let hosts = entries
                .filter_map(Result::ok)
                .filter(|entry| entry.path().join("hosts.toml").is_file());
            report.ok(
                "mirrors",
                format!("{} configured in {}", count(hosts.count(), "host"), directory.display()),
            );
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            report.ok("mirrors", format!("none: {} is not there", directory.display()));
        }
        Err(error) => report.fail(
            "mirrors",
            format!("{}: {error}", directory.display()),
            "make registry.hosts_directory containerd's certs.d",
        ),
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    fn found(look: impl FnOnce(&mut Report)) -> Vec<(Level, String)> {
        let mut report = Report::default();
        look(&mut report);
        report
            .findings
            .into_iter()
            .map(|finding| (finding.level, finding.says))
            .collect()
    }

    fn with_docker_config(path: &Path) -> Vec<(Level, String)> {
        let mut config = Config::default();
        config.registry.docker_config = Some(path.to_owned());
        config.registry.hosts_directory = None;
        let places = Places::with_containerd(Path::new("/x"));
        found(|report| examine(&config, &places, Some(std::process::id()), report))
    }

    #[test]
    fn files_of_logins_are_looked_into_and_their_secrets_not_told() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("config.json");
        assert_eq!(with_docker_config(&path)[0].0, Level::Fail);
        fs::write(&path, "{").unwrap();
        assert_eq!(with_docker_config(&path)[0].0, Level::Fail);
        fs::write(
            &path,
            r#"{"auths":{"r.io":{"auth":"c2VjcmV0OnNlY3JldA=="}},"credsStore":""}"#,
        )
        .unwrap();
        let said = with_docker_config(&path);
        assert!(said[0].0 == Level::Ok && said[0].1.contains("1 login of"), "{said:?}");
        assert!(!said[0].1.contains("c2Vj"));
        fs::write(&path, r#"{"credHelpers":{"r.io":"nonesuch"},"auths":7}"#).unwrap();
        let said = with_docker_config(&path);
        assert!(
            said[0].0 == Level::Fail && said[0].1.contains("docker-credential-nonesuch"),
            "{said:?}"
        );
    }

    #[test]
    fn helpers_are_looked_for_in_the_daemons_path() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("docker-credential-here"), "").unwrap();
        let path = format!("/nonesuch:{}", place.path().display());
        let helpers = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let judged =
            |names: &[&str], search| found(|report| judge_helpers(Path::new("f"), &helpers(names), search, report));
        assert!(judged(&["here"], Some(&path)).is_empty());
        assert_eq!(judged(&["here", "gone"], Some(&path))[0].0, Level::Fail);
        assert_eq!(judged(&["here"], None)[0].0, Level::Fail);
    }

    #[test]
    fn the_environment_names_the_same_files_as_for_the_daemon() {
        let files = |pairs: &[(&str, &str)]| {
            let environment = pairs
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let files = docker_files(&environment.collect()).into_iter();
            files
                .map(|(path, required)| (path.display().to_string(), required))
                .collect::<Vec<_>>()
        };
        assert!(files(&[("HOME", "")]).is_empty());
        assert_eq!(
            files(&[("HOME", "/root")]),
            [("/root/.docker/config.json".to_owned(), false)]
        );
        let all = [
            ("HOME", "/root"),
            ("DOCKER_CONFIG", "/d"),
            ("REGISTRY_AUTH_FILE", "/a"),
            ("XDG_RUNTIME_DIR", "/r"),
        ];
        let expected = [
            ("/a".to_owned(), true),
            ("/d/config.json".to_owned(), false),
            ("/r/containers/auth.json".to_owned(), false),
        ];
        assert_eq!(files(&all), expected);
    }

    #[test]
    fn mirrors_are_counted_where_there_are_any() {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("r.io")).unwrap();
        fs::write(place.path().join("r.io/hosts.toml"), "").unwrap();
        let said = |directory: Option<&Path>| found(|report| judge_hosts(directory, report)).remove(0);
        assert!(said(Some(place.path())).1.starts_with("1 host "));
        assert_eq!(said(Some(Path::new("/nonesuch"))).0, Level::Ok);
        assert_eq!(said(None).0, Level::Ok);
        assert_eq!(said(Some(&place.path().join("r.io/hosts.toml"))).0, Level::Fail);
    }
}
