//! Logins that come and go while the client is in use, as the registry sees them.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "common/servers.rs"]
mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{PASSWORD, Registry, Scripted, answer, content, text};
use hullspeed_registry::{
    Client, ClientOptions, Credentials, Digest, ErrorClass, HandedOver, Login, Place, RangeSpec, Reference, Upload,
};

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
const BAD: &str = "Basic aHVsbDpiYWQ=";
const FALLBACK: &str = "Basic aHVsbDpmYWxsYmFjaw==";

/// The authorisations that a registry takes.
type Good = Arc<Mutex<Vec<&'static str>>>;

/// A registry that takes `good`, and answers others with `refusal`.
async fn registry(good: &Good, refusal: u16) -> Scripted {
    let good = good.clone();
    Scripted::start(move |seen| {
        let challenge = [("www-authenticate", "Basic realm=\"x\"")];
        match seen.authorization.as_deref() {
            Some(given) if good.lock().unwrap().contains(&given) => answer(200, &[], ""),
            Some(_) => answer(refusal, &challenge, ""),
            None => answer(401, &challenge, ""),
        }
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

/// The authorisations of the requests since the last call.
fn sent(server: &Scripted) -> Vec<String> {
    let seen = std::mem::take(&mut *server.seen.lock().unwrap());
    seen.into_iter()
        .map(|seen| seen.authorization.unwrap_or_default())
        .collect()
}

#[tokio::test]
async fn what_works_is_used_until_it_is_refused_forgotten_or_past_its_time() {
    let good = Good::new(Mutex::new(vec![ONE, TWO, FALLBACK]));
    let server = registry(&good, 401).await;
    let (client, held) = client(&server);
    let (a, b) = (server.image("team/a"), server.image("team/b"));
    let ask = async |image| {
        client.blob_exists(image, &Digest::of("")).await.unwrap();
        sent(&server)
    };
    held.set(Place::of(&a), basic("one"), HOUR).unwrap();
    assert_eq!(ask(&a).await, ["", ONE]);
    // Another repository has another login, though the registry is the same.
    assert_eq!(ask(&b).await, [FALLBACK]);
    // Other logins come, good and bad ones. They are no reason to give up what works.
    held.try_out(Place::of(&a), basic("bad")).unwrap();
    assert_eq!(ask(&a).await, [ONE]);
    held.set(Place::of(&a), basic("two"), HOUR).unwrap();
    assert_eq!(ask(&a).await, [ONE]);
    good.lock().unwrap().retain(|good| *good != ONE);
    assert_eq!(ask(&a).await, [ONE, TWO]);
    assert_eq!(ask(&a).await, [TWO]);
    let team = Place::prefix(&format!("{}/team", server.host)).unwrap();
    assert_eq!(held.forget(&team), 3);
    assert_eq!(ask(&a).await, [FALLBACK], "what was forgotten is still sent");
    held.set(team.clone(), basic("two"), Duration::from_millis(50)).unwrap();
    good.lock().unwrap().retain(|good| *good != FALLBACK);
    assert_eq!(ask(&a).await, [FALLBACK, TWO]);
    good.lock().unwrap().push(FALLBACK);
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert_eq!(ask(&a).await, [FALLBACK], "what has run out is still sent");
}

#[tokio::test]
async fn a_login_that_is_refused_leads_to_the_next() {
    for refusal in [401, 403] {
        let good = Good::new(Mutex::new(vec![FALLBACK]));
        let server = registry(&good, refusal).await;
        let (client, held) = client(&server);
        let image = server.image("team/a");
        let place = |prefix: &str| Place::prefix(&format!("{}{prefix}", server.host)).unwrap();
        let ask = async || client.blob_exists(&image, &Digest::of("")).await;
        held.set(Place::of(&image), basic("bad"), HOUR).unwrap();
        assert!(ask().await.unwrap());
        assert_eq!(sent(&server), ["", BAD, FALLBACK]);
        assert!(ask().await.unwrap());
        assert_eq!(sent(&server), [FALLBACK]);
        // That of a shorter place comes before what is configured, a tentative one after those.
        held.set(place(""), basic("one"), HOUR).unwrap();
        held.try_out(Place::of(&image), basic("two")).unwrap();
        *good.lock().unwrap() = vec![TWO];
        assert!(ask().await.unwrap());
        // The configured login is read again before it is given up.
        assert_eq!(sent(&server), [FALLBACK, BAD, ONE, TWO]);
        good.lock().unwrap().clear();
        let error = ask().await.unwrap_err();
        assert_eq!(error.class(), ErrorClass::Auth);
        assert_eq!(sent(&server), [TWO, BAD, ONE, FALLBACK]);
    }
}

#[tokio::test]
async fn a_login_that_the_token_server_refuses_leads_to_the_next() {
    let tokens = Scripted::start(|seen| match seen.authorization.as_deref() {
        Some(ONE) => answer(200, &[], r#"{"token":"t"}"#),
        _ => answer(401, &[], ""),
    })
    .await;
    let challenge = format!(r#"Bearer realm="http://{}/token",service="x""#, tokens.host);
    let server = Scripted::start(move |seen| match seen.authorization.as_deref() {
        Some("Bearer t") => answer(200, &[], ""),
        _ => answer(401, &[("www-authenticate", &challenge)], ""),
    })
    .await;
    let (client, held) = client(&server);
    let image = server.image("a");
    held.set(Place::of(&image), basic("bad"), HOUR).unwrap();
    held.try_out(Place::of(&image), basic("one")).unwrap();
    assert!(client.blob_exists(&image, &Digest::of("")).await.unwrap());
    assert_eq!(sent(&tokens), [BAD, ONE]);
    held.withdraw(&Place::of(&image), &basic("one"));
    let error = client.blob_exists(&image, &Digest::of("")).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Auth);
    assert_eq!(sent(&tokens), [BAD, FALLBACK]);
}

#[tokio::test]
async fn a_registry_token_goes_to_the_registry_as_it_is_and_nowhere_else() {
    let elsewhere = Scripted::start(|_| answer(200, &[], "")).await;
    let target = format!("http://{}/blob", elsewhere.host);
    let challenge = format!(r#"Bearer realm="http://{}/token",service="x""#, elsewhere.host);
    let server = Scripted::start(move |seen| match seen.authorization.as_deref() {
        Some("Bearer from-the-kubelet") => answer(307, &[("location", &target)], ""),
        _ => answer(401, &[("www-authenticate", &challenge)], ""),
    })
    .await;
    let (client, held) = client(&server);
    let image = server.image("a");
    let token = Login::RegistryToken("from-the-kubelet".to_owned());
    held.set(Place::of(&image), token, HOUR).unwrap();
    assert!(client.blob_exists(&image, &Digest::of("")).await.unwrap());
    let seen = elsewhere.seen();
    assert!(seen.len() == 1 && seen[0].authorization.is_none(), "{seen:?}");
    assert_eq!(held.forget(&Place::of(&image)), 1);
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

#[tokio::test]
async fn reads_of_a_private_registry_go_on_whatever_logins_come() {
    let registry = Registry::start(true);
    let bytes = content(1 << 20);
    let digest = Digest::of(&bytes);
    let image = Reference::parse(&format!("{}/team/app:1", registry.host)).unwrap();
    let upload = Upload::Bytes(bytes.clone());
    let pusher = common::client(&registry.host, Some(PASSWORD));
    pusher
        .push_blob(&image, &digest, bytes.len() as u64, upload, None)
        .await
        .unwrap();
    let held = HandedOver::default();
    let fresh = || {
        Client::new(ClientOptions {
            credentials: Credentials::anonymous().with_handed_over(held.clone()),
            ..ClientOptions::default()
        })
        .unwrap()
    };
    let read = async |client: &Client| {
        let part = client.blob_range(&image, &digest, RangeSpec::From(10..20)).await?;
        part.bytes().await
    };
    let client = fresh();
    assert_eq!(read(&client).await.unwrap_err().class(), ErrorClass::Auth);
    held.try_out(Place::of(&image), basic(PASSWORD)).unwrap();
    assert_eq!(read(&client).await.unwrap(), bytes.slice(10..20));
    held.set(Place::of(&image), basic(PASSWORD), HOUR).unwrap();
    held.try_out(Place::of(&image), basic("wrong")).unwrap();
    assert_eq!(read(&client).await.unwrap(), bytes.slice(10..20));
    held.set(Place::of(&image), basic("wrong"), HOUR).unwrap();
    // Also for somebody who was never let in before.
    for client in [&client, &fresh()] {
        assert_eq!(read(client).await.unwrap(), bytes.slice(10..20));
    }
    assert_eq!(held.forget(&Place::of(&image)), 2);
    assert_eq!(read(&client).await.unwrap_err().class(), ErrorClass::Auth);
}
