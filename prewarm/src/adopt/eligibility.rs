//! Which pods may have a hull.

/// What the operator allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Whether a pod may differ from its hull in what only its pause process has: user, groups, seccomp profile.
    pub strict: bool,
    /// Whether privileged pods may have one, where SELinux is off.
    pub privileged: bool,
    /// Whether pods with sysctls of Kubernetes' safe set may.
    pub sysctls: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            strict: false,
            privileged: true,
            sysctls: true,
        }
    }
}
