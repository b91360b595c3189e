//! The `estargz` command.
fn main() {}
