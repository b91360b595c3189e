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
    tonic_prost_build::configure().build_transport(true).compile_fds(cri)?;
    println!("cargo:rerun-if-changed=containerd");
    println!("cargo:rerun-if-changed=cri");
    Ok(())
}
