//! Commands that ask the running daemon.

use std::io::{self, Write};

use hullspeed_daemon::answer::Form;
use hullspeed_daemon::ask::ClientError;
use hullspeed_proto::hullspeed::prewarm::v1 as api;

use super::{Action, table};
use crate::client::Client;

/// A command came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The daemon does not do it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A drain ended, and leaving would lose pods.
    #[error(
        "{unbranded} pods' records in containerd are still their hulls'; do not restart containerd and leave the relay \
        before they are rewritten or the pods are gone"
    )]
    Unbranded {
        /// How many.
        unbranded: u64,
    },
    /// Nobody reads what is printed.
    #[error("cannot print")]
    Print(#[from] io::Error),
}

impl AskError {
    /// The exit code, from sysexits.h where it has one.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Client(error) => error.exit_code(),
            Self::Unbranded { .. } | Self::Print(_) => 1,
        }
    }
}

/// `status`
pub async fn status(client: &Client, form: Form, out: &mut dyn Write) -> Result<(), AskError> {
    let status = client.status().await?;
    Ok(form.show(&status, table::status, out)?)
}

/// `pool`
pub async fn pool(client: &Client, action: Option<Action>, form: Form, out: &mut dyn Write) -> Result<(), AskError> {
    let action = action.map_or(api::PoolAction::Unspecified, Action::in_api);
    let pool = client.pool(action).await?;
    Ok(form.show(&pool, table::pool, out)?)
}

/// `drain`: says how many hulls and records are left, once or until there are none.
pub async fn drain(client: &Client, wait: bool, form: Form, out: &mut dyn Write) -> Result<(), AskError> {
    let mut progress = client.drain().await?;
    let mut last = None;
    while let Some(now) = progress.message().await.map_err(ClientError::from)? {
        if last.as_ref() != Some(&now) {
            form.show(&now, table::drain, out)?;
            out.flush()?;
            last = Some(now);
        }
        if !wait {
            return Ok(());
        }
    }
    let last = last.filter(|last| last.done).and_then(|last| last.unbranded);
    match last.map_or(0, |last| last.pending + last.refused.len() as u64) {
        0 => Ok(()),
        unbranded => Err(AskError::Unbranded { unbranded }),
    }
}
