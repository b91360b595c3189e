//! A multi-threaded FUSE session loop under fuse3's raw Filesystem trait.
