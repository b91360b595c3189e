//! Reader, writer and verifier for seekable eStargz layers.

pub mod digest;
pub mod input;
pub mod order;
pub mod toc;
pub mod writer;
