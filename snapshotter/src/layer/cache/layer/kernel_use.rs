//! Layers whose `data` the kernel reads by itself.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::super::kernel;
use super::OpenLayer;

impl OpenLayer {
    /// From now on the kernel reads `data` by itself. There is no telling when it does what it was allowed to, so no hole is punched any
    /// more, and nothing is written there that is not verified. What is being given up now, is when this returns.
    pub fn leave_to_kernel(&self) -> io::Result<()> {
        let _alone = self.writing.write().unwrap_or_else(PoisonError::into_inner);
        kernel::note(&self.data, &kernel::layout(&self.index))?;
        self.read_by_kernel.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// As [`Self::leave_to_kernel`]; nothing takes it back before the next boot.
    pub(in crate::layer::cache) fn leave_for_good(&self) -> io::Result<()> {
        // Before: who takes it back meanwhile sees it, or is overtaken.
        self.read_for_good.store(true, Ordering::SeqCst);
        self.leave_to_kernel()
    }

    /// The kernel has nothing of what this process mounted of the layer any more. What another mounted may be in use until the next boot.
    pub fn take_back(&self) {
        let _alone = self.writing.write().unwrap_or_else(PoisonError::into_inner);
        if self.read_for_good.load(Ordering::SeqCst) {
            return;
        }
        match kernel::clear(&self.data) {
            Ok(()) => self.read_by_kernel.store(false, Ordering::SeqCst),
            Err(error) => {
                tracing::warn!(dir = %self.dir.display(), %error, "nothing of the layer is given up before the next boot");
            }
        }
    }

    /// Whether the kernel reads `data` by itself.
    pub fn is_read_by_kernel(&self) -> bool {
        self.read_by_kernel.load(Ordering::SeqCst)
    }
}
