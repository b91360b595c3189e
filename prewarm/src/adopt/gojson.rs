//! A pod's configuration as containerd stores it: what Go's `encoding/json` makes of CRI's structures, and back.
//!
//! Fields have their protocol's names, enumerations and 64-bit numbers are numbers, and a field at its zero value is
//! left out, though not an entry of a map nor a message that is there and empty. The forms are derived in the protocol's
//! crate; the same in containerd 1.6, 1.7 and 2.1.

use hullspeed_proto::cri::v1::PodSandboxConfig;

/// A configuration that is not one.
#[derive(Debug, thiserror::Error)]
#[error("not a pod sandbox's configuration in JSON")]
pub struct GoJsonError(#[source] serde_json::Error);

/// The configuration as containerd would store it.
pub fn encode(config: &PodSandboxConfig) -> Result<String, GoJsonError> {
    serde_json::to_string(config).map_err(GoJsonError)
}

/// The configuration as a document; as [`encode`], which cannot fail for what the protocol's messages hold.
pub fn value(config: &PodSandboxConfig) -> serde_json::Value {
    serde_json::to_value(config).unwrap_or_default()
}

/// The configuration that containerd stored. Fields that we do not know are left out.
pub fn decode(json: &str) -> Result<PodSandboxConfig, GoJsonError> {
    serde_json::from_str(json).map_err(GoJsonError)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adopt::samples::any_config;
    use hullspeed_proto::cri::v1::{
        DnsConfig, Int64Value, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, PodSandboxMetadata,
        SecurityProfile,
    };
    use proptest::prelude::*;
    use serde_json::{Value, json};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn there_and_back(config in any_config()) {
            prop_assert_eq!(decode(&encode(&config).unwrap()).unwrap(), config);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
            let _ = decode(&text);
        }
    }

    #[test]
    fn zero_values_are_left_out_but_not_what_is_there_and_empty() {
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "n".into(),
                ..Default::default()
            }),
            dns_config: Some(DnsConfig::default()),
            labels: [("k".to_owned(), String::new())].into(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        pid: 1,
                        ..Default::default()
                    }),
                    run_as_user: Some(Int64Value { value: 1 << 60 }),
                    seccomp: Some(SecurityProfile::default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let expected = json!({
            "metadata": {"name": "n"},
            "dns_config": {},
            "labels": {"k": ""},
            "linux": {"security_context": {
                "namespace_options": {"pid": 1},
                "run_as_user": {"value": 1_i64 << 60},
                "seccomp": {},
            }},
        });
        let encoded: Value = serde_json::from_str(&encode(&config).unwrap()).unwrap();
        assert_eq!(encoded, expected);
    }

    #[test]
    fn what_is_unknown_is_left_out_and_what_is_wrong_is_refused() {
        let config = decode(r#"{"hostname":"h","future":{"a":[1]}}"#).unwrap();
        assert_eq!(config.hostname, "h");
        for wrong in [
            r#"{"hostname":1}"#,
            r#"{"metadata":{"attempt":-1}}"#,
            "[",
            r#"{"labels":[]}"#,
        ] {
            assert!(decode(wrong).is_err(), "{wrong}");
        }
    }
}
