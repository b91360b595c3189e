//! Real programs, and how often they are run.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::credentials::Login;

/// A configuration whose one program is a shell script that notes each run in `runs`.
struct Fixture {
    directory: tempfile::TempDir,
    providers: Providers,
}

const ANSWER: &str = r#"{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"REACH","cacheDuration":"TIME","auth":{"*.io":{"username":"u$RUN","password":"$SECRET-$1"}}}"#;

fn fixture(script: &str) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::create_dir(path("bin")).unwrap();
    let providers = Providers::new(path("config.yaml"), path("bin"));
    let fixture = Fixture { directory, providers };
    fixture.configure("");
    fixture.program(script);
    fixture
}

/// A program that answers at once.
fn answering(reach: &str, time: &str) -> String {
    let answer = ANSWER
        .replace("REACH", reach)
        .replace("TIME", time)
        .replace('"', "\\\"");
    format!("RUN=$(wc -l < $RUNS); echo \"{answer}\"")
}

impl Fixture {
    fn configure(&self, more: &str) {
        let text = format!(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: p\n  matchImages: ['*.io']\n  \
             defaultCacheDuration: 1h\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [arg]\n  env:\n  - {{name: SECRET, value: hidden}}\n  \
             - {{name: RUNS, value: '{}'}}\n{more}",
            self.directory.path().join("runs").display()
        );
        std::fs::write(self.directory.path().join("config.yaml"), text).unwrap();
    }

    fn program(&self, script: &str) {
        // Renamed into place: a file that is open for writing cannot be run.
        let (made, path) = (self.directory.path().join("made"), self.directory.path().join("bin/p"));
        let text = format!("#!/bin/sh\nREQUEST=$(cat)\necho \"$REQUEST\" >> $RUNS\n{script}\n");
        std::fs::write(&made, text).unwrap();
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::rename(made, path).unwrap();
    }

