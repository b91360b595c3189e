//! Which way a layer is mounted.
//!
//! Natively where the kernel can; but a layer that the kernel reads by itself can give nothing up, so only one that fits into the cache as
//! a whole is. What an earlier process left goes on as it was.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use estargz::digest::Digest;
use tokio::runtime::Handle;

use super::fuse::FuseWay;
use super::kept::Descriptors;
use super::native::NativeWay;
use super::{LayerMounted, Way, refused};
use crate::layer::Cause;
use crate::layer::cache::{LayerStore, detach_stale};
use crate::layer::fault;
use crate::layer::fetch::LayerFetch;
use crate::layer::native::probe::{Report, Step};
use crate::layer::report::{MountReport, ProbeStep};

/// Which layers are mounted natively.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// None that is mounted from now on.
    Nothing,
    /// Those that are complete: nothing has to answer for them.
    Complete,
    /// All.
    All,
}

impl Reach {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "fuse",
            Self::Complete => "erofs_when_complete",
            Self::All => "erofs",
        }
    }
}

/// Which layers are mounted natively, and why so.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Which.
    pub reach: Reach,
    /// Why, for a person.
    pub reason: String,
    /// What was tried; nothing where the configuration decided.
    pub trial: Option<Report>,
}

/// How a layer is mounted.
pub struct Up {
    /// What those see who come now.
    pub mount: Box<dyn LayerMounted>,
    /// What was there before, for those who use it still.
    pub former: Vec<Box<dyn LayerMounted>>,
}

/// All ways to mount a layer on this node.
pub struct Ways {
    fuse: FuseWay,
    native: Option<NativeWay>,
    decision: Decision,
    descriptors: Descriptors,
    runtime: Handle,
    /// Held while something is taken of what is kept, until somebody answers for it.
    taking: Mutex<()>,
    /// Mounts of an earlier process in whose place none could be put.
    orphans: Mutex<HashMap<Digest, Vec<Box<dyn LayerMounted>>>>,
}

impl Ways {
    /// `native` is there also where its reach is nothing, if an earlier process has left such mounts.
    pub fn new(
        fuse: FuseWay,
        native: Option<NativeWay>,
        decision: Decision,
        descriptors: Descriptors,
        runtime: Handle,
    ) -> Self {
        Self {
            fuse,
            native,
            decision,
            descriptors,
            runtime,
            taking: Mutex::default(),
            orphans: Mutex::default(),
        }
    }

    /// Which way is taken, and why.
    pub fn report(&self) -> MountReport {
        let Decision { reach, reason, trial } = &self.decision;
        let steps = trial.iter().flat_map(|trial| &trial.steps);
        let step = |(step, outcome): &(Step, Result<(), String>)| ProbeStep {
            name: step.name(),
            ok: outcome.is_ok(),
            detail: outcome.as_ref().map_or_else(Clone::clone, |()| "passed".to_owned()),
        };
        MountReport {
            chosen: reach.name(),
            reason: reason.clone(),
            steps: steps.map(step).collect(),
            store: self.descriptors.report(),
        }
    }

    /// What is kept.
    pub fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// Mounts a layer, or goes on with the mount that an earlier process left. Blocks.
    pub fn bring_up(&self, fetch: &Arc<LayerFetch>, store: &LayerStore) -> Result<Up, Cause> {
        let mut former = self.resumed(fetch, store);
        if let Some(shown) = former.iter().position(|mounted| mounted.is_shown()) {
            let mount = former.swap_remove(shown);
            return Ok(Up { mount, former });
        }
        match self.mount(fetch, store) {
            Ok(mount) => Ok(Up { mount, former }),
            Err(error) => {
                // Who uses them is served on, until the layer is unmounted.
                self.orphan(fetch.layer().toc_digest(), former);
                Err(error)
            }
        }
    }

