//! Layers mounted by FUSE: on any kernel and any filesystem.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

use estargz::digest::Digest;
use fuse_session::forgetting::{Afterwards, Helpers};
use fuse_session::passthrough::{OpenModes, Passthrough};
use fuse_session::{MountConfig, Session};
use tokio::runtime::Handle;

use super::direct::DirectFiles;
use super::kept::{Descriptors, KeptLayer, KeptSession, SessionKey};
use super::{Ended, Forget, Kind, LayerMounted, Way};
use crate::config::FuseConfig;
use crate::layer::Cause;
use crate::layer::cache::{LayerStore, detach_stale, kind_at};
use crate::layer::fault;
use crate::layer::fetch::LayerFetch;
use crate::layer::fs::LayerFs;
use crate::layer::fuse::LayerFuse;
use crate::metrics::Metrics;

/// Digits of the TOC digest in the mount table.
const SHORT_DIGEST: usize = 16;
/// How long reads under way may hold up that a wrong chunk is forgotten, before that is told; it is forgotten nevertheless.
const FORGET_PATIENCE: Duration = Duration::from_secs(10);
/// The first argument of the process that waits for that.
const FORGET_PAGES: &str = "forget-pages";

/// This program, to wait for the kernel in this one's place.
fn helper_command() -> Command {
    let mut command = Command::new("/proc/self/exe");
    #[cfg(not(test))]
    command.arg(FORGET_PAGES);
    #[cfg(test)]
    command.args(tests::HELPER);
    command
}

/// If this process was started to have pages forgotten: does so. To be called before anything else.
pub fn helper() -> Option<ExitCode> {
    let is_helper = std::env::args_os().nth(1).is_some_and(|verb| verb == FORGET_PAGES);
    is_helper.then(fuse_session::forgetting::serve)
}

/// Mounts by FUSE.
pub struct FuseWay {
    config: FuseConfig,
    runtime: Handle,
    metrics: Metrics,
    descriptors: Descriptors,
    /// Whether the kernel reads complete files by itself.
    direct: bool,
    /// What has pages forgotten.
    helpers: Arc<Helpers>,
}