    fn runs(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.directory.path().join("runs")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    async fn user(&self, host: &str, repository: &str) -> Option<String> {
        match self.providers.find(host, repository, None).await.unwrap()?.login {
            Login::Basic { username, password } => {
                assert_eq!(password, "hidden-arg");
                Some(username)
            }
            other => panic!("{other:?}"),
        }
    }

    async fn error(&self) -> String {
        let error = self.providers.find("r.io", "x", None).await.unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(!text.contains("hidden"), "{text}");
        text
    }
}

#[tokio::test]
async fn one_run_serves_all_that_its_answer_is_good_for() {
    for (reach, runs) in [("Image", 3), ("Registry", 2), ("Global", 1)] {
        let fixture = fixture(&answering(reach, "1h"));
        fixture.providers.check().unwrap();
        for _ in 0..2 {
            for (host, repository) in [("r.io", "x"), ("r.io", "y"), ("s.io", "x")] {
                assert!(fixture.user(host, repository).await.is_some());
            }
        }
        assert_eq!(fixture.runs().len(), runs, "{reach}");
        assert_eq!(
            fixture.runs()[0],
            r#"{"apiVersion":"credentialprovider.kubelet.k8s.io/v1","kind":"CredentialProviderRequest","image":"r.io/x"}"#
        );
        // Not meant by any pattern: nobody is asked.
        assert_eq!(fixture.user("r.example", "x").await, None);
        assert_eq!(fixture.runs().len(), runs);
    }
}

#[tokio::test]
async fn those_who_ask_at_once_share_a_run_and_no_time_means_not_kept() {
    let fixture = fixture(&format!("sleep 0.3; {}", answering("Registry", "0s")));
    let all = (0..8).map(|_| fixture.user("r.io", "x"));
    let users = futures_util::future::join_all(all).await;
    assert_eq!(users, vec![Some("u1".to_owned()); 8]);
    assert_eq!(fixture.runs().len(), 1);
    assert_eq!(fixture.user("r.io", "x").await.as_deref(), Some("u2"));
}

#[tokio::test]
async fn images_that_need_answers_of_their_own_get_them() {
    let fixture = fixture(&format!("sleep 0.2; {}", answering("Image", "1h")));
    let names = ["a", "b", "c"];
    let users = futures_util::future::join_all(names.map(|name| fixture.user("r.io", name))).await;
    assert!(users.iter().all(Option::is_some));
    let mut runs = fixture.runs();
    runs.sort();
    runs.dedup();
    assert_eq!(runs.len(), 3);
}

#[tokio::test]
async fn a_used_answer_is_renewed_before_its_end_and_an_idle_one_is_not() {
    let fixture = fixture(&answering("Registry", "3s"));
    assert_eq!(fixture.user("r.io", "x").await.as_deref(), Some("u1"));
    let until = Instant::now() + Duration::from_secs(30);
    while fixture.runs().len() < 2 {
        assert!(Instant::now() < until, "it is not renewed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Nobody wants the renewed one, so it is the last.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(fixture.runs().len(), 2);
    assert_eq!(fixture.user("r.io", "x").await.as_deref(), Some("u3"));
}

#[tokio::test]
async fn a_refused_login_is_obtained_again_unless_it_is_new() {
    let fixture = fixture(&answering("Registry", "1h"));
    assert!(fixture.user("r.io", "x").await.is_some());
    let ask = async || fixture.providers.find("r.io", "x", Some(Instant::now())).await.unwrap();
    assert!(ask().await.is_some());
    assert_eq!(fixture.runs().len(), 1, "it has just been obtained");
    {
        let mut table = fixture.providers.shared.table();
        for kept in table.answers.values_mut() {
            kept.obtained -= PROVIDER_ASKED_AGAIN;
        }
    }
    assert!(ask().await.is_some());
    assert_eq!(fixture.runs().len(), 2);
}

#[tokio::test]
async fn a_changed_configuration_counts_at_once() {
    let fixture = fixture(&answering("Global", "1h"));
    assert!(fixture.user("r.io", "x").await.is_some());
    fixture.configure("  tokenAttributes: {serviceAccountTokenAudience: a, requireServiceAccount: true}\n");
    let said = fixture.error().await;
    assert!(
        said.contains("service account") && said.contains("credential provider p"),
        "{said}"
    );
    fixture.configure("  tokenAttributes: {serviceAccountTokenAudience: a, requireServiceAccount: false}\n");
    assert!(fixture.user("r.io", "x").await.is_some());
    assert_eq!(fixture.runs().len(), 2);
    fixture.configure("  apiVersion: twice\n");
    let said = fixture.error().await;
    assert!(said.contains("config.yaml"), "{said}");
}

#[tokio::test]
async fn programs_that_fail_are_told_of() {
    let fixture = fixture("echo 'no such\taccount' >&2; echo '{\"auth\": \"hidden\"}'; exit 3");
    let said = fixture.error().await;
    assert!(
        said.contains("credential provider p failed") && said.contains("no such account"),
        "{said}"
    );
    fixture.program("echo '{\"auth\": \"hidden\"}'");
    let said = fixture.error().await;
    assert!(said.contains("gave an answer that is none"), "{said}");
    fixture.program("head -c 3000000 /dev/zero");
    let said = fixture.error().await;
    assert!(said.contains("said more than"), "{said}");
    std::fs::remove_file(fixture.directory.path().join("bin/p")).unwrap();
    let said = fixture.error().await;
    assert!(said.contains("cannot be run"), "{said}");
    assert!(fixture.providers.check().unwrap_err().to_string().contains("is not in"));
}

#[tokio::test]
async fn a_run_for_a_configuration_that_is_gone_leaves_nothing_behind() {
    let fixture = fixture(&answering("Image", "1h"));
    let shared = Arc::clone(&fixture.providers.shared);
    let (old, before) = shared.load().unwrap();
    fixture.configure("  tokenAttributes: {requireServiceAccount: false}\n");
    let (_, now) = shared.load().unwrap();
    assert_ne!(before, now);
    let (x, y): (Arc<str>, Arc<str>) = ("r.io/x".into(), "r.io/y".into());
    for image in [&x, &y] {
        let said = shared.said(&old[0], image, None, before);
        let said = tokio::time::timeout(Duration::from_secs(30), said).await.unwrap();
        let said = said.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(said.image, *image);
    }
    let runs = fixture.runs().len();
    assert!(shared.table().flights.is_empty() && shared.table().answers.is_empty());
    // Those who ask with the one that counts join none of them.
    assert!(fixture.user("r.io", "x").await.is_some());
    assert_eq!((runs, fixture.runs().len()), (2, 3));
    assert!(shared.table().flights.is_empty());
}
