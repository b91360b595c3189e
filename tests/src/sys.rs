//! The one place with `unsafe`: what has to happen between fork and exec of a child.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Makes the kernel kill the child with SIGKILL when the thread that spawns it ends.
///
/// The caller has to spawn from a thread that lives as long as the child should: see [`crate::process::Spawner`].
#[expect(unsafe_code, reason = "pre_exec is the only hook between fork and exec")]
pub(crate) fn die_with_parent(command: &mut Command) {
    let hook = || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        Ok(())
    };
    // SAFETY: the closure makes one prctl call, which is async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(hook) };
}