impl FuseWay {
    /// Sessions run handlers that wait on `runtime`, and are kept in the store of `descriptors` if there is one. With `direct`, which was
    /// tried, the kernel reads complete files by itself.
    pub fn new(config: FuseConfig, direct: bool, runtime: Handle, metrics: Metrics, descriptors: Descriptors) -> Self {
        Self {
            config,
            direct,
            runtime,
            metrics,
            descriptors,
            helpers: Arc::new(Helpers::new(helper_command, FORGET_PATIENCE)),
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

    /// What lets the kernel read complete files of a layer by itself; `modes` are those of a session that goes on.
    fn passthrough(&self, fetch: &Arc<LayerFetch>, store: &LayerStore, modes: Option<OwnedFd>) -> Option<Direct> {
        let toc = fetch.layer().toc_digest();
        let modes = match modes {
            Some(kept) => OpenModes::from_fd(kept),
            None if self.direct => OpenModes::create(u64::from(fetch.layer().index().inode_count())),
            None => return None,
        };
        match modes {
            Ok(modes) => Some(Direct {
                files: Arc::new(DirectFiles::new(fetch, store)),
                modes: Arc::new(modes),
            }),
            Err(error) => {
                tracing::warn!(%toc, error = &error as &dyn std::error::Error, "no file of the layer is read by the kernel itself");
                None
            }
        }
    }

    fn served(&self, session: Session, kept: Vec<String>, direct: Option<Direct>) -> Box<dyn LayerMounted> {
        Box::new(FuseMounted {
            target: session.target().to_owned(),
            session,
            kept,
            descriptors: self.descriptors.clone(),
            helpers: self.helpers.clone(),
            direct,
        })
    }

    /// Keeps what the next process needs of a session; what it is called in the store.
    fn keep(&self, toc: &Digest, session: &Session, direct: Option<&Direct>) -> io::Result<Vec<String>> {
        let (key, number) = (SessionKey::of_new(), session.device());
        let mut kept = Vec::new();
        if let Some(direct) = direct.filter(|_| self.descriptors.has_store()) {
            kept.push(self.descriptors.keep_modes(toc, key, direct.modes.as_fd())?);
            fault::point("session-half-kept");
        }
        let device = self
            .descriptors
            .keep_session(toc, key, session.as_fd(), (number, session.negotiated()));
        match device {
            Ok(name) => kept.extend(name),
            Err(error) => {
                kept.iter().for_each(|name| self.descriptors.forget(name));
                return Err(error);
            }
        }
        Ok(kept)
    }

    /// Goes on with one kept session.
    fn resume_one(
        &self,
        fetch: &Arc<LayerFetch>,
        store: &LayerStore,
        kept: KeptSession,
        modes: Option<OwnedFd>,
    ) -> Result<Box<dyn LayerMounted>, Cause> {
        let toc = fetch.layer().toc_digest();
        let target = fetch.layer().mount_point();
        let names: Vec<_> = modes
            .as_ref()
            .map(|_| Descriptors::modes_name(&toc, kept.key))
            .into_iter()
            .chain([kept.name])
            .collect();
        let mut config = self.mount_config(&toc);
        let direct = modes.and_then(|modes| self.passthrough(fetch, store, Some(modes)));
        config.passthrough = direct.as_ref().map(Direct::passthrough);
        let session = Session::resume(
            self.filesystem(fetch),
            kept.device,
            &target,
            kept.number,
            kept.negotiated,
            config,
        );
        match session {
            Ok(session) => Ok(self.served(session, names, direct)),
            Err(error) => {
                // It was over already, or is now: nobody waits for it.
                names.iter().for_each(|name| self.descriptors.forget(name));
                Err(error.into())
            }
        }
    }
}

/// Files that the kernel reads by itself, and how each file was opened.
#[derive(Clone)]
struct Direct {
    files: Arc<DirectFiles>,
    modes: Arc<OpenModes>,
}

impl Direct {
    fn passthrough(&self) -> Passthrough {
        Passthrough::new(self.files.clone(), self.modes.clone())
    }
}

impl Way for FuseWay {
    fn mount(&self, fetch: &Arc<LayerFetch>, store: &LayerStore) -> Result<Box<dyn LayerMounted>, Cause> {
        let toc = fetch.layer().toc_digest();
        let target = fetch.layer().mount_point();
        if kind_at(&target)?.as_deref() != Some("erofs") {
            detach_stale(&target)?;
        }
        let direct = self.passthrough(fetch, store, None);
        let mut config = self.mount_config(&toc);
        config.passthrough = direct.as_ref().map(Direct::passthrough);
        let session = Session::mount(self.filesystem(fetch), &target, config)?;
        fault::point("session-mounted");
        let kept = self.keep(&toc, &session, direct.as_ref()).unwrap_or_else(|error| {
            tracing::warn!(%toc, %error, "the layer's mount will not outlive this process");
            Vec::new()
        });
        fault::point("session-kept");
        Ok(self.served(session, kept, direct))
    }

    fn resume(
        &self,
        fetch: &Arc<LayerFetch>,
        store: &LayerStore,
        kept: &mut KeptLayer,
    ) -> Vec<Result<Box<dyn LayerMounted>, Cause>> {
        let sessions = std::mem::take(&mut kept.sessions);
        let resume = |session: KeptSession| {
            let modes = kept.take_modes(session.key);
            self.resume_one(fetch, store, session, modes)
        };
        sessions.into_iter().map(resume).collect()
    }
}

struct FuseMounted {
    session: Session,
    target: PathBuf,
    /// Names in the store.
    kept: Vec<String>,
    descriptors: Descriptors,
    helpers: Arc<Helpers>,
    direct: Option<Direct>,
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
        self.session.is_alive() && self.session.is_shown()
    }

    fn forget(&self) -> Forget {
        let (notifier, helpers) = (self.session.notifier(), self.helpers.clone());
        let direct = self.direct.clone();
        let afterwards = if self.kept.is_empty() {
            Afterwards::Over
        } else {
            Afterwards::Resumed
        };
        Box::new(move |chunk| {
            if let Some(direct) = direct.filter(|direct| direct.modes.is_direct(chunk.ino)) {
                return direct.files.forget(chunk);
            }
            let range = chunk.file_offset..chunk.file_offset.saturating_add(u64::from(chunk.size));
            let forgotten = helpers.forget_pages(&notifier, chunk.ino, range, afterwards);
            forgotten.map_err(|error| io::Error::other(hullspeed_daemon::error::chain(&error)))
        })
    }

    fn unmount(self: Box<Self>) -> Result<Ended, Cause> {
        let Self {
            session,
            kept,
            descriptors,
            target: _,
            helpers: _,
            direct: _,
        } = *self;
        if !session.is_alive() {
            // Its number may be another mount's by now.
            session.leave();
            kept.iter().for_each(|name| descriptors.forget(name));
            return Ok(Ended::Wholly);
        }
        let unmounted = session.unmount();
        fault::point("session-unmounted");
        kept.iter().for_each(|name| descriptors.forget(name));
        unmounted?;
        Ok(Ended::Wholly)
    }

    fn leave(self: Box<Self>) {
        if !self.kept.is_empty() && self.session.negotiated().can_resend() {
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

#[cfg(test)]
mod tests {
    //! The way itself is tested with the layers, and against containerd.

    use std::process::ExitCode;

    /// Arguments by which this test binary becomes a helper.
    pub(super) const HELPER: [&str; 4] = ["--exact", NAME, "--ignored", "--nocapture"];
    const NAME: &str = "layer::mounts::fuse::tests::waits_for_another";

    /// Not a test: what has pages forgotten for other tests.
    #[test]
    #[ignore = "a helper of other tests"]
    fn waits_for_another() -> ExitCode {
        fuse_session::forgetting::serve()
    }

    #[test]
    fn a_process_is_a_helper_only_if_it_is_told_so() {
        assert!(super::helper().is_none());
    }
}
