//! Both daemons on one node, as they are installed: logins that a kubelet sends to the relay open private images to the
//! snapshotter, and the relay's policy file makes images resident there.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::image_service_client::ImageServiceClient;
use hullspeed_proto::cri::v1::{AuthConfig, ImageSpec, PullImageRequest};
use hullspeed_proto::hullspeed::control::v1::StatusRequest;
use hullspeed_proto::hullspeed::control::v1::snapshotter_control_client::SnapshotterControlClient;
use hullspeed_tests::cri::{Pod, connect};
use hullspeed_tests::fixture::{LARGE_FILE, large_content};
use hullspeed_tests::login::{ENCODED, HTPASSWD, PASSWORD, USER, files_with_secrets, has_secret};
use hullspeed_tests::prewarm::{Prewarm, PrewarmOptions};
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::registry::Registry;
use hullspeed_tests::scenario::{CONVERTED, Node, Scenario};
use serde_json::Value;
use tonic::Status;

/// For whatever should happen; a warm that has failed is tried again after seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// Both daemons say all that they can.
const TRACE: &str = "level = \"trace\"\n";

fn policy_path(scenario: &Scenario) -> PathBuf {
    scenario.run.path().join("warm.toml")
}

/// The relay in front of this node's containerd, joined to its snapshotter.
fn join(scenario: &Scenario, node: &mut Node) -> Prewarm {
    let quoted = |path: &Path| Value::from(path.to_str().unwrap()).to_string();
    let snapshotter = quoted(&node.snapshotter().unwrap().socket());
    let policy = quoted(&policy_path(scenario));
    let options = PrewarmOptions {
        log_level: "trace",
        extra: format!("\n[warm]\npolicy = {policy}\nsnapshotter = {snapshotter}\n"),
        ..PrewarmOptions::new(node.containerd.socket(), Some(1))
    };
    Prewarm::start(&scenario.run, &options).unwrap()
}

async fn pull(socket: &Path, image: &str, auth: Option<AuthConfig>) -> Result<String, Status> {
    let mut images = ImageServiceClient::new(connect(socket).await.unwrap());
    let image = ImageSpec {
        image: image.to_owned(),
        ..ImageSpec::default()
    };
    let request = PullImageRequest {
        image: Some(image),
        auth,
        sandbox_config: None,
    };
    Ok(images.pull_image(request).await?.into_inner().image_ref)
}

/// Two forms of the same login, as CRI has them.
fn logins() -> [AuthConfig; 2] {
    let plain = AuthConfig {
        username: USER.to_owned(),
        password: PASSWORD.to_owned(),
        ..AuthConfig::default()
    };
    let encoded = AuthConfig {
        auth: ENCODED.to_owned(),
        ..AuthConfig::default()
    };
    [plain, encoded]
}

