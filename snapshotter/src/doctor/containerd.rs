//! containerd: whether it answers, has our snapshotter, uses it for pods, and tells it of images.

use std::path::{Path, PathBuf};

use hullspeed_daemon::doctor::containerd::{ImagePolicy, SNAPSHOTTER, examine_version};
use hullspeed_daemon::doctor::{Report, processes};
use hullspeed_daemon::error::chain;
use hullspeed_daemon::grpc::connect_lazily;
use hullspeed_proto::containerd::services::introspection::v1::introspection_client::IntrospectionClient;
use hullspeed_proto::containerd::services::introspection::v1::{Plugin, PluginsRequest};
use hullspeed_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use hullspeed_proto::cri::v1::{StatusRequest, VersionRequest};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::{ANSWER_LIMIT, Places};
use crate::config::Config;

mod file;

/// Plugins that are snapshotters, proxies among them.
const SNAPSHOTTERS: &str = "type==io.containerd.snapshotter.v1";
/// What a proxy plugin tells of itself.
const ADDRESS: &str = "address";
/// What CRI uses if its configuration says nothing.
const DEFAULT_SNAPSHOTTER: &str = "overlayfs";

pub(super) async fn examine(config: &Config, places: &Places, report: &mut Report) {
    let channel = connect_lazily(&places.containerd, ANSWER_LIMIT);
    let plugins = match plugins(channel.clone()).await {
        Ok(plugins) => plugins,
        Err(status) => return unreachable(places, &status, report),
    };
    let known = judge_plugins(&plugins, &config.socket, report);
    let mut runtime = RuntimeServiceClient::new(channel);
    match limited(runtime.version(VersionRequest::default())).await {
        Ok(version) => examine_version(&version.runtime_version, report),
        Err(status) => {
            return report.warn(
                "cri",
                format!("CRI does not answer: {}", status.message()),
                "without CRI (\"cri\" in disabled_plugins?) there are no pods; ctr and nerdctl work nevertheless",
            );
        }
    }
    let told = match limited(runtime.status(StatusRequest { verbose: true })).await {
        Ok(status) => ImagePolicy::of_status(&status.info),
        Err(status) => {
            return report.warn(
                "cri",
                format!("Status failed: {}", status.message()),
                "see containerd's log",
            );
        }
    };
    let written = file::read(&config_file(places));
    let policy = match written {
        Ok(written) => merged(told, written),
        // What it says of itself is enough, if it does.
        Err(_) if told.snapshotter.is_some() => told,
        Err(error) => {
            return report.warn(
                "cri",
                format!("which snapshotter it uses is not known: {}", chain(&error)),
                "look at the snapshotter of CRI's images in containerd's configuration",
            );
        }
    };
    judge_policy(&policy, known.as_deref(), report);
}

async fn plugins(channel: Channel) -> Result<Vec<Plugin>, Status> {
    let mut introspection = IntrospectionClient::new(channel);
    let filters = vec![SNAPSHOTTERS.to_owned()];
    Ok(limited(introspection.plugins(PluginsRequest { filters }))
        .await?
        .plugins)
}

async fn limited<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match timeout(ANSWER_LIMIT, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {ANSWER_LIMIT:?}"))),
    }
}

fn unreachable(places: &Places, status: &Status, report: &mut Report) {
    let address = places.containerd.display();
    if status.code() == Code::Unimplemented {
        let says = format!("{address} is not containerd");
        return report.fail("containerd", says, "say where it is: doctor --containerd SOCKET");
    }
    // What it says itself is the last of these.
    let cause = std::error::Error::source(status).map_or_else(|| status.message().to_owned(), chain);
    report.fail(
        "containerd",
        format!("{address} does not answer: {cause}"),
        "start it, or say where it is: doctor --containerd SOCKET",
    );
}

/// Our proxy plugin's name, if containerd has it.
fn judge_plugins(plugins: &[Plugin], socket: &Path, report: &mut Report) -> Option<String> {
    let address = |plugin: &Plugin| plugin.exports.get(ADDRESS).map(PathBuf::from);
    let is_ours = |plugin: &&Plugin| {
        let address = address(plugin);
        address.is_some_and(|address| {
            address == socket || address.as_os_str() == format!("unix://{}", socket.display()).as_str()
        })
    };
    if let Some(plugin) = plugins.iter().find(is_ours) {
        if let Some(error) = &plugin.init_err {
            let says = format!("the proxy plugin {:?} was not loaded: {}", plugin.id, error.message);
            report.fail("plugin", says, "see containerd's log, and restart it");
        } else {
            report.ok("plugin", format!("containerd has the snapshotter as {:?}", plugin.id));
        }
        return Some(plugin.id.clone());
    }
    let elsewhere = plugins.iter().find(|plugin| plugin.id == SNAPSHOTTER);
    match elsewhere {
        Some(plugin) => report.fail(
            "plugin",
            match address(plugin) {
                Some(address) => format!(
                    "the proxy plugin {SNAPSHOTTER:?} goes to {}, not to {}",
                    address.display(),
                    socket.display()
                ),
                None => format!("the plugin {SNAPSHOTTER:?} does not say where it goes"),
            },
            "make its address in containerd's configuration and the key socket the same, and restart containerd",
        ),
        None => report.fail(
            "plugin",
            format!("containerd has no proxy plugin for {}", socket.display()),
            "add [proxy_plugins.hullspeed] as in deploy/containerd, and restart containerd",
        ),
    }
    None
}

