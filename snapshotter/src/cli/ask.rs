//! Commands that ask the running daemon.

use std::io::{self, Write};

use hullspeed_daemon::answer::Form;
use hullspeed_daemon::ask::ClientError;
use hullspeed_proto::hullspeed::control::v1 as api;
use tonic::Code;

use super::{CacheVerb, table};
use crate::client::Client;

/// Pages of the cache that are asked for at most.
const MAX_PAGES: usize = 1000;

/// A command came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The daemon does not do it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A verification found something.
    #[error("{chunks} chunks of the cache were wrong and {layers} layers could not be looked at")]
    Wrong {
        /// How many.
        chunks: u64,
        /// How many.
        layers: u32,
    },
    /// A verification ended too early.
    #[error("the verification did not come to its end")]
    Unfinished,
    /// Nobody reads what is printed.
    #[error("cannot print")]
    Print(#[from] io::Error),
}

impl AskError {
    /// The exit code, from sysexits.h where it has one.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Client(error) if error.code() == Some(Code::NotFound) => 66,
            Self::Client(error) => error.exit_code(),
            Self::Wrong { .. } | Self::Unfinished | Self::Print(_) => 1,
        }
    }
}

/// `status`
pub async fn status(client: &Client, form: Form, out: &mut dyn Write) -> Result<(), AskError> {
    Ok(form.show(&client.status().await?, table::status, out)?)
}

/// `explain`
pub async fn explain(client: &Client, subject: &str, form: Form, out: &mut dyn Write) -> Result<(), AskError> {
    Ok(form.show(&client.explain(subject).await?, table::explain, out)?)
}

/// `cache`
pub async fn cache(client: &Client, verb: &CacheVerb, out: &mut dyn Write) -> Result<(), AskError> {
    match verb {
        CacheVerb::Ls(form) => list(client, *form, out).await,
        CacheVerb::Usage(form) => Ok(form.show(&client.cache_usage().await?, table::usage, out)?),
        CacheVerb::Prune { all_unused, form } => {
            Ok(form.show(&client.prune_cache(*all_unused).await?, table::pruned, out)?)
        }
        CacheVerb::Verify { layer, form } => verify(client, layer.clone().unwrap_or_default(), *form, out).await,
    }
}

/// All pages, as one answer.
async fn list(client: &Client, form: Form, out: &mut dyn Write) -> Result<(), AskError> {
    let mut all = api::ListLayersResponse::default();
    for _ in 0..MAX_PAGES {
        let after = all
            .layers
            .last()
            .map(|last| last.toc_digest.clone())
            .unwrap_or_default();
        let page = client.list_layers(after).await?;
        let is_empty = page.layers.is_empty();
        all.layers.extend(page.layers);
        all.more = page.more;
        if all.more == 0 || is_empty {
            break;
        }
    }
    Ok(form.show(&all, table::list, out)?)
}

/// Prints the last report: what comes before it only shows that something happens.
async fn verify(client: &Client, layer: String, form: Form, out: &mut dyn Write) -> Result<(), AskError> {
    let mut progress = client.verify_cache(layer).await?;
    let mut last = api::VerifyCacheProgress::default();
    while let Some(now) = progress.message().await.map_err(ClientError::from)? {
        last = now;
    }
    form.show(&last, table::verified, out)?;
    match (last.done, last.wrong_chunks, last.layers_failed) {
        (false, ..) => Err(AskError::Unfinished),
        (true, 0, 0) => Ok(()),
        (true, chunks, layers) => Err(AskError::Wrong { chunks, layers }),
    }
}
