//! The kubelet's `CredentialProviderConfig`: which programs know logins, and for which images.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::{ProviderError, pattern};
use crate::duration;
use crate::files::{self, Stamp};
use crate::limits::{MAX_PROVIDERS, MAX_PROVIDERS_BYTES};

/// The versions of the configuration, which say the same.
const CONFIG_VERSIONS: [&str; 3] = [
    "kubelet.config.k8s.io/v1",
    "kubelet.config.k8s.io/v1beta1",
    "kubelet.config.k8s.io/v1alpha1",
];
/// The versions of requests and answers, which say the same.
const REQUEST_VERSIONS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// One program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Provider {
    /// Its file's name.
    pub(super) name: String,
    pub(super) match_images: Vec<String>,
    /// How long an answer is kept that does not say it.
    pub(super) default_cache: Duration,
    pub(super) api_version: String,
    pub(super) args: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    /// It wants a token of the pod's service account, which only the kubelet has.
    pub(super) wants_service_account: bool,
}

impl Provider {
    pub(super) fn matches(&self, image: &str) -> bool {
        self.match_images.iter().any(|pattern| pattern::matches(pattern, image))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    providers: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    #[serde(default)]
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: Option<String>,
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<TokenAttributes>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenAttributes {
    #[serde(default)]
    require_service_account: Option<bool>,
}

/// The files of a configuration: itself, or those of a directory in the order of their names.
pub(super) fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for item in std::fs::read_dir(path)?.take(MAX_PROVIDERS) {
        let item = item?.path();
        let extension = item.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("json" | "yaml" | "yml")) && !item.is_dir() {
            found.push(item);
        }
    }
    found.sort();
    Ok(found)
}

/// How the files are now.
pub(super) fn stamps(path: &Path) -> Vec<(PathBuf, Stamp)> {
    let mut all = vec![path.to_owned()];
    all.extend(files(path).unwrap_or_default());
    let stamp = |path: PathBuf| {
        let stamp = Stamp::of(&path);
        (path, stamp)
    };
    all.into_iter().map(stamp).collect()
}

/// Reads a configuration.
pub(super) fn read(path: &Path) -> Result<Vec<Provider>, ProviderError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| ProviderError::Read { path, source }
    };
    let mut all: Vec<Provider> = Vec::new();
    for file in files(path).map_err(unreadable(path))? {
        let text = files::read_text(&file, MAX_PROVIDERS_BYTES).map_err(unreadable(&file))?;
        all.extend(parse(&text, &file)?);
        let last = all.len().saturating_sub(1);
        if all.len() > MAX_PROVIDERS {
            return Err(bad(&file, "providers", "there are too many"));
        }
        for (at, provider) in all.iter().enumerate().skip(1).take(last) {
            if all[..at].iter().any(|other| other.name == provider.name) {
                return Err(bad(
                    &file,
                    &format!("provider {:?}", provider.name),
                    "it is there twice",
                ));
            }
        }
    }
    if all.is_empty() {
        return Err(bad(path, "providers", "there is none"));
    }
    Ok(all)
}

/// The providers of one file's text, which is YAML or its subset JSON. The environment of a program may hold secrets, so no error quotes
/// the text.
fn parse(text: &str, path: &Path) -> Result<Vec<Provider>, ProviderError> {
    let document: Document = serde_saphyr::from_str(text).map_err(|error| ProviderError::Syntax {
        path: path.to_owned(),
        line: error.location().map_or(0, |place| place.line()),
    })?;
    if document.kind != "CredentialProviderConfig" {
        return Err(bad(path, "kind", "must be CredentialProviderConfig"));
    }
    if !CONFIG_VERSIONS.contains(&document.api_version.as_str()) {
        return Err(bad(
            path,
            "apiVersion",
            "must be kubelet.config.k8s.io/v1, v1beta1 or v1alpha1",
        ));
    }
    document
        .providers
        .into_iter()
        .map(|entry| checked(entry, path))
        .collect()
}

