//! Layers mounted by FUSE: on any kernel and any filesystem.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use estargz::digest::Digest;
use fuse_session::{MountConfig, Session};
use tokio::runtime::Handle;

use super::kept::{Descriptors, KeptLayer};
use super::{Forget, Kind, LayerMounted, Way};
use crate::config::FuseConfig;
use crate::layer::Cause;
use crate::layer::cache::detach_stale;
use crate::layer::fetch::LayerFetch;
use crate::layer::fs::LayerFs;
use crate::layer::fuse::LayerFuse;
use crate::metrics::Metrics;

/// Digits of the TOC digest in the mount table.
const SHORT_DIGEST: usize = 16;

/// Mounts by FUSE.
pub struct FuseWay {
    config: FuseConfig,
    runtime: Handle,
    metrics: Metrics,
    descriptors: Descriptors,
}

impl FuseWay {
    /// Sessions run handlers that wait on `runtime`, and are kept in the store of `descriptors` if there is one.
    pub fn new(config: FuseConfig, runtime: Handle, metrics: Metrics, descriptors: Descriptors) -> Self {
        Self {
            config,
            runtime,
            metrics,
            descriptors,
        }
    }

    fn mount_config(&self, toc_digest: &Digest) -> MountConfig {
        let fuse = &self.config;
        let mut config = MountConfig::new(self.runtime.clone());
        config.fs_name = toc_digest.hex().chars().take(SHORT_DIGEST).collect();
        config.workers = NonZeroUsize::new(fuse.workers).unwrap_or(config.workers);
        config.max_background = fuse.max_background;
        config.max_pending = config.max_pending.max(usize::from(fuse.max_background));
        config.read_ahead_kib = u32::try_from(fuse.read_ahead.bytes() / 1024).unwrap_or(config.read_ahead_kib);
        config
    }

    fn filesystem(&self, fetch: &Arc<LayerFetch>) -> LayerFuse {
        LayerFuse::new(LayerFs::new(fetch.clone()), self.metrics.clone())
    }

    fn served(&self, session: Session, kept: Option<String>) -> Box<dyn LayerMounted> {
        Box::new(FuseMounted {
            target: session.target().to_owned(),
            session,
            kept,
            descriptors: self.descriptors.clone(),
        })
    }
}

impl Way for FuseWay {
    fn mount(&self, fetch: &Arc<LayerFetch>) -> Result<Box<dyn LayerMounted>, Cause> {
        let toc = fetch.layer().toc_digest();
        let target = fetch.layer().mount_point();
        detach_stale(&target)?;
        let session = Session::mount(self.filesystem(fetch), &target, self.mount_config(&toc))?;
        let kept = self
            .descriptors
            .keep_session(&toc, session.as_fd(), session.device(), session.negotiated());
        let kept = kept.unwrap_or_else(|error| {
            tracing::warn!(%toc, %error, "the layer's mount will not outlive this process");
            None
        });
        Ok(self.served(session, kept))
    }

    fn resume(&self, fetch: &Arc<LayerFetch>, kept: KeptLayer) -> Result<Box<dyn LayerMounted>, Cause> {
        let toc = fetch.layer().toc_digest();
        let kept = kept.session.ok_or("no descriptor of its session was kept")?;
        let (name, target) = (kept.name, fetch.layer().mount_point());
        let session = Session::resume(
            self.filesystem(fetch),
            kept.device,
            &target,
            kept.number,
            kept.negotiated,
            self.mount_config(&toc),
        );
        match session {
            Ok(session) => Ok(self.served(session, Some(name))),
            Err(error) => {
                // Whoever reads there gets errors instead of waiting for ever.
                if let Err(error) = fuse_session::abort(kept.number) {
                    tracing::debug!(%toc, %error, "a connection that is not resumed had ended");
                }
                self.descriptors.forget(&name);
                Err(error.into())
            }
        }
    }
}

struct FuseMounted {
    session: Session,
    target: PathBuf,
    /// The descriptor's name in the store.
    kept: Option<String>,
    descriptors: Descriptors,
}

impl LayerMounted for FuseMounted {
    fn kind(&self) -> Kind {
        Kind::Fuse
    }

    fn target(&self) -> &Path {
        &self.target
    }

    fn is_alive(&self) -> bool {
        self.session.is_alive()
    }

    fn is_shown(&self) -> bool {
        self.session.is_shown()
    }

    fn forget(&self) -> Forget {
        let notifier = self.session.notifier();
        Box::new(move |chunk| {
            let range = chunk.file_offset..chunk.file_offset.saturating_add(u64::from(chunk.size));
            notifier.forget_pages(chunk.ino, range).map_err(io::Error::from)
        })
    }

    fn unmount(self: Box<Self>) -> Result<(), Cause> {
        let Self {
            session,
            kept,
            descriptors,
            target: _,
        } = *self;
        let unmounted = session.unmount();
        if let Some(name) = kept {
            descriptors.forget(&name);
        }
        Ok(unmounted?)
    }

    fn leave(self: Box<Self>) {
        if self.kept.is_some() && self.session.negotiated().can_resend() {
            return self.session.leave();
        }
        if let Err(error) = self.unmount() {
            tracing::warn!(
                error = &*error as &dyn std::error::Error,
                "a mount that cannot be left did not end cleanly"
            );
        }
    }
}
