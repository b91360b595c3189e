//! OCI distribution client: credentials, manifests, ranged blob reads, uploads.
