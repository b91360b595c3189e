//! gRPC messages, clients and servers generated from our own definitions under `proto/`.
//!
//! The definitions hold only the part of each published contract that Hullspeed speaks. Field names, numbers and
//! types are facts of those contracts; the comments are ours.
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "generated code"
)]

/// containerd's API.
pub mod containerd {
    /// Types shared between containerd's services.
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    /// containerd's services.
    pub mod services {
        /// The snapshots service, which `hullspeed-snapshotter` implements.
        pub mod snapshots {
            /// Version 1, the only one.
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}

/// The Kubernetes Container Runtime Interface.
pub mod cri {
    /// Version 1, the only one in use.
    pub mod v1 {
        tonic::include_proto!("runtime.v1");
    }
}