/// The file that the running containerd was started with, or the usual one.
fn config_file(places: &Places) -> PathBuf {
    let owners = processes::listeners(&places.containerd, &places.proc);
    let arguments = owners.iter().find_map(|(process, name)| {
        let process = places.proc.join(process.to_string());
        (name == "containerd").then(|| processes::arguments(&process)).flatten()
    });
    let named = arguments.and_then(|arguments| {
        let long = processes::flag(&arguments, "--config");
        long.or_else(|| processes::flag(&arguments, "-c"))
    });
    named.map_or_else(|| places.containerd_config.clone(), PathBuf::from)
}

/// What containerd says of itself is right; what it does not say is what it was told, or its default.
fn merged(told: ImagePolicy, written: ImagePolicy) -> ImagePolicy {
    let snapshotter = told.snapshotter.or(written.snapshotter);
    ImagePolicy {
        snapshotter: Some(snapshotter.unwrap_or_else(|| DEFAULT_SNAPSHOTTER.to_owned())),
        hides_images: Some(told.hides_images.or(written.hides_images).unwrap_or(true)),
    }
}

fn judge_policy(policy: &ImagePolicy, ours: Option<&str>, report: &mut Report) {
    let used = policy.snapshotter.as_deref().unwrap_or(DEFAULT_SNAPSHOTTER);
    match ours {
        Some(ours) if ours == used => report.ok("cri", format!("pods' images use the snapshotter {used:?}")),
        Some(ours) => report.warn(
            "cri",
            format!("pods' images use the snapshotter {used:?}: none of their layers is lazy"),
            format!("set snapshotter = {ours:?} for CRI's images in containerd's configuration"),
        ),
        None => report.warn(
            "cri",
            format!("pods' images use the snapshotter {used:?}"),
            "the line `plugin` comes first",
        ),
    }
    policy.examine_annotations(ours.unwrap_or(SNAPSHOTTER), report);
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;
    use hullspeed_proto::containerd::services::introspection::v1::InitError;

    use super::*;

    fn found(look: impl FnOnce(&mut Report)) -> Vec<(&'static str, Level)> {
        let mut report = Report::default();
        look(&mut report);
        report
            .findings
            .iter()
            .map(|finding| (finding.check, finding.level))
            .collect()
    }

    fn plugin(id: &str, address: &str) -> Plugin {
        Plugin {
            id: id.to_owned(),
            exports: [(ADDRESS.to_owned(), address.to_owned())].into(),
            ..Plugin::default()
        }
    }

    #[test]
    fn our_plugin_is_the_one_that_comes_to_our_socket() {
        let socket = Path::new("/run/hullspeed/s.sock");
        let judged = |plugins: &[Plugin]| {
            let mut name = None;
            let found = found(|report| name = judge_plugins(plugins, socket, report));
            (name, found[0].1)
        };
        let overlayfs = Plugin {
            id: "overlayfs".to_owned(),
            ..Plugin::default()
        };
        let ours = plugin("lazy", "/run/hullspeed/s.sock");
        assert_eq!(
            judged(&[overlayfs.clone(), ours.clone()]),
            (Some("lazy".to_owned()), Level::Ok)
        );
        let with_scheme = plugin("hullspeed", "unix:///run/hullspeed/s.sock");
        assert_eq!(judged(&[with_scheme]), (Some("hullspeed".to_owned()), Level::Ok));
        assert_eq!(judged(&[plugin("hullspeed", "/other")]), (None, Level::Fail));
        assert_eq!(judged(&[overlayfs]), (None, Level::Fail));
        assert_eq!(judged(&[]), (None, Level::Fail));
        let broken = Plugin {
            init_err: Some(InitError::default()),
            ..ours
        };
        assert_eq!(judged(&[broken]).1, Level::Fail);
    }

    #[test]
    fn pods_should_use_our_snapshotter_and_it_should_be_told_of_images() {
        let policy = |snapshotter: Option<&str>, hides_images| ImagePolicy {
            snapshotter: snapshotter.map(str::to_owned),
            hides_images,
        };
        let nothing = ImagePolicy::default;
        for (policy, ours, expected) in [
            (
                merged(policy(Some("h"), Some(false)), nothing()),
                Some("h"),
                vec![("cri", Level::Ok), ("annotations", Level::Ok)],
            ),
            // containerd 2 does not say it itself.
            (
                merged(nothing(), policy(Some("h"), Some(false))),
                Some("h"),
                vec![("cri", Level::Ok), ("annotations", Level::Ok)],
            ),
            // By default the snapshotter is told nothing.
            (
                merged(nothing(), policy(Some("h"), None)),
                Some("h"),
                vec![("cri", Level::Ok), ("annotations", Level::Warn)],
            ),
            (merged(nothing(), nothing()), Some("h"), vec![("cri", Level::Warn)]),
            (
                merged(policy(Some("h"), None), nothing()),
                None,
                vec![("cri", Level::Warn)],
            ),
        ] {
            assert_eq!(
                found(|report| judge_policy(&policy, ours, report)),
                expected,
                "{policy:?}"
            );
        }
    }

    #[test]
    fn who_does_not_answer_is_told_from_who_is_somebody_else() {
        let places = Places::with_containerd(Path::new("/nonesuch/c.sock"));
        for status in [Status::unimplemented(""), Status::unavailable("no such file")] {
            assert_eq!(
                found(|report| unreachable(&places, &status, report)),
                [("containerd", Level::Fail)]
            );
        }
    }
}
