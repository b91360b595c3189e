//! Faults as the command reports them: one line and an exit code.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use estargz::writer::BuildError;
use hullspeed_registry as registry;
use hullspeed_registry::Fault;

use super::stream::Mismatch;

/// Documented exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    Runtime = 1,
    Usage = 2,
    Source = 3,
    Mismatch = 4,
    Destination = 5,
    Interrupted = 130,
    Terminated = 143,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// Which side of a copy a fault is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Side {
    fn code(self) -> Code {
        match self {
            Self::Source => Code::Source,
            Self::Destination => Code::Destination,
        }
    }
}

/// What ends the command.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) code: Code,
    pub(super) line: String,
}

impl Failure {
    pub(super) fn new(code: Code, line: impl Into<String>) -> Self {
        Self {
            code,
            line: line.into(),
        }
    }

    /// Prints the line and returns the exit code.
    pub(super) fn report(self) -> ExitCode {
        // Names and server messages may hold line breaks; a fault is one line.
        let line: String = self
            .line
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        eprintln!("estargz: {line}");
        self.code.into()
    }

    /// Says first what was being done.
    pub(super) fn during(self, what: impl fmt::Display) -> Self {
        Self {
            line: format!("{what}: {}", self.line),
            ..self
        }
    }

    /// A file of the user's that cannot be used.
    pub(super) fn file(side: Side, what: &str, path: &Path, error: &io::Error) -> Self {
        let advice = match (error.kind(), side) {
            (io::ErrorKind::NotFound, Side::Source) => "; check the path",
            (io::ErrorKind::PermissionDenied, _) => "; check its permissions",
            (io::ErrorKind::StorageFull, _) => "; make room there or choose another place",
            (_, Side::Destination) => "; choose another place",
            _ => "",
        };
        Self::new(
            side.code(),
            format!("cannot {what} {}: {error}{advice}", path.display()),
        )
    }

    /// A registry's answer.
    pub(super) fn registry(side: Side, error: &registry::Error) -> Self {
        let host = error.host();
        let (code, advice) = match error.fault() {
            Fault::Unauthorized { .. } => (side.code(), format!("; docker login {host} or --authfile FILE")),
            Fault::NotFound { .. } => (side.code(), "; check the name".to_owned()),
            Fault::Denied { .. } | Fault::Credentials(_) | Fault::Token { .. } => (side.code(), String::new()),
            Fault::Digest { .. } | Fault::Size { .. } => (Code::Mismatch, String::new()),
            Fault::Connect(_) => {
                let advice = format!("; is it up, and does it speak TLS (else --plain-http {host})?");
                (Code::Runtime, advice)
            }
            Fault::RateLimited { .. }
            | Fault::Server { .. }
            | Fault::Status { .. }
            | Fault::Broken(_)
            | Fault::Stalled(_)
            | Fault::Truncated { .. }
            | Fault::TooLarge { .. }
            | Fault::Range { .. }
            | Fault::Redirect(_)
            | Fault::Header { .. }
            | Fault::File { .. }
            | Fault::NoHost(_)
            | Fault::Setup(_) => (Code::Runtime, String::new()),
        };
        Self::new(code, format!("{}{advice}", chain(error)))
    }

    /// A fault of a layer's bytes on their way through reader, decompressor and writer: the innermost cause decides.
    pub(super) fn layer(error: &(dyn Error + 'static)) -> Self {
        let mut code = Code::Runtime;
        let mut cause = Some(error);
        while let Some(error) = cause {
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            if inner.is_some_and(|inner| inner.is::<Mismatch>()) {
                code = Code::Mismatch;
            }
            if let Some(error) = inner.and_then(|inner| inner.downcast_ref::<registry::Error>()) {
                return Self::registry(Side::Source, error);
            }
            if matches!(error.downcast_ref(), Some(BuildError::Option { .. })) {
                code = Code::Usage;
            }
            cause = error.source();
        }
        Self::new(code, chain(error))
    }
}

/// An error and its causes in one line; a cause that its parent already quotes is not said twice.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}
