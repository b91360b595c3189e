//! One run of a program that is asked for a login: a request on its standard input, an answer on its standard output.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use zeroize::Zeroize as _;

use crate::limits::{MAX_ERROR_BYTES, MAX_REASON_CHARS};

/// Why a program gave no answer. No error shows what it said on its standard output, which may be a secret.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramError {
    #[error("cannot be run")]
    Start(#[source] io::Error),
    #[error("gave no answer in {} s", .0.as_secs())]
    Silent(Duration),
    #[error("cannot be read")]
    Read(#[source] io::Error),
    #[error("failed with {status}: {}", one_line(complaint))]
    Failed {
        status: ExitStatus,
        said: Said,
        complaint: Vec<u8>,
    },
    #[error("said more than {0} bytes")]
    TooMuch(u64),
}

/// What a program said; overwritten at the end.
pub(super) struct Said(Vec<u8>);

impl Said {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Said {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Said {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Said(redacted)")
    }
}

/// Runs a program and waits no longer than `patience` for an answer of at most `limit` bytes. Then all that it has started is ended.
pub(super) async fn ask(
    mut command: Command,
    request: &[u8],
    limit: u64,
    patience: Duration,
) -> Result<Said, ProgramError> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // What it starts is ended with it.
        .process_group(0)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(ProgramError::Start)?;
    let said = tokio::time::timeout(patience, talk(&mut child, request, limit)).await;
    let said = said.unwrap_or(Err(ProgramError::Silent(patience)));
    if said.is_err() {
        end(&mut child).await;
    }
    said
}

/// Everything that the program says until it ends well.
async fn talk(child: &mut Child, request: &[u8], limit: u64) -> Result<Said, ProgramError> {
    let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(ProgramError::Read(io::ErrorKind::BrokenPipe.into()));
    };
    let write = async move {
        // A program that does not read its request may still know the answer.
        let _ = stdin.write_all(request).await;
        drop(stdin);
    };
    let ((), said, complaint) = tokio::join!(write, read(stdout, limit), read(stderr, MAX_ERROR_BYTES));
    let status = child.wait().await.map_err(ProgramError::Read)?;
    let said = Said(said.map_err(ProgramError::Read)?);
    if !status.success() {
        return Err(ProgramError::Failed {
            status,
            said,
            complaint: complaint.unwrap_or_default(),
        });
    }
    if said.0.len() as u64 > limit {
        return Err(ProgramError::TooMuch(limit));
    }
    Ok(said)
}

/// At most one byte more than `limit`; the rest is read and dropped, so that the writer does not hang.
async fn read(mut pipe: impl AsyncRead + Unpin, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    (&mut pipe).take(limit + 1).read_to_end(&mut bytes).await?;
    tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await?;
    Ok(bytes)
}

/// Ends a program and all that it has started.
async fn end(child: &mut Child) {
    let group = child
        .id()
        .and_then(|id| rustix::process::Pid::from_raw(id.cast_signed()));
    if let Some(group) = group {
        // It has not been waited for, so the number is still its own.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.kill().await;
}

fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(MAX_REASON_CHARS).collect::<String>().trim().to_owned()
}
