//! File descriptors that outlive the process which uses them.
//!
//! What both ends share: [`notification`] is one message of the sd_notify protocol on its way to whoever supervises this
//! process, [`inheritance`] takes over a descriptor that a program was started with.

pub mod inheritance;
pub mod notification;
mod sys;
