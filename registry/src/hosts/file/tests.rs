//! What `hosts.toml` may say, and what it may not.

use proptest::prelude::*;

use super::*;

fn parsed(text: &str) -> Vec<HostEntry> {
    parse(text, Path::new("/certs")).unwrap()
}

fn apis(text: &str) -> Vec<String> {
    let shown = |entry: HostEntry| entry.api.map_or("-".to_owned(), |api| api.to_string());
    parsed(text).into_iter().map(shown).collect()
}

#[test]
fn hosts_come_in_the_order_of_the_file_and_the_server_last() {
    let text = r#"
server = "https://upstream.example"
[host."https://z.example"]
  capabilities = ["pull"]
[host."http://a.example:5000".header]
  x = "1"
[host."m.example/sub"]
[host."http://a.example:5000"]
  skip_verify = true
"#;
    assert_eq!(
        apis(text),
        [
            "https://z.example/v2/",
            "http://a.example:5000/v2/",
            "https://m.example/sub/v2/",
            "https://upstream.example/v2/"
        ]
    );
    let hosts = parsed(text);
    assert_eq!(hosts[1].headers["x"], "1");
    assert!(hosts[1].tls.skip_verify && !hosts[0].tls.skip_verify);
    assert!(hosts[0].capabilities.pull && !hosts[0].capabilities.resolve && !hosts[0].capabilities.push);
    assert_eq!(hosts[3].capabilities, Capabilities::ALL);
}

#[test]
fn without_a_server_the_registry_itself_is_last_with_what_the_root_says() {
    let text = "ca = 'ca.pem'\ncapabilities = ['push']\ndial_timeout = '1m30s'\n[host.'https://m.example']\n";
    let hosts = parsed(text);
    assert_eq!(apis(text), ["https://m.example/v2/", "-"]);
    assert_eq!(hosts[1].tls.authorities, [PathBuf::from("/certs/ca.pem")]);
    assert_eq!(hosts[1].capabilities, Capabilities::ALL);
    assert_eq!(hosts[1].dial_timeout, Some(Duration::from_secs(90)));
    assert_eq!(parsed(""), [HostEntry::registry()]);
}

#[test]
fn paths_follow_the_rules_of_containerd() {
    for (address, plain, overridden) in [
        ("https://h", "https://h/v2/", "https://h/"),
        ("https://h/", "https://h/v2/", "https://h/"),
        ("https://h/v2", "https://h/v2/", "https://h/v2/"),
        ("https://h/v2/proxy", "https://h/v2/proxy/v2/", "https://h/v2/proxy/"),
        ("https://h/a//b/../c/", "https://h/a/c/v2/", "https://h/a/c/"),
        ("h:5000/us", "https://h:5000/us/v2/", "https://h:5000/us/"),
        ("http://[::1]:5000", "http://[::1]:5000/v2/", "http://[::1]:5000/"),
        ("https://user:secret@h/x?y#z", "https://h/x/v2/", "https://h/x/"),
        (
            "https://docker.io",
            "https://registry-1.docker.io/v2/",
            "https://registry-1.docker.io/",
        ),
    ] {
        for (as_it_is, wanted) in [(false, plain), (true, overridden)] {
            let text = format!("server = {address:?}\noverride_path = {as_it_is}\n");
            assert_eq!(apis(&text), [wanted], "{text}");
        }
    }
}

#[test]
fn files_are_texts_lists_and_pairs() {
    let clients = |text: &str| parsed(&format!("client = {text}")).remove(0).tls.identities;
    let certs = |name: &str| PathBuf::from("/certs").join(name);
    assert_eq!(clients("'a.pem'"), [(certs("a.pem"), None)]);
    assert_eq!(
        clients("['a.pem', '/b']"),
        [(certs("a.pem"), None), ("/b".into(), None)]
    );
    assert_eq!(
        clients("[['a.cert', 'a.key'], ['b.pem', '']]"),
        [(certs("a.cert"), Some(certs("a.key"))), (certs("b.pem"), None)]
    );
    let authorities = parsed("ca = ['x', '/y']").remove(0).tls.authorities;
    assert_eq!(authorities, [certs("x"), "/y".into()]);
}

