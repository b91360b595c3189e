//! Reader, writer and verifier for seekable eStargz layers.

pub mod digest;
pub mod footer;
pub mod index;
pub mod input;
pub mod member;
pub mod order;
pub mod reader;
pub mod toc;
pub mod verify;
pub mod writer;
