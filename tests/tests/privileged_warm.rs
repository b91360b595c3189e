//! Images that are warmed through the control API, and logins that are handed over on it: what the registry sees of both.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
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
use hullspeed_tests::login::{ENCODED, HTPASSWD, PASSWORD, USER, files_with_secrets, has_secret};
use hullspeed_tests::prewarm::{Prewarm, PrewarmOptions};
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::registry::Registry;
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use hullspeed_tests::snapshotter;
use tonic::transport::Channel;
use tonic::{Code, Status};

type Control = SnapshotterControlClient<Channel>;

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

fn login(image: &str) -> SetCredentialsRequest {
    SetCredentialsRequest {
        place: Some(set_credentials_request::Place::Image(image.to_owned())),
        username: USER.to_owned(),
        password: PASSWORD.to_owned(),
        ..SetCredentialsRequest::default()
    }
}

/// The daemon speaks of everything it does, and its secrets are not among that.
#[tokio::test(flavor = "multi_thread")]
async fn logins_that_are_handed_over_open_a_private_registry_and_are_never_written_down() {
    let scenario = Scenario::fixture().await.unwrap();
    let private = Registry::start_private(&scenario.run, scenario.registry.storage(), HTPASSWD).unwrap();
    let image = format!("{}/test/image:{CONVERTED}", private.address());
    let mut node = scenario.lazy_node("level = \"trace\"\n").await.unwrap();
    let mut control = control(&node.snapshotter().unwrap().socket()).await;
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
        place: Some(forget_credentials_request::Place::Prefix(private.address().to_string())),
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
    images.pull_image(pull_with(&image, PASSWORD)).await.unwrap();
    node.check_lazy(&scenario.converted).unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    node.snapshots.remove(view).await.unwrap();
    assert_eq!(
        control.status(StatusRequest {}).await.unwrap().into_inner().credentials,
        1
    );

    let snapshotter = node.snapshotter().unwrap();
    let kept = files_with_secrets(snapshotter.root().parent().unwrap()).unwrap();
    assert_eq!(kept, Vec::<PathBuf>::new());
    let said = snapshotter.process().log_text().unwrap();
    assert!(said.len() > 10_000, "the log is not talkative");
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
    let private = Registry::start_private(&scenario.run, scenario.registry.storage(), HTPASSWD).unwrap();
    let image = format!("{}/test/image:{CONVERTED}", private.address());
    let mut node = scenario.lazy_node("[fetch]\nprefetch = false\n").await.unwrap();
    let socket = node.snapshotter().unwrap().socket();
    let mut control = control(&socket).await;
    let options = PrewarmOptions {
        extra: format!("\n[warm]\nsnapshotter = {:?}\n", socket.to_string_lossy()),
        ..PrewarmOptions::new(node.containerd.socket(), Some(0))
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
