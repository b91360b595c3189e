//! Cold-start harness and criterion benches.
