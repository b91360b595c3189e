//! Reader, writer and verifier for seekable eStargz layers.

pub mod digest;
pub mod toc;
