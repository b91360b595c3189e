//! The machine: rights and kernel.

use super::Report;

/// Whether this is root; nothing that `program` needs is possible otherwise.
pub fn examine_rights(program: &str, report: &mut Report) -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        report.ok("rights", "root");
    } else {
        let advice = format!("run {program} as root");
        report.fail("rights", "not root; what follows may be wrong", advice);
    }
    is_root
}

/// The kernel's release, as it tells it.
#[must_use]
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The first two numbers of a kernel's release.
#[must_use]
pub fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        for (release, version) in [
            ("6.18.0-rc1", Some((6, 18))),
            ("5.3", Some((5, 3))),
            ("4.19.0-amd64", Some((4, 19))),
            ("", None),
            ("x.y", None),
            ("99999999999.1", None),
        ] {
            assert_eq!(kernel_version(release), version, "{release}");
        }
        assert!(kernel_version(&kernel_release()).is_some());
    }
}
