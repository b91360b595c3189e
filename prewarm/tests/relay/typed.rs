//! tonic on both sides.
