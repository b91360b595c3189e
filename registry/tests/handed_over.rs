//! Logins that come and go while the client is in use, as the registry sees them.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "common/servers.rs"]
mod common;

use std::time::Duration;

use common::{Scripted, answer, text};
use hullspeed_registry::{Client, ClientOptions, Credentials, Digest, ErrorClass, HandedOver, Login, Place};

const HOUR: Duration = Duration::from_secs(3600);

fn basic(password: &str) -> Login {
    Login::Basic {
        username: "hull".to_owned(),
        password: password.to_owned(),
    }
}

/// `base64(hull:<password>)` for the passwords of these tests.
const ONE: &str = "Basic aHVsbDpvbmU=";
const TWO: &str = "Basic aHVsbDp0d28=";

/// A registry that takes any authorisation, and none without.
async fn registry() -> Scripted {
    Scripted::start(|seen| match seen.authorization {
        Some(_) => answer(200, &[], ""),
        None => answer(401, &[("www-authenticate", "Basic realm=\"x\"")], ""),
    })
    .await
}

fn client(server: &Scripted) -> (Client, HandedOver) {
    let held = HandedOver::default();
    let fallback = Credentials::anonymous().with_login(&server.host, basic("fallback"));
    let credentials = fallback.with_handed_over(held.clone());
    let options = ClientOptions {
        credentials,
        ..ClientOptions::default()
    };
    (Client::new(options).unwrap(), held)
}

fn last(server: &Scripted) -> String {
    server.seen().pop().unwrap().authorization.unwrap_or_default()
}

#[tokio::test]
async fn the_login_that_counts_now_is_the_one_that_is_sent() {
    let server = registry().await;
    let (client, held) = client(&server);
    let (a, b) = (server.image("team/a"), server.image("team/b"));
    let ask = async |image| client.blob_exists(image, &Digest::of("")).await.unwrap();
    held.set(Place::of(&a), basic("one"), HOUR).unwrap();
    ask(&a).await;
    assert_eq!((last(&server).as_str(), server.seen().len()), (ONE, 2));
    // Another repository has another login, though the registry is the same.
    ask(&b).await;
    assert!(last(&server) != ONE && !last(&server).is_empty());
    let before = server.seen().len();
    held.set(Place::of(&a), basic("one"), HOUR).unwrap();
    ask(&a).await;
    held.set(Place::of(&a), basic("two"), HOUR).unwrap();
    ask(&a).await;
    assert_eq!((last(&server).as_str(), server.seen().len()), (TWO, before + 2));
    let team = Place::prefix(&format!("{}/team", server.host)).unwrap();
    held.set(team.clone(), basic("one"), HOUR).unwrap();
    ask(&b).await;
    assert_eq!(last(&server), ONE);
    ask(&a).await;
    assert_eq!(last(&server), TWO);
    assert_eq!(held.forget(&team), 2);
    ask(&a).await;
    assert!(
        ![ONE, TWO].contains(&last(&server).as_str()),
        "what was forgotten is still sent"
    );
    held.set(Place::of(&a), basic("one"), Duration::from_millis(50))
        .unwrap();
    ask(&a).await;
    assert_eq!(last(&server), ONE);
    tokio::time::sleep(Duration::from_millis(60)).await;
    ask(&a).await;
    assert!(last(&server) != ONE, "what has run out is still sent");
}

#[tokio::test]
async fn a_registry_token_goes_to_the_registry_as_it_is_and_nowhere_else() {
    let elsewhere = Scripted::start(|_| answer(200, &[], "")).await;
    let target = format!("http://{}/blob", elsewhere.host);
    let server = Scripted::start(move |seen| match seen.authorization.as_deref() {
        Some("Bearer from-the-kubelet") => answer(307, &[("location", &target)], ""),
        _ => {
            let challenge = r#"Bearer realm="http://127.0.0.1:1/token",service="x""#;
            answer(401, &[("www-authenticate", challenge)], "")
        }
    })
    .await;
    let (client, held) = client(&server);
    let image = server.image("a");
    let token = Login::RegistryToken("from-the-kubelet".to_owned());
    held.set(Place::of(&image), token, HOUR).unwrap();
    assert!(client.blob_exists(&image, &Digest::of("")).await.unwrap());
    let seen = elsewhere.seen();
    assert!(seen.len() == 1 && seen[0].authorization.is_none(), "{seen:?}");
    held.set(
        Place::of(&image),
        Login::RegistryToken("another-secret".to_owned()),
        HOUR,
    )
    .unwrap();
    let error = client.blob_exists(&image, &Digest::of("")).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Auth);
    assert!(!text(&error).contains("another-secret"), "{}", text(&error));
}