    /// What an earlier process left of the layer.
    fn resumed(&self, fetch: &Arc<LayerFetch>, store: &LayerStore) -> Vec<Box<dyn LayerMounted>> {
        let toc = fetch.layer().toc_digest();
        let _alone = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut kept) = self.descriptors.take_layer(&toc) else {
            return Vec::new();
        };
        // First, so that what is mounted answers when it is asked what it is.
        let by_fuse = self.fuse.resume(fetch, store, &mut kept);
        if !by_fuse.is_empty() {
            fault::point("session-resumed");
        }
        let native: Vec<_> = match &self.native {
            Some(native) => native.resume(fetch, store, &mut kept),
            None if kept.group.is_some() => vec![Err("native mounts are not served".into())],
            None => Vec::new(),
        };
        let told = |resumed: Result<Box<dyn LayerMounted>, Cause>| {
            resumed
                .inspect_err(|error| {
                    tracing::error!(%toc, error = &**error as &dyn std::error::Error,
                        "a mount of an earlier process cannot be gone on with; containers that use it get errors, new ones do not");
                })
                .ok()
        };
        native.into_iter().chain(by_fuse).filter_map(told).collect()
    }

    fn mount(&self, fetch: &Arc<LayerFetch>, store: &LayerStore) -> Result<Box<dyn LayerMounted>, Cause> {
        let toc = fetch.layer().toc_digest();
        if let Some(native) = self.native_for(fetch, store) {
            match native.mount(fetch, store) {
                Ok(mounted) => return Ok(mounted),
                Err(error) => {
                    tracing::warn!(%toc, error = &*error as &dyn std::error::Error, "the layer is mounted by FUSE instead");
                }
            }
        }
        self.fuse.mount(fetch, store)
    }

    fn native_for(&self, fetch: &LayerFetch, store: &LayerStore) -> Option<&NativeWay> {
        let reaches = match self.decision.reach {
            Reach::Nothing => false,
            Reach::Complete => fetch.is_complete(),
            Reach::All => true,
        };
        self.native.as_ref().filter(|_| reaches && store.fits(fetch.layer()))
    }

    /// Mounts a layer natively, now that it is complete, in the place of another mount; `None` where it stays as it is. Blocks.
    pub fn take_over(&self, fetch: &Arc<LayerFetch>, store: &LayerStore) -> Option<Box<dyn LayerMounted>> {
        let native = self.native_for(fetch, store)?;
        native
            .take_over(fetch)
            .inspect_err(|error| {
                tracing::warn!(toc = %fetch.layer().toc_digest(), error = &**error as &dyn std::error::Error,
                    "the layer is complete and stays mounted by FUSE");
            })
            .ok()
    }

    /// Looks after what is in use although it was unmounted. Called every now and then.
    pub fn tidy(&self) {
        if let Some(native) = &self.native {
            native.tidy();
        }
    }

    /// Everything was restored that can be: what else an earlier process left of these layers, with their mount points, is answered with
    /// errors.
    pub fn settle(&self, layers: Vec<(Digest, PathBuf)>) {
        let _alone = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        for (toc, target) in &layers {
            let refused = self.refuse(toc, target);
            self.orphan(*toc, refused);
        }
        if let Some(native) = &self.native {
            // Of directories that are gone the journal may know the names.
            let known = layers.into_iter().map(|(toc, _)| toc).chain(native.noted());
            for (toc, kept) in self.descriptors.take_native(known) {
                native.deny(toc, kept);
            }
            native.settle();
        }
        refused::end(self.descriptors.take_nameless(), &self.descriptors);
    }

    fn orphan(&self, toc: Digest, mounts: Vec<Box<dyn LayerMounted>>) {
        if !mounts.is_empty() {
            let mut orphans = self.orphans.lock().unwrap_or_else(PoisonError::into_inner);
            orphans.entry(toc).or_default().extend(mounts);
        }
    }

    /// Takes down what an earlier process left of a layer that is not mounted by this one. Who has it in use gets errors. Blocks.
    pub fn end(&self, toc: &Digest, target: &Path) {
        let refused = {
            let _alone = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
            self.refuse(toc, target)
        };
        let orphans = self.orphans.lock().unwrap_or_else(PoisonError::into_inner).remove(toc);
        for mount in orphans.into_iter().flatten().chain(refused) {
            if let Err(error) = mount.unmount() {
                tracing::warn!(%toc, error = &*error as &dyn std::error::Error, "a mount that nobody wants did not end cleanly");
            }
        }
        if let Some(native) = &self.native
            && let Err(error) = native.end_denied(toc, target)
        {
            tracing::warn!(%toc, error = &*error as &dyn std::error::Error, "what is kept of a layer that cannot be had stays");
        }
        // Also what a process left that was killed while it put one mount in the place of another.
        if let Err(error) = detach_stale(target) {
            tracing::warn!(%toc, %error, "what an earlier process left mounted, and nobody wants, stays");
        }
    }

    /// Answers all that is asked of what is kept of a layer with errors; the mounts by FUSE.
    fn refuse(&self, toc: &Digest, target: &Path) -> Vec<Box<dyn LayerMounted>> {
        let Some(mut kept) = self.descriptors.take_layer(toc) else {
            return Vec::new();
        };
        let refused = refused::resume(toc, target, &mut kept, &self.descriptors, &self.runtime);
        if let Some(native) = &self.native {
            native.deny(*toc, kept);
        }
        refused
    }

    /// Stops answering for native mounts: a successor goes on.
    pub fn leave(&self) {
        if let Some(native) = &self.native {
            native.leave();
        }
        let orphans = std::mem::take(&mut *self.orphans.lock().unwrap_or_else(PoisonError::into_inner));
        orphans.into_values().flatten().for_each(|mount| mount.leave());
    }
}
