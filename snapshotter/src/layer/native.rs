//! Layers that the kernel serves itself: an EROFS mount of the layer's metadata, over its `data`, which is filled on demand.
//!
//! Before such a layer is mounted, a fanotify group puts a mark for pre-content events on its `data`. From then on whoever reads a
//! range of it that is not in the kernel's page cache waits until [`service`] has answered: once the range is resident, "allow"; and
//! when it cannot be had, "deny", which the reader sees as EIO. Nothing is ever allowed that is not resident. When the whole layer is
//! resident, and durably so, the mark goes, and the daemon has left the data path.
//!
//! Each layer has a group of its own: an event says which range is missing and not of which file, and an answer names an event only by
//! a number. So both are one layer's.
//!
//! What a process that dies must not take with it is kept by a descriptor store: the group (its end would *allow* all that waits),
//! `data` as it was opened before the mark (only such a descriptor raises no events itself), and the [`journal`], in which a successor
//! finds what was read and not answered.

pub mod bounds;
pub mod event;
pub mod group;
pub mod journal;
pub mod probe;
pub mod service;
mod sys;
