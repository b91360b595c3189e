//! containerd: whether it answers, its version and configuration.

use hullspeed_daemon::doctor::containerd::{ImagePolicy, SNAPSHOTTER, examine_version};
use hullspeed_daemon::error::chain;
use hullspeed_proto::cri::v1::{StatusRequest, VersionRequest};
use tokio::time::timeout;
use tonic::{Code, Response, Status};

use super::{ANSWER_LIMIT, Report};
use crate::config::Config;
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::pool::{Preview, preview};
use crate::run::pool_options;

/// What containerd says, if it answers.
pub(super) async fn examine(config: &Config, report: &mut Report) -> Option<Facts> {
    let containerd = Containerd::at(&config.containerd.address);
    let mut runtime = containerd.runtime();
    let version = match limited(runtime.version(VersionRequest::default())).await {
        Ok(version) => version.runtime_version,
        Err(status) => {
            unreachable(config, &status, report);
            return None;
        }
    };
    examine_version(&version, report);
    match limited(runtime.status(StatusRequest { verbose: true })).await {
        Ok(status) => {
            let conditions = status.status.unwrap_or_default().conditions;
            let wrong: Vec<_> = conditions.iter().filter(|condition| !condition.status).collect();
            if wrong.is_empty() {
                report.ok("cri", "runtime and network are ready");
            }
            for condition in wrong {
                let says = format!("{}: {} {}", condition.r#type, condition.reason, condition.message);
                report.fail("cri", says, "containerd starts no pods like this; see its log");
            }
            ImagePolicy::of_status(&status.info).examine_annotations(SNAPSHOTTER, report);
        }
        Err(status) => report.fail(
            "cri",
            format!("Status failed: {}", status.message()),
            "see containerd's log",
        ),
    }
    match Facts::read(&containerd).await {
        Ok(facts) => {
            examine_facts(config, &facts, report);
            Some(facts)
        }
        Err(error) => {
            let advice = "hulls cannot be made for this containerd; calls are passed on as they are";
            report.fail("config", chain(&error), advice);
            None
        }
    }
}

fn unreachable(config: &Config, status: &Status, report: &mut Report) {
    let address = config.containerd.address.display();
    if status.code() == Code::Unimplemented {
        let says = format!("{address} does not speak CRI v1");
        let advice = "containerd 1.6 or later is needed, and \"cri\" may not be in its disabled_plugins";
        return report.fail("containerd", says, advice);
    }
    let mut cause = status.message().to_owned();
    if let Some(source) = std::error::Error::source(status) {
        cause = format!("{cause}: {}", chain(source));
    }
    let advice = "start it, or set containerd.address; the relay waits for it meanwhile";
    report.fail("containerd", format!("{address} does not answer: {cause}"), advice);
}

fn examine_facts(config: &Config, facts: &Facts, report: &mut Report) {
    let Preview { off, handlers } = preview(facts, &pool_options(config));
    if let Some(off) = off {
        report.warn("pool", format!("would be off: {}", off.detail), advice(off.reason));
    }
    for (name, networks) in handlers {
        let shown = if name.is_empty() { "(default)" } else { &name };
        match networks {
            Ok(networks) => report.ok("hulls for", format!("{shown}: possible, in {}", networks.join(", "))),
            Err(off) => report.warn(
                "hulls for",
                format!("{shown}: none, because {}", off.detail),
                advice(off.reason),
            ),
        }
    }
    let image = if facts.sandbox_image.is_empty() {
        "the pause image"
    } else {
        &facts.sandbox_image
    };
    if facts.pause_images.is_empty() {
        let advice = "nothing has to be done: the first pod or hull pulls it";
        report.warn("pause", format!("{image} is not there yet"), advice);
    } else {
        report.ok("pause", format!("{image} is there"));
    }
}

/// What can be done about hulls that are not made.
pub(super) fn advice(reason: &str) -> &'static str {
    match reason {
        "cni_absent" | "cni_invalid" => "install a network as containerd needs it",
        "cni_loading" => "wait a moment; if it stays, restart containerd",
        "nri" => "if the NRI plugins may see a hull's name instead of its pod's, set pool.allow_nri",
        "config" => "nothing, if that is wanted; the keys are pool.enabled, adoption.enabled and cni.override",
        reason if reason.starts_with("cni") => {
            "hulls need a network that does not depend on the pod; if yours does not, cni.allow or cni.override say so"
        }
        reason if reason.starts_with("handler") => "correct pool.handlers",
        _ => "see the daemon's log",
    }
}

pub(super) async fn limited<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
    match timeout(ANSWER_LIMIT, call).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {ANSWER_LIMIT:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    #[test]
    fn networks_handlers_and_the_pause_image_are_looked_at() {
        let place = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.pool.handlers = vec![String::new(), "kata".to_owned(), "none".to_owned()];
        let handler = |runtime_type: &str| crate::containerd::facts::Handler {
            runtime_type: runtime_type.to_owned(),
            ..Default::default()
        };
        let facts = Facts {
            default_handler: "runc".to_owned(),
            handlers: [("runc", "io.containerd.runc.v2"), ("kata", "io.containerd.kata.v2")]
                .map(|(name, kind)| (name.to_owned(), handler(kind)))
                .into(),
            cni_conf_dir: place.path().to_owned(),
            ..Facts::default()
        };
        let says = |plugin: &str| {
            let text = format!(r#"{{"cniVersion":"0.4.0","name":"net","plugins":[{{"type":"{plugin}"}}]}}"#);
            std::fs::write(place.path().join("1.conflist"), text).unwrap();
            let mut report = Report::default();
            examine_facts(&config, &facts, &mut report);
            let lines = report.findings.iter().filter(|finding| finding.check != "pool");
            lines
                .map(|finding| (finding.level, finding.says.clone()))
                .collect::<Vec<_>>()
        };
        let calico = says("calico");
        let levels: Vec<_> = calico.iter().map(|(level, _)| *level).collect();
        assert_eq!(levels, [Level::Warn; 4]);
        assert!(
            calico[0].1.contains("(default)") && calico[0].1.contains("calico"),
            "{calico:?}"
        );
        let bandwidth = says("bandwidth");
        assert_eq!(bandwidth[0], (Level::Ok, "(default): possible, in net".to_owned()));
        assert!(bandwidth[1].1.contains("kata") && bandwidth[2].1.contains("none"));
    }
}