#[test]
fn headers_are_single_or_many_and_never_shown() {
    let hosts =
        parsed("[header]\nX-One = 'a'\nx-two = ['b', 'c']\nAuthorization = 'Bearer secret'\nRange = 'bytes=0-1'\n");
    let headers = &hosts[0].headers;
    assert_eq!(headers["x-one"], "a");
    assert_eq!(headers.get_all("x-two").iter().collect::<Vec<_>>(), ["b", "c"]);
    assert!(!headers.contains_key("range"));
    assert!(!format!("{hosts:?}").contains("secret"));
}

#[test]
fn what_is_wrong_is_named_and_the_file_is_not_quoted() {
    for (text, key) in [
        ("server = 1", "server"),
        ("server = 'ftp://x'", "server"),
        ("server = 'https://'", "server"),
        ("host = 1", "host"),
        ("[host]\nx = 1", "host.\"x\""),
        (
            "[host.'h']\ncapabilities = ['pull', 'fetch']",
            "host.\"h\".capabilities",
        ),
        ("capabilities = 'pull'", "capabilities"),
        ("ca = 1", "ca"),
        ("ca = [1]", "ca"),
        ("client = [['a']]", "client"),
        ("client = [['a', 'b', 'c']]", "client"),
        ("client = [1]", "client"),
        ("skip_verify = 'yes'", "skip_verify"),
        ("[host.h]\noverride_path = 1", "host.\"h\".override_path"),
        ("dial_timeout = '5'", "dial_timeout"),
        ("dial_timeout = '-5s'", "dial_timeout"),
        ("[header]\nx = 1", "header.\"x\""),
        ("[header]\n'x y' = 'secret'", "header.\"x y\""),
        ("[header]\nx = \"secret\\n\"", "header.\"x\""),
    ] {
        let error = parse(text, Path::new("/")).unwrap_err();
        assert!(
            matches!(&error, FileError::Value { key: found, .. } if found == key),
            "{text}: {error}"
        );
        assert!(!error.to_string().contains("secret"), "{error}");
    }
    let error = parse("# fine\n[header]\nAuthorization = secret\n", Path::new("/")).unwrap_err();
    assert_eq!(error, FileError::Syntax { line: 3 });
}

#[test]
fn hosts_and_files_are_bounded() {
    let many: String = (0..=MAX_HOSTS).map(|n| format!("[host.'h{n}']\n")).collect();
    assert!(parse(&many, Path::new("/")).is_err());
    let files = vec!["'x'"; MAX_HOST_FILES + 1].join(",");
    assert!(parse(&format!("ca = [{files}]"), Path::new("/")).is_err());
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,200}") {
        let _ = parse(&text, Path::new("/"));
    }

    /// Lines that are nearly right, in any order.
    #[test]
    fn no_mixture_of_lines_makes_it_panic(lines in prop::collection::vec(prop::sample::select(vec![
        "server = 'h'", "[host.'a']", "[host.'a'.header]", "[host]", "[host.\"b\"]", "ca = ['x', 1]", "client = [['a','b']]",
        "skip_verify = true", "x = ['1', '2']", "capabilities = ['pull']", "dial_timeout = '1s'", "override_path = true",
        "[header]", "\"", "[[host]]", "host.c = {ca = 'x'}",
    ]), 0..12)) {
        let _ = parse(&lines.join("\n"), Path::new("/"));
    }

    /// Whatever is named, the order is the file's and every root ends in a slash.
    #[test]
    fn names_keep_their_order(names in prop::collection::vec("[a-z]{1,8}", 1..12)) {
        let mut unique = Vec::new();
        for name in names {
            if !unique.contains(&name) {
                unique.push(name);
            }
        }
        let text: String = unique.iter().map(|name| format!("[host.'https://{name}.example']\nskip_verify = true\n")).collect();
        let mut wanted: Vec<_> = unique.iter().map(|name| format!("https://{name}.example/v2/")).collect();
        wanted.push("-".to_owned());
        prop_assert_eq!(apis(&text), wanted);
    }
}