/// What a whole log says, which has to be a lot.
fn check_log(what: &str, said: &str) {
    assert!(said.len() > 10_000, "{what}'s log is not talkative");
    let told = said.lines().find(|line| has_secret(line.as_bytes()));
    assert!(told.is_none(), "{what}'s log has the password: {told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_sent_to_the_relay_opens_a_private_lazy_image_and_is_not_written_down() {
    let scenario = Scenario::fixture().await.unwrap();
    let private = Registry::start_private(&scenario.run, scenario.registry.storage(), HTPASSWD).unwrap();
    let image = format!("{}/test/image:{CONVERTED}", private.address());
    let mut node = scenario.lazy_node(TRACE).await.unwrap();
    let mut prewarm = join(&scenario, &mut node);
    prewarm.wait_for_hulls(1).await.unwrap();
    let mut cri = prewarm.cri().await.unwrap();
    let socket = node.snapshotter().unwrap().socket();
    let mut control = SnapshotterControlClient::new(connect(&socket).await.unwrap());
    let logins_kept = async |control: &mut SnapshotterControlClient<_>| {
        control.status(StatusRequest {}).await.unwrap().into_inner().credentials
    };

    let refused = pull(&prewarm.socket(), &image, None).await.unwrap_err();
    assert!(
        refused.message().contains("401") || refused.message().contains("authorization"),
        "{refused:?}"
    );
    assert_eq!(logins_kept(&mut control).await, 0);
    for (round, login) in logins().into_iter().enumerate() {
        pull(&prewarm.socket(), &image, Some(login)).await.unwrap();
        node.check_lazy(&scenario.converted).unwrap();
        assert_eq!(logins_kept(&mut control).await, 1);
        // In a hull, too; the content comes from the private registry as it is read.
        let logs = scenario.run.directory("pods").unwrap();
        let pod = Pod::new(&format!("private-{round}"), &logs, &scenario.run.names().cgroup);
        prewarm.wait_for_hulls(1).await.unwrap();
        let sandbox = cri.run_sandbox(&pod).await.unwrap();
        let container = cri.create_container(&sandbox, &pod, "main", &image).await.unwrap();
        cri.start_container(&container).await.unwrap();
        let root = node.containerd.rootfs(&container);
        assert!(fs::read(root.join(LARGE_FILE)).unwrap() == large_content());
        cri.remove_sandbox(&sandbox).await.unwrap();
        cri.remove_image(&image).await.unwrap();
    }
    assert_eq!(prewarm.requests("hit").await.unwrap(), 2);

    let snapshotter = node.snapshotter().unwrap();
    for metrics in [
        prewarm.metrics().text().await.unwrap(),
        snapshotter.metrics().await.unwrap(),
    ] {
        assert!(
            metrics.contains("# EOF") && !has_secret(metrics.as_bytes()),
            "{metrics}"
        );
    }
    assert!(!has_secret(prewarm.control(&["status", "--json"]).unwrap().as_bytes()));
    check_log("the relay", &prewarm.process().log_text().unwrap());
    check_log("the snapshotter", &snapshotter.process().log_text().unwrap());
    let kept = [prewarm.config(), snapshotter.config()].map(|config| {
        let found = files_with_secrets(config.parent().unwrap());
        found.unwrap()
    });
    assert_eq!(kept.concat(), Vec::<PathBuf>::new());
}

/// What the command says of warming.
fn status(prewarm: &Prewarm) -> Value {
    let text = prewarm.control(&["status", "--json"]).unwrap();
    let status: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    status["warm"].clone()
}

/// Waits until what it says is so; returns it.
async fn until(what: &str, prewarm: &Prewarm, holds: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + LIMIT;
    loop {
        let now = status(prewarm);
        if holds(&now) {
            return now;
        }
        assert!(Instant::now() < end, "{what} did not come: {now:#}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edited_policy_takes_effect_and_a_broken_one_does_not() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    let prewarm = join(&scenario, &mut node);
    assert_eq!(status(&prewarm)["images"], Value::Array(Vec::new()));
    let image = scenario.reference(CONVERTED);
    let entry = |share: &str| format!("[[image]]\nname = \"{image}\"\nshare = \"{share}\"\n");
    let write = |text: &str| fs::write(policy_path(&scenario), text).unwrap();

    // So slow that the way there can be watched.
    let late = FaultRule::get("/blobs/", Fault::Slow(Duration::from_millis(300)));
    scenario.proxy.inject(late);
    write(&entry("all"));
    let shown = until("an image that is warmed", &prewarm, |warm| {
        warm["images"][0]["state"] == "warming" && warm["images"][0]["bytes_wanted"].as_u64() > Some(0)
    })
    .await;
    let of_image = &shown["images"][0];
    assert_eq!(
        (&of_image["image"], &of_image["share"]),
        (&image.clone().into(), &"all".into())
    );
    assert!(
        of_image["bytes_resident"].as_u64() < of_image["bytes_wanted"].as_u64(),
        "{shown:#}"
    );
    scenario.proxy.heal();
    let is_resident = |warm: &Value| warm["images"][0]["state"] == "resident";
    let whole = until("a resident image", &prewarm, is_resident).await;
    let of_image = &whole["images"][0];
    assert!(of_image["bytes_wanted"].as_u64() >= Some(large_content().len() as u64));
    assert_eq!(of_image["bytes_resident"], of_image["bytes_wanted"]);
    assert_eq!(of_image["layers"], scenario.converted.layer_digests().len());
    assert_eq!(of_image["layers_resident"], of_image["layers"]);
    assert_eq!(
        (&whole["policy_problem"], &of_image["problem"]),
        (&"".into(), &"".into())
    );

    // A key that is misspelt, on a line of its own.
    write(&(entry("toc") + "priorty = 1\n"));
    let broken = until("a complaint", &prewarm, |warm| warm["policy_problem"] != "").await;
    let problem = broken["policy_problem"].as_str().unwrap();
    assert!(problem.contains("priorty"), "{problem}");
    assert_eq!(broken["images"], whole["images"], "the policy before it does not go on");
    let errors = prewarm.metric("hullspeed_warm_policy_errors_total", &[]).await.unwrap();
    assert_eq!(errors, 1.0);

    write(&(entry("toc") + "priority = 1\n"));
    let mended = until("the new policy", &prewarm, |warm| {
        warm["images"][0]["share"] == "toc" && is_resident(warm)
    })
    .await;
    assert_eq!(mended["policy_problem"], "");
    fs::remove_file(policy_path(&scenario)).unwrap();
    until("an empty policy", &prewarm, |warm| {
        warm["images"] == Value::Array(Vec::new())
    })
    .await;
}
