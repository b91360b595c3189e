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
    /// Payloads of containerd's events.
    pub mod events {
        tonic::include_proto!("containerd.events");
    }
    /// containerd's services.
    pub mod services {
        /// Records of containers, sandboxes among them.
        pub mod containers {
            /// Version 1, the only one.
            pub mod v1 {
                tonic::include_proto!("containerd.services.containers.v1");
            }
        }
        /// The stream of containerd's events.
        pub mod events {
            /// Version 1, the only one.
            pub mod v1 {
                tonic::include_proto!("containerd.services.events.v1");
            }
        }
        /// What containerd says of itself.
        pub mod introspection {
            /// Version 1, the only one.
            pub mod v1 {
                tonic::include_proto!("containerd.services.introspection.v1");
            }
        }
        /// The store of sandboxes, beside their containers' records since containerd 1.7.
        pub mod sandbox {
            /// Version 1, the only one.
            pub mod v1 {
                tonic::include_proto!("containerd.services.sandbox.v1");
            }
        }
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

/// Our own APIs.
pub mod hullspeed {
    /// What may be asked of the snapshotter besides snapshots.
    pub mod control {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("hullspeed.control.v1");
        }
    }
    /// What may be asked of the relay besides CRI.
    pub mod prewarm {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("hullspeed.prewarm.v1");
        }
    }
}

/// Messages with secrets, which no log line may show.
mod redacted {
    use std::fmt;

    use super::cri::v1::AuthConfig;
    use super::hullspeed::control::v1::SetCredentialsRequest;

    impl fmt::Debug for AuthConfig {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("AuthConfig(redacted)")
        }
    }

    impl fmt::Debug for SetCredentialsRequest {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("SetCredentialsRequest(redacted)")
        }
    }
}

/// Whether a field is at its zero value, which Go's `omitempty` leaves out; an empty message that is there is not.
fn is_zero<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
