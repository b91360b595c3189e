//! Which way a layer is mounted.
//!
//! Natively where the kernel can; but a layer that the kernel reads by itself can give nothing up, so only one that fits into the cache as
//! a whole is. What an earlier process left goes on as it was.

use std::sync::{Arc, Mutex, PoisonError};

use estargz::digest::Digest;

use super::fuse::FuseWay;
use super::kept::Descriptors;
use super::native::NativeWay;
use super::{LayerMounted, Way};
use crate::layer::Cause;
use crate::layer::cache::LayerStore;
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
    /// Held while something is taken of what is kept, until somebody answers for it.
    taking: Mutex<()>,
    /// Mounts of an earlier process in whose place none could be put.
    orphans: Mutex<Vec<Box<dyn LayerMounted>>>,
}

impl Ways {
    /// `native` is there also where its reach is nothing, if an earlier process has left such mounts.
    pub fn new(fuse: FuseWay, native: Option<NativeWay>, decision: Decision, descriptors: Descriptors) -> Self {
        Self {
            fuse,
            native,
            decision,
            descriptors,
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
                // Who uses them is served on, for as long as this process runs.
                self.orphans
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(former);
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

    /// Everything was restored that can be: what else an earlier process left of these layers is answered with errors.
    pub fn settle(&self, layers: Vec<Digest>) {
        let Some(native) = &self.native else { return };
        let _alone = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let known = layers.into_iter().chain(native.noted());
        for (toc, kept) in self.descriptors.take_native(known) {
            native.deny(toc, kept);
        }
        native.settle();
    }

    /// Stops answering for native mounts: a successor goes on.
    pub fn leave(&self) {
        if let Some(native) = &self.native {
            native.leave();
        }
        let orphans = std::mem::take(&mut *self.orphans.lock().unwrap_or_else(PoisonError::into_inner));
        orphans.into_iter().for_each(|mount| mount.leave());
    }
}
