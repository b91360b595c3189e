//! What is held, for whom and for how long.

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn basic(password: &str) -> Login {
    Login::Basic {
        username: "u".to_owned(),
        password: password.to_owned(),
    }
}

fn place(text: &str) -> Place {
    Place::prefix(text).unwrap()
}

/// In the order in which they are tried.
fn passwords(held: &HandedOver, host: &str, repository: &str) -> Vec<String> {
    let found = held.find(host, repository).into_iter();
    found
        .filter_map(|(_, login)| match login {
            Login::Basic { password, .. } => Some(password),
            _ => None,
        })
        .collect()
}

fn first(held: &HandedOver, repository: &str) -> Option<Stamp> {
    held.find("r.io", repository).first().map(|(stamp, _)| *stamp)
}

fn password(held: &HandedOver, host: &str, repository: &str) -> Option<String> {
    passwords(held, host, repository).into_iter().next()
}

#[test]
fn the_longest_place_wins_and_components_are_whole() {
    let held = HandedOver::default();
    for prefix in [
        "r.io",
        "r.io/team",
        "r.io/team/app",
        "localhost:5000",
        "docker.io/library/x",
    ] {
        held.set(place(prefix), basic(prefix), HOUR).unwrap();
    }
    for (host, repository, expected) in [
        ("r.io", "team/app", Some("r.io/team/app")),
        ("r.io", "team/app/deep", Some("r.io/team/app")),
        ("r.io", "team/application", Some("r.io/team")),
        ("r.io", "teams/app", Some("r.io")),
        ("r.io:443", "team/app", None),
        ("x.io", "team/app", None),
        ("localhost:5000", "a", Some("localhost:5000")),
        ("docker.io", "library/x", Some("docker.io/library/x")),
        ("docker.io", "library/y", None),
    ] {
        assert_eq!(
            password(&held, host, repository).as_deref(),
            expected,
            "{host}/{repository}"
        );
    }
    assert_eq!(held.forget(&place("r.io/team")), 2);
    assert_eq!(password(&held, "r.io", "team/app").as_deref(), Some("r.io"));
    let image = Reference::parse("index.docker.io/x:1").unwrap();
    assert_eq!(held.forget(&Place::of(&image)), 1);
}

#[test]
fn the_newest_wins_the_same_keeps_its_stamp_and_time_ends_it() {
    let held = HandedOver::default();
    let stamp = || first(&held, "a");
    held.set(place("r.io"), basic("1"), HOUR).unwrap();
    let first_stamp = stamp();
    held.set(place("r.io"), basic("1"), HOUR).unwrap();
    assert!(first_stamp.is_some() && stamp() == first_stamp);
    held.set(place("r.io"), basic("2"), HOUR).unwrap();
    assert!(stamp().is_some() && stamp() != first_stamp);
    // The one before is kept for when the newest is refused; what it made is still good.
    assert_eq!(passwords(&held, "r.io", "a"), ["2", "1"]);
    assert!(held.holds(first_stamp.unwrap(), "r.io", "a") && !held.holds(first_stamp.unwrap(), "x.io", "a"));
    held.set(place("r.io/a"), basic("3"), Duration::ZERO).unwrap();
    assert_eq!(password(&held, "r.io", "a").as_deref(), Some("2"));
    assert_eq!(held.len(), 2);
}

#[test]
fn there_is_a_bound_and_the_oldest_goes_first() {
    let held = HandedOver::default();
    for number in 0..MAX_HANDED_OVER {
        held.set(place(&format!("r.io/{number}")), basic("x"), HOUR).unwrap();
    }
    held.set(place("r.io/0"), basic("x"), HOUR).unwrap();
    held.set(place("r.io/new"), basic("x"), HOUR).unwrap();
    assert_eq!(held.len(), MAX_HANDED_OVER);
    assert!(first(&held, "0").is_some() && first(&held, "new").is_some());
    assert!(first(&held, "1").is_none());
}

#[test]
fn nonsense_is_refused_and_nothing_secret_is_shown() {
    for bad in [
        "",
        "r",
        "r.io/",
        "r.io//x",
        "r.io/A",
        "r.io/a:tag",
        "https://r.io",
        "u:p@r.io",
        "r.io/../x",
        "/x",
    ] {
        let found = Place::prefix(bad);
        assert!(found.is_err() || bad == "r.io/", "{bad:?}: {found:?}");
    }
    let hub = place("index.docker.io/library");
    assert_eq!(hub.to_string(), "docker.io/library");
    assert!(hub.check_registry("https://index.docker.io/v1/").is_ok() && hub.check_registry("").is_ok());
    assert!(place("r.io").check_registry("https://R.io/v2/").is_ok());
    assert!(place("r.io").check_registry("x.io").is_err());
    assert!(place("r.io").check_registry("https://u:secret@r.io/v2/").is_ok());
    for registry in [
        "https://u:secret@x.io",
        "u:secret@x@y.io",
        "secret",
        "https://x.io/secret",
    ] {
        let error = place("r.io").check_registry(registry).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("secret"));
    }
    for text in ["u:secret@r.io", "https://u:secret@r.io", "u:secret@x@r.io/A"] {
        let error = Place::prefix(text).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("secret"));
    }
    for bad in ["", "!", "c2VjcmV0", "/////w==", "OnNlY3JldA=="] {
        let login = Login::from_base64(bad).and_then(|login| login.check());
        assert!(matches!(login, Err(PlaceError::Login(_))), "{bad}");
    }
    // echo -n "u:p:w" | base64
    assert_eq!(Login::from_base64("dTpwOnc=").unwrap(), basic("p:w"));
    let held = HandedOver::default();
    for bad in [
        basic(&"s".repeat(MAX_SECRET_BYTES + 1)),
        Login::RegistryToken("a\nb".to_owned()),
        Login::IdentityToken(String::new()),
        Login::Basic {
            username: "a:b".to_owned(),
            password: "secret".to_owned(),
        },
    ] {
        let error = held.set(place("r.io"), bad, HOUR).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("secret"));
    }
    held.set(place("r.io"), Login::RegistryToken("secret".to_owned()), HOUR)
        .unwrap();
    assert!(!format!("{held:?} {:?}", held.find("r.io", "a")).contains("secret"));
}