fn checked(entry: Entry, path: &Path) -> Result<Provider, ProviderError> {
    let shown: String = entry.name.chars().take(100).collect();
    let wrong = |key: &str, reason| bad(path, &format!("{key} of provider {shown:?}"), reason);
    // The name becomes a path below the directory of programs.
    let unusable = entry.name.contains(['/', ' ', '\0']) || matches!(entry.name.as_str(), "" | "." | "..");
    if unusable {
        return Err(wrong("name", "must be the name of a program's file"));
    }
    if !REQUEST_VERSIONS.contains(&entry.api_version.as_str()) {
        return Err(wrong(
            "apiVersion",
            "must be credentialprovider.kubelet.k8s.io/v1, v1beta1 or v1alpha1",
        ));
    }
    if entry.match_images.is_empty() || !entry.match_images.iter().all(|pattern| pattern::is_usable(pattern)) {
        return Err(wrong(
            "matchImages",
            "must be a list of patterns such as \"*.example.com\"",
        ));
    }
    let default_cache = entry.default_cache_duration.as_deref().and_then(duration::parse);
    let Some(default_cache) = default_cache else {
        return Err(wrong("defaultCacheDuration", "must be a time such as \"12h\""));
    };
    let unusable = |text: &str| text.contains('\0');
    let args = entry.args.unwrap_or_default();
    let env: Vec<_> = entry.env.unwrap_or_default();
    if args.iter().any(|arg| unusable(arg)) {
        return Err(wrong("args", "must not have NUL characters"));
    }
    if env
        .iter()
        .any(|variable| variable.name.is_empty() || variable.name.contains(['=', '\0']) || unusable(&variable.value))
    {
        return Err(wrong("env", "must be pairs of name and value"));
    }
    // As for a static pod, the kubelet asks without a service account where the program does not insist on one.
    let wants_service_account = entry
        .token_attributes
        .is_some_and(|attributes| attributes.require_service_account.unwrap_or(true));
    Ok(Provider {
        name: entry.name,
        match_images: entry.match_images,
        default_cache,
        api_version: entry.api_version,
        args,
        env: env
            .into_iter()
            .map(|variable| (variable.name, variable.value))
            .collect(),
        wants_service_account,
    })
}

fn bad(path: &Path, key: &str, reason: &'static str) -> ProviderError {
    ProviderError::Config {
        path: path.to_owned(),
        key: key.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const YAML: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
      - public.ecr.aws
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args: [get-credentials]
    env:
      - name: AWS_PROFILE
        value: node
  - name: other
    matchImages: [r.io]
    defaultCacheDuration: 0s
    apiVersion: credentialprovider.kubelet.k8s.io/v1alpha1
    tokenAttributes:
      serviceAccountTokenAudience: x
      requireServiceAccount: true
      cacheType: Token
"#;

    #[test]
    fn yaml_and_json_say_the_same() {
        let found = parse(YAML, Path::new("x")).unwrap();
        assert_eq!(
            (found[0].name.as_str(), found[0].default_cache),
            ("ecr-credential-provider", Duration::from_secs(12 * 3600))
        );
        assert_eq!(found[0].env, [("AWS_PROFILE".to_owned(), "node".to_owned())]);
        assert!(found[0].matches("1.dkr.ecr.eu-west-1.amazonaws.com/x") && !found[0].matches("r.io/x"));
        assert!(!found[0].wants_service_account && found[1].wants_service_account);
        let json = r#"{"apiVersion":"kubelet.config.k8s.io/v1beta1","kind":"CredentialProviderConfig","providers":[
            {"name":"p","matchImages":["r.io"],"defaultCacheDuration":"1m","apiVersion":"credentialprovider.kubelet.k8s.io/v1beta1"}]}"#;
        let found = parse(json, Path::new("x")).unwrap();
        assert_eq!((found.len(), found[0].args.len()), (1, 0));
    }

    #[test]
    fn a_directory_is_read_in_the_order_of_its_names() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, name: &str| {
            let text = YAML
                .replace("ecr-credential-provider", name)
                .replace("name: other", &format!("name: {name}2"));
            std::fs::write(directory.path().join(file), text).unwrap();
        };
        write("b.yaml", "b");
        write("a.yml", "a");
        write("c.txt", "c");
        let names: Vec<_> = read(directory.path())
            .unwrap()
            .into_iter()
            .map(|provider| provider.name)
            .collect();
        assert_eq!(names, ["a", "a2", "b", "b2"]);
        write("d.json", "a");
        let error = read(directory.path()).unwrap_err();
        assert!(error.to_string().contains("twice"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named_and_nothing_is_quoted() {
        for (from, to, word) in [
            ("kind: CredentialProviderConfig", "kind: Secret", "kind"),
            ("kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v9", "apiVersion"),
            ("name: other", "name: ../other", "name of provider"),
            ("name: other", "name: \"\"", "name of provider"),
            (
                "matchImages: [r.io]",
                "matchImages: []",
                "matchImages of provider \"other\"",
            ),
            (
                "defaultCacheDuration: 0s",
                "x: 1",
                "defaultCacheDuration of provider \"other\"",
            ),
            (
                "defaultCacheDuration: 0s",
                "defaultCacheDuration: -5s",
                "defaultCacheDuration",
            ),
            ("name: AWS_PROFILE", "name: \"A=B\"", "env of provider"),
            ("args: [get-credentials]", "args: {secret: 1}", "line"),
            ("providers:", "providers: [", "line"),
        ] {
            let text = YAML.replace(from, to);
            assert_ne!(text, YAML);
            let error = parse(&text, Path::new("/etc/providers.yaml")).unwrap_err();
            let said = format!("{error} {error:?}");
            assert!(
                said.contains(word) && said.contains("/etc/providers.yaml"),
                "{to}: {said}"
            );
            assert!(!said.contains("secret"), "{said}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}|[a-z:\\[\\]{}\\-&*!|> \n\"']{0,80}") {
            let _ = parse(&text, Path::new("x"));
            let _ = parse(&format!("{YAML}{text}"), Path::new("x"));
        }
    }
}
