//! Images byte by byte.