#[test]
fn a_pull_that_fails_takes_a_login_from_nobody_and_one_that_succeeds_is_first() {
    let held = HandedOver::default();
    let at = || place("r.io/a");
    let known = || passwords(&held, "r.io", "a/b");
    held.set(place("r.io"), basic("all"), HOUR).unwrap();
    held.set(at(), basic("good"), HOUR).unwrap();
    held.try_out(at(), basic("bad")).unwrap();
    held.try_out(at(), basic("new")).unwrap();
    assert_eq!(known(), ["good", "all", "new", "bad"]);
    // Two pulls with the same login: the second still needs it when the first has failed.
    held.try_out(at(), basic("bad")).unwrap();
    held.withdraw(&at(), &basic("bad"));
    assert_eq!(known(), ["good", "all", "bad", "new"]);
    held.withdraw(&at(), &basic("bad"));
    held.set(at(), basic("new"), HOUR).unwrap();
    assert_eq!(known(), ["new", "good", "all"]);
    // What is confirmed stays, whatever happens to a pull with it.
    held.try_out(at(), basic("good")).unwrap();
    held.withdraw(&at(), &basic("good"));
    held.withdraw(&at(), &basic("never seen"));
    held.withdraw(&place("r.io/z"), &basic("new"));
    assert_eq!(held.len(), 3);
    for number in 0..MAX_TENTATIVE_OF_PLACE + 3 {
        held.try_out(at(), basic(&number.to_string())).unwrap();
        held.set(at(), basic(&format!("set {number}")), HOUR).unwrap();
    }
    assert_eq!(held.len(), 1 + MAX_CONFIRMED_OF_PLACE + MAX_TENTATIVE_OF_PLACE);
    assert_eq!(known().len(), held.len().min(MAX_LOGINS_TRIED));
}

#[test]
fn a_login_is_kept_while_its_place_is_in_use_and_its_time_begins_after_that() {
    let time = Duration::from_millis(100);
    let held = HandedOver::default();
    let known = || passwords(&held, "r.io", "team/app");
    held.set(place("r.io/team"), basic("used"), Keeping::WhileUsed(time))
        .unwrap();
    held.set(place("r.io/team/app"), basic("limited"), Keeping::For(time))
        .unwrap();
    held.set(place("r.io/other"), basic("unused"), Keeping::WhileUsed(time))
        .unwrap();
    let (one, two) = (held.in_use(place("r.io/team/app")), held.in_use(place("r.io/team/app")));
    std::thread::sleep(time * 2);
    drop(one);
    assert_eq!(known(), ["used"]);
    assert_eq!(held.len(), 1);
    std::thread::sleep(time * 2);
    assert_eq!(known(), ["used"]);
    drop(two);
    assert_eq!(known(), ["used"]);
    std::thread::sleep(time * 2);
    assert!(known().is_empty());
    // A use does not bring back what has run out.
    let _again = held.in_use(place("r.io/team/app"));
    assert!(known().is_empty() && held.is_empty());
}

#[test]
fn what_is_in_use_or_confirmed_goes_last_when_there_is_no_room() {
    let held = HandedOver::default();
    let keeping = Keeping::WhileUsed(HOUR);
    held.set(place("r.io/used"), basic("x"), keeping).unwrap();
    let _used = held.in_use(place("r.io/used"));
    held.set(place("r.io/confirmed"), basic("x"), keeping).unwrap();
    for number in 0..MAX_HANDED_OVER {
        held.try_out(place(&format!("r.io/{number}")), basic("x")).unwrap();
    }
    assert_eq!(held.len(), MAX_HANDED_OVER);
    assert!(first(&held, "used").is_some() && first(&held, "confirmed").is_some() && first(&held, "0").is_none());
    for number in 0..MAX_HANDED_OVER {
        held.set(place(&format!("r.io/{number}")), basic("x"), keeping).unwrap();
    }
    assert!(first(&held, "used").is_some() && first(&held, "confirmed").is_none());
}
