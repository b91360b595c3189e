//! Harness for real containerd, registry and CNI, and the integration suite.
