//! Compiles the definitions with protox, so that no `protoc` has to be installed.

/// Messages that containerd stores as JSON within a sandbox's record.
const STORED_AS_JSON: [&str; 15] = [
    "PodSandboxConfig",
    "PodSandboxMetadata",
    "DNSConfig",
    "PortMapping",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
    "NamespaceOption",
    "UserNamespace",
    "IDMapping",
    "SELinuxOption",
    "Int64Value",
    "SecurityProfile",
    "LinuxContainerResources",
    "HugepageLimit",
    "WindowsPodSandboxConfig",
];

/// Messages of the control API that its command line prints as JSON; those with secrets are not among them.
const SHOWN: [&str; 18] = [
    "StatusResponse",
    "KindCount",
    "ReasonCount",
    "HostHealth",
    "Failure",
    "ExplainResponse",
    "Explanation",
    "LayerSums",
    "LayerExplanation",
    "Reader",
    "Residence",
    "Cost",
    "ListLayersResponse",
    "CachedLayer",
    "CacheUsageResponse",
    "PruneCacheResponse",
    "VerifyCacheProgress",
    "WrongChunk",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let containerd = protox::compile(
        [
            "services/snapshots/v1/snapshots.proto",
            "services/containers/v1/containers.proto",
            "services/events/v1/events.proto",
            "services/introspection/v1/introspection.proto",
            "services/sandbox/v1/sandbox.proto",
            "events/events.proto",
        ],
        ["containerd"],
    )?;
    tonic_prost_build::configure()
        .build_transport(true)
        .compile_fds(containerd)?;
    let cri = protox::compile(["runtime/v1/cri.proto"], ["cri"])?;
    let mut builder = tonic_prost_build::configure()
        .build_transport(true)
        .skip_debug(["runtime.v1.AuthConfig"]);
    for message in STORED_AS_JSON {
        // What Go's encoding/json makes of `json:"name,omitempty"`: a message's field at its zero value is left out.
        let path = format!(".runtime.v1.{message}");
        builder = builder.message_attribute(
            &path,
            "#[derive(serde::Serialize, serde::Deserialize)] #[serde(default)]",
        );
        // A path covers what is nested in it, too; an enum's variants take no such attribute.
        let paths = match message {
            "SecurityProfile" => vec![format!("{path}.profile_type"), format!("{path}.localhost_ref")],
            _ => vec![path],
        };
        for path in paths {
            builder = builder.field_attribute(path, "#[serde(skip_serializing_if = \"crate::is_zero\")]");
        }
    }
    builder.compile_fds(cri)?;
    let control = protox::compile(["control/v1/control.proto"], ["hullspeed"])?;
    let mut builder = tonic_prost_build::configure()
        .build_transport(true)
        .skip_debug(["hullspeed.control.v1.SetCredentialsRequest"]);
    for message in SHOWN {
        let path = format!(".hullspeed.control.v1.{message}");
        builder = builder.message_attribute(path, "#[derive(serde::Serialize)]");
    }
    builder.compile_fds(control)?;
    let prewarm = protox::compile(["prewarm/v1/prewarm.proto"], ["hullspeed"])?;
    tonic_prost_build::configure()
        .build_transport(true)
        .message_attribute(".", "#[derive(serde::Serialize)]")
        .compile_fds(prewarm)?;
    for directory in ["containerd", "cri", "hullspeed"] {
        println!("cargo:rerun-if-changed={directory}");
    }
    Ok(())
}
