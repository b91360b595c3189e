//! What one more hull costs: memory that its pause process and its shim do not share with those of other hulls. The
//! text of the programs, which all map, costs the same however many hulls there are; what the kernel keeps for them, some
//! hundred KiB, is not counted.

use std::io;
use std::path::Path;

use crate::adopt::hull::parent_of;

/// So many hulls are looked at in one measurement.
pub(super) const SAMPLES: usize = 8;

/// Bytes of one hull, averaged over those with these pause processes; `None` if none could be measured.
pub(super) fn per_hull(pauses: &[i32]) -> Option<u64> {
    let measured: Vec<u64> = pauses
        .iter()
        .take(SAMPLES)
        .filter_map(|pid| of_hull(*pid).ok())
        .collect();
    measured.iter().sum::<u64>().checked_div(measured.len() as u64)
}

fn of_hull(pause: i32) -> io::Result<u64> {
    // The shim is the parent of the pause process.
    let shim = parent_of(pause).filter(|parent| *parent > 1);
    let shim = shim.ok_or_else(|| io::Error::other("a process without a parent"))?;
    Ok(own(pause)? + own(shim)?)
}

/// Proportional shares of all memory that is not a file's.
fn own(pid: i32) -> io::Result<u64> {
    let text = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps_rollup"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let kib = field("Pss_Anon:").zip(field("Pss_Shmem:"));
    kib.map(|(anonymous, shared)| (anonymous + shared) << 10)
        .ok_or_else(|| io::Error::other("smaps_rollup without shares by kind"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_and_its_parent_are_measured() {
        let own = i32::try_from(std::process::id()).unwrap();
        let bytes = per_hull(&[own, -1]).unwrap();
        assert!(bytes > 100 << 10, "{bytes}");
        assert_eq!(per_hull(&[-1]), None);
        assert_eq!(per_hull(&[]), None);
    }
}
