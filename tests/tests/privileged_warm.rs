//! Images that are warmed through the control API, and logins that are handed over on it: what the registry sees of both.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::image_service_client::ImageServiceClient;
use hullspeed_proto::cri::v1::{AuthConfig, ImageSpec, PullImageRequest};
use hullspeed_proto::hullspeed::control::v1::layer_progress::State;
use hullspeed_proto::hullspeed::control::v1::snapshotter_control_client::SnapshotterControlClient;
use hullspeed_proto::hullspeed::control::v1::{
    ForgetCredentialsRequest, SetCredentialsRequest, Share, StatusRequest, WarmProgress, WarmRequest,
    forget_credentials_request, set_credentials_request,
};
use hullspeed_tests::cri::{Pod, connect};
use hullspeed_tests::fixture::{LARGE_FILE, large_content};
use hullspeed_tests::layout::LayoutImage;
use hullspeed_tests::prewarm::{Prewarm, PrewarmOptions};
use hullspeed_tests::process::Process;
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use hullspeed_tests::{registry, snapshotter};
use tonic::transport::Channel;
use tonic::{Code, Status};

type Control = SnapshotterControlClient<Channel>;

/// A user of the private registry.
const USER: &str = "hull";
/// Their password, which is nowhere else.
const PASSWORD: &str = "correct-horse-battery-7";
/// `base64(USER:PASSWORD)`.
const ENCODED: &str = "aHVsbDpjb3JyZWN0LWhvcnNlLWJhdHRlcnktNw==";
/// bcrypt of the password.
const HTPASSWD: &str = "hull:$2b$05$abcdefghijklmnopqrstuuq17Gac4tyjXgv0dYB9MAoOS2CwVaxX.\n";

async fn control(socket: &Path) -> Control {
    SnapshotterControlClient::new(connect(socket).await.unwrap())
}

fn request(image: &str, manifest: &str, share: Share) -> WarmRequest {
    WarmRequest {
        image: image.to_owned(),
        manifest_digest: manifest.to_owned(),
        share: share.into(),
        platform: String::new(),
    }
}

/// Warms to the end.
async fn warm(control: &mut Control, request: WarmRequest) -> Result<WarmProgress, Status> {
    let mut reports = control.warm(request).await?.into_inner();
    let mut last = WarmProgress::default();
    while let Some(report) = reports.message().await? {
        last = report;
    }
    assert!(last.done, "the last report does not say so: {last:?}");
    Ok(last)
}

fn assert_resident(progress: &WarmProgress, image: &LayoutImage) {
    let layers: Vec<&str> = progress.layers.iter().map(|layer| layer.digest.as_str()).collect();
    assert_eq!(layers, image.layer_digests());
    assert!(
        progress.layers.iter().all(|layer| layer.state() == State::Resident),
        "{progress:?}"
    );
    assert_eq!(progress.bytes_resident, progress.bytes_wanted);
}

