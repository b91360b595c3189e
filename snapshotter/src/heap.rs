//! How much memory the C library keeps for a daemon of many threads.
//!
//! There is a thread for each mounted layer, and most of them are idle. What they freed lies scattered over the library's arenas, of
//! which it makes eight for each processor: 50 mounted images of 10 layers were 81 MiB so and are 47 with two (`make figures
//! AREA=fetch`). Large buffers come from the kernel directly and small ones from each thread's own cache, so threads hardly meet there.

#[cfg(target_env = "gnu")]
mod gnu {
    /// Arenas for all threads.
    const ARENAS: libc::c_int = 2;

    /// Lets all threads share few arenas. To be called before there are others.
    #[expect(unsafe_code, reason = "a call of the C library")]
    pub fn share() {
        // SAFETY: the call takes two numbers and may be made at any time; what it refuses stays as it is.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, ARENAS);
        }
    }

    /// Gives freed memory back to the kernel.
    #[expect(unsafe_code, reason = "a call of the C library")]
    pub(crate) fn give_back() {
        // SAFETY: the call takes no pointer and may be made at any time from any thread.
        unsafe {
            libc::malloc_trim(0);
        }
    }
}

/// Other C libraries have no arenas and give back by themselves.
#[cfg(not(target_env = "gnu"))]
mod other {
    /// Nothing to do.
    pub fn share() {}

    /// Nothing to do.
    pub(crate) fn give_back() {}
}

#[cfg(target_env = "gnu")]
pub(crate) use gnu::give_back;
#[cfg(target_env = "gnu")]
pub use gnu::share;
#[cfg(not(target_env = "gnu"))]
pub(crate) use other::give_back;
#[cfg(not(target_env = "gnu"))]
pub use other::share;
