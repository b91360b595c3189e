//! `hullspeed-snapshotter`.

fn main() {}
