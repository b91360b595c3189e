//! The least that can serve reads: two system calls for each, nothing decoded but its kind, nothing looked up. Content is wrong.

use std::error::Error;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use fuse_session::Session;

const PAGE_BYTES: usize = 4096;
/// Bytes of an answer's head.
const HEAD_BYTES: usize = 16;
/// Bytes of the answer to an open.
const OPEN_BYTES: usize = 16;

/// Kinds of requests.
const FORGET: u32 = 2;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// A mount that is served so. Dropping it unmounts, and the loop ends with the connection.
pub(crate) struct Mounted {
    target: PathBuf,
}

impl Mounted {
    /// Takes over what `session` mounted, once all that is not a read has been looked up by it.
    pub(crate) fn serve(session: Session) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let target = session.target().to_owned();
        std::fs::metadata(target.join("file"))?;
        let device = session.as_fd().try_clone_to_owned()?;
        session.leave();
        std::thread::spawn(move || answer(&device));
        Ok(Self { target })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The process ends with the contest; what is left goes with it.
        let _ = rustix::mount::unmount(&self.target, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Answers until the connection is over.
fn answer(device: &OwnedFd) {
    let mut request = vec![0; 16 << 10];
    // In one page of memory, as a file's content is.
    let memory = vec![7_u8; 2 * PAGE_BYTES];
    let page = &memory[memory.as_ptr().align_offset(PAGE_BYTES)..][..PAGE_BYTES];
    while rustix::io::read(device, &mut request).is_ok_and(|read| read >= HEAD_BYTES) {
        let word = |at: usize| {
            request[at..at + 4]
                .try_into()
                .map(u32::from_ne_bytes)
                .unwrap_or_default()
        };
        let payload = match word(4) {
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            OPEN => &[0; OPEN_BYTES],
            READ => page,
            _ => &[],
        };
        let mut head = [0; HEAD_BYTES];
        #[expect(clippy::cast_possible_truncation, reason = "a page and a head")]
        head[..4].copy_from_slice(&((HEAD_BYTES + payload.len()) as u32).to_ne_bytes());
        head[8..].copy_from_slice(&request[8..16]);
        let parts = [IoSlice::new(&head), IoSlice::new(payload)];
        // Who asked may have gone.
        let _ = rustix::io::writev(device, &parts[..if payload.is_empty() { 1 } else { 2 }]);
    }
}
