//! Sources of logins, as a registry sees them: files that change, providers that renew, and a 401 that asks every source again.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "common/servers.rs"]
mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use common::{Scripted, answer, text};
use hullspeed_registry::{Client, ClientOptions, Credentials, Digest, ErrorClass, Providers};

type Good = Arc<Mutex<Vec<String>>>;

/// A registry that takes the logins of some users by basic authentication.
async fn registry(users: &Good) -> Scripted {
    let users = users.clone();
    Scripted::start(move |seen| {
        let given = seen
            .authorization
            .as_deref()
            .and_then(|given| given.strip_prefix("Basic "));
        let decoded = given.and_then(|given| base64::engine::general_purpose::STANDARD.decode(given).ok());
        let user = decoded.map(|text| String::from_utf8(text).unwrap().split(':').next().unwrap().to_owned());
        match user {
            Some(user) if users.lock().unwrap().contains(&user) => answer(200, &[], ""),
            _ => answer(401, &[("www-authenticate", "Basic realm=\"x\"")], ""),
        }
    })
    .await
}

fn write(path: &Path, text: &str, mode: u32) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(mode)).unwrap();
    std::fs::rename(new, path).unwrap();
}

/// A file of logins, a docker configuration and a provider, whose logins are for the host of a registry.
struct Node {
    directory: tempfile::TempDir,
    host: String,
}

impl Node {
    fn new(host: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("bin")).unwrap();
        let config = format!(
            r#"{{"apiVersion":"kubelet.config.k8s.io/v1","kind":"CredentialProviderConfig","providers":[{{"name":"p","matchImages":["{host}"],
            "defaultCacheDuration":"1h","apiVersion":"credentialprovider.kubelet.k8s.io/v1"}}]}}"#
        );
        std::fs::write(directory.path().join("providers.json"), config).unwrap();
        let host = host.to_owned();
        let node = Self { directory, host };
        node.logins("file");
        node.docker("docker");
        node.provider("provider", "Registry");
        node
    }

    fn logins(&self, user: &str) {
        let text = format!("[login.'{}']\nusername = '{user}'\npassword = 'secret'\n", self.host);
        write(&self.directory.path().join("logins.toml"), &text, 0o600);
    }

    fn docker(&self, user: &str) {
        let text = format!(
            r#"{{"auths":{{"{}":{{"username":"{user}","password":"secret"}}}}}}"#,
            self.host
        );
        write(&self.directory.path().join("config.json"), &text, 0o600);
    }

    fn provider(&self, user: &str, reach: &str) {
        let answer = format!(
            r#"{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"{reach}","auth":{{"{}":{{"username":"{user}","password":"secret"}}}}}}"#,
            self.host
        );
        let runs = self.directory.path().join("runs");
        let script = format!("#!/bin/sh\ncat >> {0}; echo >> {0}\necho '{answer}'\n", runs.display());
        write(&self.directory.path().join("bin/p"), &script, 0o700);
    }

    fn runs(&self) -> usize {
        let text = std::fs::read_to_string(self.directory.path().join("runs")).unwrap_or_default();
        text.lines().count()
    }

    fn client(&self) -> Client {
        let path = |name: &str| self.directory.path().join(name);
        let credentials = Credentials::anonymous()
            .with_file(path("config.json"))
            .with_logins(path("logins.toml"))
            .with_providers(Providers::new(path("providers.json"), path("bin")));
        Client::new(ClientOptions {
            credentials,
            ..ClientOptions::default()
        })
        .unwrap()
    }
}

fn users(of: &[&str]) -> Vec<String> {
    of.iter().map(|user| (*user).to_owned()).collect()
}

#[tokio::test]
async fn sources_are_asked_in_their_order_until_one_is_taken() {
    let good = Good::default();
    let server = registry(&good).await;
    let node = Node::new(&server.host);
    let client = node.client();
    let ask = async || client.blob_exists(&server.image("app"), &Digest::of("")).await;
    for (user, runs) in [("file", 0), ("docker", 0), ("provider", 1)] {
        *good.lock().unwrap() = users(&[user]);
        assert!(ask().await.unwrap(), "{user}");
        assert_eq!(node.runs(), runs);
    }
    // Nothing is asked again as long as the last one works.
    let before = server.seen().len();
    assert!(ask().await.unwrap());
    assert_eq!((server.seen().len(), node.runs()), (before + 1, 1));
    // And no source for ever if none works.
    good.lock().unwrap().clear();
    let error = ask().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Auth);
    assert!(
        !text(&error).contains("secret") && text(&error).contains("logins.toml"),
        "{}",
        text(&error)
    );
    assert!(server.seen().len() <= before + 6, "{}", server.seen().len());
    assert_eq!(node.runs(), 1, "what is new is not asked for again");
}

#[tokio::test]
async fn a_login_that_changed_on_disk_is_used_without_a_restart() {
    let good = Good::default();
    let server = registry(&good).await;
    let node = Node::new(&server.host);
    let client = node.client();
    let ask = async || client.blob_exists(&server.image("app"), &Digest::of("")).await;
    *good.lock().unwrap() = users(&["file"]);
    assert!(ask().await.unwrap());
    node.logins("rotated");
    *good.lock().unwrap() = users(&["rotated"]);
    assert!(ask().await.unwrap());
    // A file that others may read is refused, said, and no reason to give up.
    let path = node.directory.path().join("logins.toml");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    *good.lock().unwrap() = users(&["docker"]);
    assert!(ask().await.unwrap());
    let alone = Client::new(ClientOptions {
        credentials: Credentials::anonymous().with_logins(path),
        ..ClientOptions::default()
    })
    .unwrap();
    let error = alone
        .blob_exists(&server.image("app"), &Digest::of(""))
        .await
        .unwrap_err();
    assert!(text(&error).contains("0600"), "{}", text(&error));
    node.docker("other");
    *good.lock().unwrap() = users(&["other"]);
    assert!(ask().await.unwrap());
}

/// A proxy in between may ask for a login that nobody has, and stop asking.
#[tokio::test]
async fn a_registry_that_wanted_a_login_for_a_while_is_asked_again_without_one() {
    let wants = Arc::new(Mutex::new(true));
    let server = {
        let wants = wants.clone();
        Scripted::start(move |_| match *wants.lock().unwrap() {
            true => answer(401, &[("www-authenticate", "Basic realm=\"x\"")], ""),
            false => answer(200, &[], ""),
        })
        .await
    };
    let client = Client::new(ClientOptions::default()).unwrap();
    let ask = async || client.blob_exists(&server.image("app"), &Digest::of("")).await;
    for _ in 0..2 {
        assert_eq!(ask().await.unwrap_err().class(), ErrorClass::Auth);
    }
    *wants.lock().unwrap() = false;
    assert!(ask().await.unwrap());
}
