//! Compiles the definitions with protox, so that no `protoc` has to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let containerd = protox::compile(
        [
            "services/snapshots/v1/snapshots.proto",
            "services/containers/v1/containers.proto",
            "services/events/v1/events.proto",
            "events/events.proto",
        ],
        ["containerd"],
    )?;
    tonic_prost_build::configure()
        .build_transport(true)
        .compile_fds(containerd)?;
    let cri = protox::compile(["runtime/v1/cri.proto"], ["cri"])?;
    tonic_prost_build::configure()
        .build_transport(true)
        .skip_debug(["runtime.v1.AuthConfig"])
        .compile_fds(cri)?;
    let control = protox::compile(["control/v1/control.proto"], ["hullspeed"])?;
    tonic_prost_build::configure()
        .build_transport(true)
        .skip_debug(["hullspeed.control.v1.SetCredentialsRequest"])
        .compile_fds(control)?;
    for directory in ["containerd", "cri", "hullspeed"] {
        println!("cargo:rerun-if-changed={directory}");
    }
    Ok(())
}
