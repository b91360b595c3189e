//! Sets up the ways of mounting, as the configuration wants them and the node has them.

use std::path::Path;
use std::sync::Arc;

use hullspeed_daemon::error::chain;
use tokio::runtime::Handle;

use crate::config::{Config, MountChoice};
use crate::layer::Cause;
use crate::layer::mounts::fuse::FuseWay;
use crate::layer::mounts::kept::Descriptors;
use crate::layer::mounts::native::NativeWay;
use crate::layer::mounts::ways::{Decision, Reach, Ways};
use crate::layer::native::bounds;
use crate::layer::native::journal::{Journal, JournalError};
use crate::layer::native::probe;
use crate::layer::native::service::Service;
use crate::metrics::Metrics;

/// The ways of mounting layers below `root`. An error where the configuration insists on native mounts and there are none.
pub(super) fn of(
    config: &Config,
    root: &Path,
    metrics: &Metrics,
    descriptors: Descriptors,
    runtime: &Handle,
) -> Result<Ways, Cause> {
    let fuse = FuseWay::new(
        config.fuse.clone(),
        config.fuse.passthrough && passes_through(root, runtime),
        runtime.clone(),
        metrics.clone(),
        descriptors.clone(),
    );
    let decision = decide(config, root, &descriptors)?;
    if decision.reach == Reach::Nothing && !descriptors.has_native() {
        return Ok(Ways::new(fuse, None, decision, descriptors, runtime.clone()));
    }
    let has_left = descriptors.has_native();
    let native = native(config, metrics, &descriptors, runtime);
    match native {
        Ok(native) => Ok(Ways::new(fuse, Some(native), decision, descriptors, runtime.clone())),
        // What an earlier process left is kept, and tried again by the next start.
        Err(error) if config.layers.mount == MountChoice::Erofs || has_left => Err(error),
        Err(error) => {
            tracing::error!(
                error = &*error as &dyn std::error::Error,
                "layers are not mounted natively"
            );
            let decision = Decision {
                reach: Reach::Nothing,
                reason: format!("native mounts cannot be served: {}", chain(&*error)),
                ..decision
            };
            Ok(Ways::new(fuse, None, decision, descriptors, runtime.clone()))
        }
    }
}

/// Whether the kernel reads files by itself here, as the configuration wants it.
fn passes_through(root: &Path, runtime: &Handle) -> bool {
    let tried = probe::passthrough(root, runtime);
    if let Err(error) = &tried {
        tracing::info!(
            error = &**error as &dyn std::error::Error,
            "no file is read by the kernel itself under FUSE: fuse.passthrough is of no effect here"
        );
    }
    tried.is_ok()
}

fn decide(config: &Config, root: &Path, descriptors: &Descriptors) -> Result<Decision, Cause> {
    if config.layers.mount == MountChoice::Fuse {
        return Ok(Decision {
            reach: Reach::Nothing,
            reason: "the configuration says so".to_owned(),
            trial: None,
        });
    }
    let report = probe::run(root, descriptors.has_store());
    tracing::info!(reach = ?report.reach(), report = %report, "how layers can be mounted here");
    if config.layers.mount == MountChoice::Erofs && report.reach() != Reach::All {
        if !descriptors.has_native() {
            return Err(report.to_string().into());
        }
        // Whoever uses what an earlier process mounted would wait for ever.
        tracing::error!(%report, "layers cannot be mounted natively any more; those that are, are served");
    }
    let failed = report
        .steps
        .iter()
        .find_map(|(step, outcome)| Some((step, outcome.as_ref().err()?)));
    Ok(Decision {
        reach: report.reach(),
        reason: match failed {
            None => "the self-test passed".to_owned(),
            Some((step, reason)) => format!("the self-test failed at {:?}: {reason}", step.name()),
        },
        trial: Some(report),
    })
}

fn native(config: &Config, metrics: &Metrics, descriptors: &Descriptors, runtime: &Handle) -> Result<NativeWay, Cause> {
    bounds::raise();
    let kept = descriptors.take_journal().map(Journal::kept);
    let journal = match kept {
        Some(Ok(journal)) => journal,
        Some(Err(error)) => {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "the journal of events that was kept is of no use"
            );
            fresh(descriptors)?
        }
        None => fresh(descriptors)?,
    };
    let service = Service::start(Arc::new(journal), metrics.clone(), runtime.clone())?;
    let read_ahead_kib = u32::try_from(config.fuse.read_ahead.bytes() / 1024).unwrap_or(u32::MAX);
    NativeWay::new(service, descriptors.clone(), read_ahead_kib, runtime.clone())
}

/// A new journal, kept where there is a store; without one nothing is noted in it that would have to be.
fn fresh(descriptors: &Descriptors) -> Result<Journal, JournalError> {
    let journal = Journal::new()?;
    if descriptors.has_store() {
        use std::os::fd::AsFd;
        descriptors.forget("journal");
        descriptors
            .keep_journal(journal.as_fd())
            .map_err(JournalError::Memory)?;
    }
    Ok(journal)
}
