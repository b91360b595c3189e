//! Records of pax extended headers.
