//! Logins of docker configurations, and the order in which all sources are asked.

use super::*;

// echo -n "u:p:w" | base64
const ENTRY: &str = r#"{"auth":"dTpwOnc="}"#;

fn basic(username: &str, password: &str) -> Option<Login> {
    Some(Login::Basic {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

fn text(json: &str) -> Source {
    Source::Docker(DockerConfig::Text {
        name: "test",
        json: json.into(),
    })
}

/// What the first source says that has a login.
async fn login(credentials: &Credentials, host: &str) -> Result<Option<Login>, CredentialError> {
    for source in 0..credentials.sources() {
        if let Some(found) = credentials.find(source, host, "", None).await? {
            return Ok(Some(found.login));
        }
    }
    Ok(None)
}

async fn look(json: &str, host: &str) -> Result<Option<Login>, CredentialError> {
    login(&Credentials::anonymous().first(text(json)), host).await
}

#[tokio::test]
async fn every_spelling_of_a_registry_is_found() {
    for (key, host) in [
        ("r.io", "r.io"),
        ("https://r.io", "r.io"),
        ("https://r.io/v2/", "r.io"),
        ("http://r.io:5000/v1/", "r.io:5000"),
        ("https://index.docker.io/v1/", "docker.io"),
        ("docker.io", "docker.io"),
    ] {
        let json = format!(r#"{{"auths":{{"{key}":{ENTRY}}}}}"#);
        assert_eq!(look(&json, host).await.unwrap(), basic("u", "p:w"), "{key}");
        assert_eq!(look(&json, "other.io").await.unwrap(), None);
    }
    // A login for one repository is none for the registry.
    let json = format!(r#"{{"auths":{{"r.io/team":{ENTRY}}}}}"#);
    assert_eq!(look(&json, "r.io").await.unwrap(), None);
    let token = look(r#"{"auths":{"r.io":{"identitytoken":"secret"}}}"#, "r.io")
        .await
        .unwrap();
    assert_eq!(token, Some(Login::IdentityToken("secret".to_owned())));
}

#[tokio::test]
async fn damage_is_named_and_secrets_are_not() {
    let error = look(r#"{"auths":{"r.io":{"auth":"c2VjcmV0"}}}"#, "r.io")
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("r.io") && !format!("{error:?}").contains("secret"),
        "{error}"
    );
    assert!(matches!(look("{", "r.io").await, Err(CredentialError::Parse { .. })));
    let missing = Credentials::anonymous().with_file("/nonexistent/auth.json");
    let missing = login(&missing, "r.io").await.unwrap_err();
    assert!(missing.to_string().contains("/nonexistent/auth.json"));
    let given = basic("user", "secret").unwrap();
    let credentials = Credentials::anonymous().with_login("r.io", given.clone());
    assert!(!format!("{given:?} {credentials:?}").contains("secret"));
}

#[tokio::test]
async fn helpers_are_asked_and_their_absence_is_reported() {
    let error = look(r#"{"credHelpers":{"r.io":"hullspeed-absent"}}"#, "r.io")
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("docker-credential-hullspeed-absent"),
        "{error}"
    );
    let error = look(r#"{"credsStore":"hullspeed-absent"}"#, "r.io").await.unwrap_err();
    assert!(error.to_string().contains("$PATH"), "{error}");
    // Only the registry that the helper is for asks it.
    assert_eq!(
        look(r#"{"credHelpers":{"r.io":"hullspeed-absent"}}"#, "x.io")
            .await
            .unwrap(),
        None
    );
}

#[tokio::test]
async fn helpers_have_so_many_places_and_bother_nobody_else() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    let json = format!(r#"{{"auths":{{"r.io":{ENTRY}}},"credHelpers":{{"x.io":"hullspeed-absent"}}}}"#);
    let credentials = Credentials::anonymous().first(text(&json));
    let begun = Arc::new(AtomicUsize::new(0));
    let release = Arc::new(Semaphore::new(0));
    let patience = Duration::from_millis(50);
    for _ in 0..MAX_HELPERS + 2 {
        let (begun, release) = (Arc::clone(&begun), Arc::clone(&release));
        let helper = credentials.helpers.run(async move {
            begun.fetch_add(1, Ordering::SeqCst);
            let _ = release.acquire().await;
        });
        assert!(tokio::time::timeout(patience, helper).await.is_err());
    }
    assert_eq!(
        begun.load(Ordering::SeqCst),
        MAX_HELPERS,
        "those behind them were not even begun"
    );
    // A clone shares the places. Logins that need no helper need none of them.
    let clone = credentials.clone().with_login("y.io", basic("y", "p").unwrap());
    assert!(tokio::time::timeout(patience, login(&clone, "x.io")).await.is_err());
    let found = tokio::time::timeout(Duration::from_secs(10), login(&clone, "r.io")).await;
    assert_eq!(found.unwrap().unwrap(), basic("u", "p:w"));
    release.close();
    let error = login(&clone, "x.io").await.unwrap_err();
    assert!(error.to_string().contains("$PATH"), "{error}");
}

#[tokio::test]
async fn sources_are_asked_in_the_documented_order() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, user: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let json = format!(r#"{{"auths":{{"r.io":{{"username":"{user}","password":"x"}}}}}}"#);
        std::fs::write(&path, &json).unwrap();
        (path, json)
    };
    let (auth_file, _) = write("auth.json", "file");
    let (_, json) = write("unused", "text");
    write("docker/config.json", "docker");
    write("home/.docker/config.json", "home");
    write("run/containers/auth.json", "run");
    let mut variables = vec![
        ("REGISTRY_AUTH_FILE", auth_file.into_os_string(), "file"),
        ("DOCKER_AUTH_CONFIG", json.into(), "text"),
        ("DOCKER_CONFIG", dir.path().join("docker").into_os_string(), "docker"),
        ("HOME", dir.path().join("home").into_os_string(), "home"),
        ("XDG_RUNTIME_DIR", dir.path().join("run").into_os_string(), "run"),
    ];
    while !variables.is_empty() {
        let find = |name: &str| {
            variables
                .iter()
                .find(|(n, ..)| *n == name)
                .map(|(_, value, _)| value.clone())
        };
        let found = login(&Credentials::from_variables(find), "r.io").await.unwrap();
        assert_eq!(found, basic(variables[0].2, "x"));
        variables.remove(0);
    }
}
