//! Reader, writer and verifier for seekable eStargz layers.

pub mod digest;
pub mod footer;
pub mod gzip;
pub mod index;
pub mod reader;
pub mod toc;
