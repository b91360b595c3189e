//! containerd remote snapshotter that lazily serves eStargz layers.