/// Requests for manifests, and for the blobs of `image`'s layers.
fn counts(scenario: &Scenario, image: &LayoutImage) -> (usize, usize) {
    let requests = scenario.proxy.requests();
    let of_layer = |path: &str| {
        image
            .layer_digests()
            .iter()
            .any(|digest| path.contains(digest.as_str()))
    };
    let manifests = requests
        .iter()
        .filter(|record| record.path.contains("/manifests/"))
        .count();
    let blobs = requests.iter().filter(|record| of_layer(&record.path)).count();
    (manifests, blobs)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_warm_needs_no_registry() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    let mut control = control(&node.snapshotter().unwrap().socket()).await;
    let image = scenario.reference(CONVERTED);
    let layers = scenario.converted.layers().len();

    scenario.proxy.reset();
    let tocs = warm(&mut control, request(&image, "", Share::Toc)).await.unwrap();
    assert_resident(&tocs, &scenario.converted);
    assert_eq!(counts(&scenario, &scenario.converted), (1, layers));
    warm(&mut control, request(&image, &tocs.manifest_digest, Share::Toc))
        .await
        .unwrap();
    warm(&mut control, request(&image, "", Share::Toc)).await.unwrap();
    assert_eq!(counts(&scenario, &scenario.converted), (2, layers));
    let hot = warm(&mut control, request(&image, &tocs.manifest_digest, Share::Hot))
        .await
        .unwrap();
    assert_resident(&hot, &scenario.converted);
    let all = warm(&mut control, request(&image, "", Share::All)).await.unwrap();
    assert_resident(&all, &scenario.converted);
    assert!(all.bytes_wanted >= large_content().len() as u64);
    let (manifests, blobs) = counts(&scenario, &scenario.converted);
    assert!(manifests == 3 && blobs > layers, "{manifests} {blobs}");
    // Nothing was asked for twice.
    let received: u64 = scenario.proxy.requests().iter().map(|record| record.body_bytes).sum();
    let size: u64 = all.layers.iter().map(|layer| layer.blob_bytes).sum();
    assert!(received < size + size / 50 + 100_000, "{received} bytes for {size}");
    let again = warm(&mut control, request(&image, &all.manifest_digest, Share::All))
        .await
        .unwrap();
    assert_resident(&again, &scenario.converted);
    assert_eq!(counts(&scenario, &scenario.converted), (manifests, blobs));
    let status = control.status(StatusRequest {}).await.unwrap().into_inner();
    assert!(
        status.lazy && status.layers_mounted == 0 && status.warms == 0,
        "{status:?}"
    );

    // containerd needs manifest and configuration; the layers' blobs are gone.
    scenario.proxy.reset();
    for digest in scenario.converted.layer_digests() {
        scenario.proxy.inject(FaultRule::get(digest, Fault::Status(503)));
    }
    node.cri.pull(&image).await.unwrap();
    node.check_lazy(&scenario.converted).unwrap();
    let pod = Pod::new(
        "warm",
        &scenario.run.directory("pods").unwrap(),
        &scenario.run.names().cgroup,
    );
    let sandbox = node.cri.run_sandbox(&pod).await.unwrap();
    let container = node.cri.create_container(&sandbox, &pod, "main", &image).await.unwrap();
    node.cri.start_container(&container).await.unwrap();
    let root = node.containerd.rootfs(&container);
    assert!(fs::read(root.join(LARGE_FILE)).unwrap() == large_content());
    assert_eq!(
        counts(&scenario, &scenario.converted).1,
        0,
        "{:#?}",
        scenario.proxy.requests()
    );
    node.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_cancelled_stops_and_what_is_not_lazy_is_no_error() {
    let scenario = Scenario::fixture().await.unwrap();
    let snapshotter = snapshotter::Snapshotter::start(&scenario.run, "snapshotter", "")
        .await
        .unwrap();
    let mut control = control(&snapshotter.socket()).await;
    let plain = warm(&mut control, request(&scenario.plain_reference(), "", Share::All))
        .await
        .unwrap();
    let lazy_not = |layer: &hullspeed_proto::hullspeed::control::v1::LayerProgress| {
        layer.state() == State::NotLazy && layer.reason == "no_toc_digest" && !layer.error.is_empty()
    };
    assert!(
        plain.layers.len() == 3 && plain.layers.iter().all(lazy_not),
        "{plain:?}"
    );

    let slow = Duration::from_secs(30);
    scenario.proxy.inject(FaultRule::get("/blobs/", Fault::Slow(slow)));
    let image = scenario.reference(CONVERTED);
    let mut reports = control
        .warm(request(&image, "", Share::All))
        .await
        .unwrap()
        .into_inner();
    assert!(!reports.message().await.unwrap().unwrap().done);
    assert_eq!(control.status(StatusRequest {}).await.unwrap().into_inner().warms, 1);
    drop(reports);
    let end = Instant::now() + Duration::from_secs(5);
    while control.status(StatusRequest {}).await.unwrap().into_inner().warms > 0 {
        assert!(Instant::now() < end, "a cancelled warm goes on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    scenario.proxy.heal();
    let all = warm(&mut control, request(&image, "", Share::All)).await.unwrap();
    assert_resident(&all, &scenario.converted);

    for (request, code) in [
        (request(&scenario.reference("nonesuch"), "", Share::Toc), Code::NotFound),
        (request("127.0.0.1:1/a:1", "", Share::Toc), Code::Unavailable),
        (request("NO IMAGE", "", Share::Toc), Code::InvalidArgument),
    ] {
        assert_eq!(warm(&mut control, request).await.unwrap_err().code(), code);
    }
}

/// A second registry over the same storage, which wants a login.
fn private_registry(scenario: &Scenario) -> (Process, String) {
    let address = format!("127.0.0.1:{}", registry::free_port().unwrap());
    let directory = scenario.run.directory("private").unwrap();
    let (config, users) = (directory.join("config.yml"), directory.join("htpasswd"));
    fs::write(&users, HTPASSWD).unwrap();
    // JSON is YAML.
    let text = serde_json::json!({
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": true}},
        "storage": {"filesystem": {"rootdirectory": scenario.registry.storage()}},
        "auth": {"htpasswd": {"realm": "private", "path": users}},
        "http": {"addr": address},
    });
    fs::write(&config, text.to_string()).unwrap();
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
    let process = scenario.run.spawn("private", command).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(&address).is_err() {
        assert!(Instant::now() < end, "the private registry does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
    (process, address)
}

fn login(image: &str) -> SetCredentialsRequest {
    SetCredentialsRequest {
        place: Some(set_credentials_request::Place::Image(image.to_owned())),
        username: USER.to_owned(),
        password: PASSWORD.to_owned(),
        ..SetCredentialsRequest::default()
    }
}

/// Files below `directory` that hold the password in either form. Mounted layers are left out.
fn files_with_secrets(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() && !path.ends_with("mnt") {
                directories.push(path);
            } else if metadata.is_file() && has_secret(&fs::read(&path).unwrap()) {
                found.push(path);
            }
        }
    }
    found
}

fn has_secret(bytes: &[u8]) -> bool {
    [PASSWORD, ENCODED]
        .iter()
        .any(|secret| bytes.windows(secret.len()).any(|window| window == secret.as_bytes()))
}

/// The daemon speaks of everything it does, and its secrets are not among that.
#[tokio::test(flavor = "multi_thread")]
async fn logins_that_are_handed_over_open_a_private_registry_and_are_never_written_down() {
    assert!(has_secret(format!("x{PASSWORD}").as_bytes()) && has_secret(ENCODED.as_bytes()));
    let scenario = Scenario::fixture().await.unwrap();
    let (_registry, address) = private_registry(&scenario);
    let image = format!("{address}/test/image:{CONVERTED}");
    let mut node = scenario.lazy_node("").await.unwrap();
    let (socket, config) = {
        let snapshotter = node.snapshotter().unwrap();
        snapshotter.process().stop().unwrap();
        (snapshotter.socket(), snapshotter.config())
    };
    let mut command = snapshotter::command(&config).unwrap();
    command.args(["--log-level", "trace"]);
    let talkative = scenario.run.spawn("snapshotter-trace", command).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end, "{}", talkative.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut control = control(&socket).await;
    let toc = || request(&image, "", Share::Toc);
    assert_eq!(
        warm(&mut control, toc()).await.unwrap_err().code(),
        Code::Unauthenticated
    );
    let elsewhere = SetCredentialsRequest {
        registry: "registry.example.com".to_owned(),
        ..login(&image)
    };
    let refused = control.set_credentials(elsewhere).await.unwrap_err();
    assert!(refused.code() == Code::InvalidArgument && !format!("{refused:?}").contains(PASSWORD));
    // Base64, as CRI allows.
    let encoded = SetCredentialsRequest {
        username: String::new(),
        password: String::new(),
        auth: ENCODED.to_owned(),
        ..login(&image)
    };
    control.set_credentials(encoded).await.unwrap();
    assert_resident(&warm(&mut control, toc()).await.unwrap(), &scenario.converted);
    let forget = ForgetCredentialsRequest {
        place: Some(forget_credentials_request::Place::Prefix(address.clone())),
    };
    assert_eq!(
        control.forget_credentials(forget).await.unwrap().into_inner().forgotten,
        1
    );
    assert_eq!(
        warm(&mut control, toc()).await.unwrap_err().code(),
        Code::Unauthenticated
    );

    // A pull as the kubelet makes it. The content of the layers is not there yet, and comes from the private registry.
    control.set_credentials(login(&image)).await.unwrap();
    let mut images = ImageServiceClient::new(connect(&node.containerd.socket()).await.unwrap());
    let pull = PullImageRequest {
        image: Some(ImageSpec {
            image: image.clone(),
            ..ImageSpec::default()
        }),
        auth: Some(AuthConfig {
            username: USER.to_owned(),
            password: PASSWORD.to_owned(),
            ..AuthConfig::default()
        }),
        sandbox_config: None,
    };
    let end = Instant::now() + Duration::from_secs(20);
    // containerd dials a snapshotter that was gone again after a pause.
    while let Err(error) = images.pull_image(pull.clone()).await {
        assert!(Instant::now() < end, "{error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    node.check_lazy(&scenario.converted).unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    node.snapshots.remove(view).await.unwrap();
    assert_eq!(
        control.status(StatusRequest {}).await.unwrap().into_inner().credentials,
        1
    );

    let root = node.snapshotter().unwrap().root();
    assert_eq!(files_with_secrets(root.parent().unwrap()), Vec::<PathBuf>::new());
    let log = fs::read(talkative.log()).unwrap();
    assert!(log.len() > 10_000, "the log is not talkative");
    let said = String::from_utf8_lossy(&log);
    let told = said.lines().find(|line| has_secret(line.as_bytes()));
    assert!(told.is_none(), "the log has the password: {told:?}");
    node.cri.remove_everything().await.unwrap();
}

/// A pull of `image` with a password, as the kubelet makes it.
fn pull_with(image: &str, password: &str) -> PullImageRequest {
    PullImageRequest {
        image: Some(ImageSpec {
            image: image.to_owned(),
            ..ImageSpec::default()
        }),
        auth: Some(AuthConfig {
            username: USER.to_owned(),
            password: password.to_owned(),
            ..AuthConfig::default()
        }),
        sandbox_config: None,
    }
}

/// Reads `length` bytes of a mounted file from `start`.
fn part(file: &fs::File, start: usize, length: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, start as u64)?;
    Ok(bytes)
}

/// Somebody pulls with a wrong password what others read already.
#[tokio::test(flavor = "multi_thread")]
async fn a_pull_with_a_wrong_login_takes_the_right_one_from_nobody() {
    let scenario = Scenario::fixture().await.unwrap();
    let (_registry, address) = private_registry(&scenario);
    let image = format!("{address}/test/image:{CONVERTED}");
    let mut node = scenario.lazy_node("[fetch]\nprefetch = false\n").await.unwrap();
    let socket = node.snapshotter().unwrap().socket();
    let mut control = control(&socket).await;
    let options = PrewarmOptions {
        name: "prewarm".to_owned(),
        containerd: node.containerd.socket(),
        hulls: 0,
        as_shipped: false,
        extra: format!("\n[warm]\nsnapshotter = {:?}\n", socket.to_string_lossy()),
    };
    let prewarm = Prewarm::start(&scenario.run, &options).unwrap();
    let mut images = ImageServiceClient::new(connect(&prewarm.socket()).await.unwrap());
    images.pull_image(pull_with(&image, PASSWORD)).await.unwrap();
    node.check_lazy(&scenario.converted).unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    let (file, content) = (fs::File::open(view.path().join(LARGE_FILE)).unwrap(), large_content());
    let step = content.len() / 8;
    for number in 0..4 {
        images.pull_image(pull_with(&image, "wrong")).await.unwrap_err();
        let read = part(&file, number * step, step).unwrap();
        assert!(read == content[number * step..][..step], "part {number}");
    }
    let end = Instant::now() + Duration::from_secs(10);
    while control.status(StatusRequest {}).await.unwrap().into_inner().credentials != 1 {
        assert!(Instant::now() < end, "the wrong login is not withdrawn");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // One that somebody vouches for, and that is wrong all the same.
    let wrong = SetCredentialsRequest {
        password: "wrong too".to_owned(),
        ..login(&image)
    };
    control.set_credentials(wrong).await.unwrap();
    let read = part(&file, 4 * step, content.len() - 4 * step).unwrap();
    assert!(read == content[4 * step..]);
    drop(file);
    node.snapshots.remove(view).await.unwrap();
    node.cri.remove_everything().await.unwrap();
}
