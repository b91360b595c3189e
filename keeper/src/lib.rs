//! File descriptors that outlive the process which uses them.
//!
//! What both ends share: [`notification`] is one message of the sd_notify protocol on its way to whoever supervises this
//! process, [`inheritance`] takes over a descriptor that a program was started with.
//!
//! The keeper, which supervises one program and keeps its descriptors: [`options`] is its command line, [`supervisor`] its
//! loop; in it [`inbox`] receives messages and checks who sent them, [`protocol`] reads them, [`store`] has the descriptors,
//! [`listener`] the sockets made for the program, [`child`] starts it, [`backoff`] says when, [`handover`] carries all of
//! it over an upgrade of the keeper itself, and [`log`] writes lines.
//!
//! The keeper may hold the only other end of a mount that nobody serves at the moment. Whatever touches such a mount waits
//! for an answer that only the keeper's child could give. So after its start the keeper opens nothing by path but its own
//! program and the child's, reads and writes nothing that it keeps, and waits for nothing but its poll.

pub mod backoff;
pub mod child;
pub mod handover;
pub mod inbox;
pub mod inheritance;
pub mod listener;
pub mod log;
pub mod notification;
pub mod options;
pub mod protocol;
pub mod store;
pub mod supervisor;
mod sys;
