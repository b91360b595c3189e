//! containerd's own record of an adopted sandbox, made the pod's.
//!
//! containerd's CRI plugin keeps sandboxes in memory and reads their records at its start only. Once a record is the
//! pod's, the next start of containerd makes it the pod's everywhere, with or without this daemon. That is also how one
//! leaves: drain, restart containerd, point the kubelet at it.
//!
//! The work is done in the background, a few at a time, again and again while containerd is away, and not before the
//! pod has had time to start: until then the journal answers for it. A daemon that is told to stop does first what it
//! can. The work can be repeated: the result depends only on the adoption. What is not ours in a record stays as it is,
//! byte for byte.
//!
//! **Others who read records.** NRI plugins and the legacy NRI get what containerd has in memory: the hull's names until
//! containerd restarts. Whatever reads containers.v1 (nerdctl, ctr) sees the pod's labels at once.

use std::borrow::Cow;
use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hullspeed_daemon::error::chain;
use hullspeed_proto::containerd::services::containers::v1::{GetContainerRequest, UpdateContainerRequest};
use hullspeed_proto::containerd::services::sandbox::v1::{StoreGetRequest, StoreUpdateRequest};
use hullspeed_proto::cri::v1::{PodSandboxConfig, PodSandboxMetadata};
use prost_types::{Any, FieldMask};
use tokio::sync::{Notify, RwLock};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::adopter::Options;
use super::journal::{Journal, Record};
use super::{Observer, fault};
use crate::containerd::{CallError, Containerd, limited, sysctls};
use crate::ledger::{Adoption, HULL_LABEL, Ledger, sandbox_name};
use crate::rules::Events;

pub mod record;

use record::RecordError;

/// The extension of a sandbox's record that is CRI's.
pub const METADATA_EXTENSION: &str = "io.cri-containerd.sandbox.metadata";

/// The same in the second copy.
const STORE_EXTENSION: &str = "metadata";

/// Our own extension: the time of adoption, for ever.
pub const ADOPTION_EXTENSION: &str = "io.hullspeed.adoption";

/// Records rewritten at once. Each costs containerd a transaction or two, which pods' starts wait for.
const AT_ONCE: usize = 2;

/// How long the record of a sandbox waits after its adoption. containerd commits one transaction after the other, each
/// to the disk, and the pod's containers need some.
const SETTLING: Duration = Duration::from_secs(2);

/// For what is left when the daemon is told to stop.
const LEAVING: Duration = Duration::from_secs(10);

/// Sandboxes that wait. Those beyond are taken up by the next recovery.
const MAX_WAITING: usize = 4096;

/// Pauses between attempts on one record.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How the work on a record can end: labels of a metric.
pub const RESULTS: [&str; 3] = [DONE, GONE, FAILED];
const DONE: &str = "ok";
const GONE: &str = "gone";
const FAILED: &str = "failed";

/// Attempts on a record that containerd answers about but that cannot be rewritten.
const MAX_REFUSALS: u32 = 8;

/// Why a record could not be rewritten.
#[derive(Debug, thiserror::Error)]
pub enum RebrandError {
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The pod has lost the sandbox meanwhile.
    #[error("the sandbox is its pod's no more")]
    Lost,
    /// The record is not such as we know.
    #[error("the record in {service} is not as expected")]
    Record {
        /// Whose.
        service: &'static str,
        /// What about it.
        #[source]
        source: RecordError,
    },
}

impl RebrandError {
    fn code(&self) -> Option<Code> {
        match self {
            Self::Call(error) => Some(error.source.code()),
            Self::Lost | Self::Record { .. } => None,
        }
    }

    /// Whether containerd is away, so that the record cannot be blamed.
    fn is_absence(&self) -> bool {
        matches!(
            self.code(),
            Some(Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
        )
    }
}

#[derive(Debug, Default)]
struct Waiting {
    /// With the time from which on each may be worked on, the earliest first.
    order: VecDeque<(Instant, String)>,
    known: BTreeSet<String>,
    /// Given up, until the next recovery. Only what the ledger calls adopted stays in it.
    refused: BTreeSet<String>,
}

/// Adopted sandboxes whose records in containerd are still their hulls'. After a restart of containerd without us, the
/// kubelet would find hulls in their place.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Unbranded {
    /// To be rewritten, or tried again.
    pub pending: Vec<Arc<Adoption>>,
    /// Given up: containerd answers, but the record cannot be rewritten.
    pub refused: Vec<Arc<Adoption>>,
}

impl Unbranded {
    fn of(adoptions: Vec<Arc<Adoption>>, is_branded: impl Fn(&str) -> bool, refused: &BTreeSet<String>) -> Self {
        let unbranded = adoptions.into_iter().filter(|one| !is_branded(&one.sandbox_id));
        let (refused, pending) = unbranded.partition(|one| refused.contains(&one.sandbox_id));
        Self { pending, refused }
    }
}

/// What the work needs; shared by its tasks.
struct Shared {
    containerd: Containerd,
    ledger: Ledger,
    events: Events,
    journal: Arc<Journal>,
    observer: Arc<dyn Observer>,
    waiting: Mutex<Waiting>,
    more: Notify,
    /// Held for reading while a record becomes a pod's, for writing while one is taken from its pod.
    writing: RwLock<()>,
}

/// Rewrites records in the background. Cheap to clone.
#[derive(Clone)]
pub struct Rebrander {
    shared: Arc<Shared>,
}

impl Rebrander {
    /// One for these parts; [`Self::run`] does the work.
    #[must_use]
    pub fn new(options: &Options, journal: Arc<Journal>) -> Self {
        let shared = Shared {
            containerd: options.containerd.clone(),
            ledger: options.ledger.clone(),
            events: options.events.clone(),
            journal,
            observer: Arc::clone(&options.observer),
            waiting: Mutex::default(),
            more: Notify::new(),
            writing: RwLock::new(()),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The record of this sandbox, which the ledger calls adopted, is to be rewritten now.
    pub fn add(&self, sandbox_id: &str) {
        self.add_at(sandbox_id, Instant::now());
    }

    /// The same once its pod has had time to start.
    pub fn add_later(&self, sandbox_id: &str) {
        self.add_at(sandbox_id, Instant::now() + SETTLING);
    }

    fn add_at(&self, sandbox_id: &str, due: Instant) {
        let mut waiting = self.waiting();
        if waiting.order.len() >= MAX_WAITING {
            tracing::warn!(
                sandbox_id,
                "too many records wait to be rewritten; this one waits for the next recovery"
            );
        } else if waiting.known.insert(sandbox_id.to_owned()) {
            waiting.refused.remove(sandbox_id);
            let at = waiting.order.partition_point(|(other, _)| *other <= due);
            waiting.order.insert(at, (due, sandbox_id.to_owned()));
        }
        drop(waiting);
        self.shared.more.notify_one();
    }

    /// The next one that may be worked on, or when there will be one.
    fn next(&self, now: Instant) -> Result<String, Option<Instant>> {
        let mut waiting = self.waiting();
        match waiting.order.pop_front_if(|(due, _)| *due <= now) {
            Some((_, id)) => Ok(id),
            None => Err(waiting.order.front().map(|(due, _)| *due)),
        }
    }

    /// What is left to do, and what cannot be done.
    #[must_use]
    pub fn unbranded(&self) -> Unbranded {
        let adoptions = self.shared.ledger.adoptions();
        let refused = self.waiting().refused.clone();
        Unbranded::of(adoptions, |id| self.shared.journal.is_branded(id), &refused)
    }

    fn refuse(&self, id: &str) {
        let mut waiting = self.waiting();
        waiting.refused.retain(|id| self.shared.ledger.adoption(id).is_some());
        waiting.refused.insert(id.to_owned());
    }

    /// Works until told to stop, and then, for a while, on what is left. What is left after that is in the journal.
    pub async fn run(self, stopping: CancellationToken) {
        let mut tasks = JoinSet::new();
        while !stopping.is_cancelled() {
            let due = self.begin(&mut tasks, Instant::now(), &stopping);
            let may_begin = tasks.len() < AT_ONCE;
            let until = tokio::time::Instant::from_std(due.unwrap_or_else(Instant::now));
            tokio::select! {
                () = stopping.cancelled() => {}
                () = self.shared.more.notified(), if may_begin => {}
                () = tokio::time::sleep_until(until), if may_begin && due.is_some() => {}
                Some(_) = tasks.join_next() => {}
            }
        }
        let everything = async {
            loop {
                // All of it is due when there is no later.
                self.begin(&mut tasks, Instant::now() + SETTLING, &stopping);
                if tasks.join_next().await.is_none() {
                    return;
                }
            }
        };
        if tokio::time::timeout(LEAVING, everything).await.is_err() {
            tracing::warn!("not every record is rewritten; the next start goes on");
        }
        tasks.shutdown().await;
    }

    /// Begins what may be begun. Says when there is more, unless all that may be under way is.
    fn begin(&self, tasks: &mut JoinSet<()>, now: Instant, stopping: &CancellationToken) -> Option<Instant> {
        while tasks.len() < AT_ONCE {
            let id = match self.next(now) {
                Ok(id) => id,
                Err(due) => return due,
            };
            let (this, stopping) = (self.clone(), stopping.clone());
            tasks.spawn(async move {
                this.work_on(&id, &stopping).await;
                this.waiting().known.remove(&id);
            });
        }
        None
    }

    /// Until it is done, the sandbox is gone, or the record is such that it never will be. Told to stop, it tries once.
    async fn work_on(&self, id: &str, stopping: &CancellationToken) {
        let (mut pause, mut refusals) = (FIRST_PAUSE, 0);
        let result = loop {
            // Removed by its pod meanwhile, it is nobody's.
            let Some(adoption) = self.shared.ledger.adoption(id) else {
                break GONE;
            };
            match self.rebrand(&adoption).await {
                Ok(()) => break self.done(id),
                Err(RebrandError::Lost) => break GONE,
                Err(error) if error.code() == Some(Code::NotFound) => break GONE,
                Err(error) => {
                    refusals += u32::from(!error.is_absence());
                    if refusals >= MAX_REFUSALS {
                        tracing::error!(sandbox_id = id, error = %chain(&error), "a sandbox's record stays its hull's");
                        self.refuse(id);
                        break FAILED;
                    }
                    tracing::warn!(sandbox_id = id, error = %chain(&error), "a sandbox's record could not be rewritten yet");
                }
            }
            if stopping.is_cancelled() {
                return;
            }
            tokio::select! {
                () = stopping.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        };
        self.shared.observer.rebranded(result);
    }

    fn done(&self, id: &str) -> &'static str {
        if let Err(error) = self.shared.journal.append(Record::Branded(id.to_owned())) {
            tracing::warn!(sandbox_id = id, error = %chain(&error), "the journal does not know of a rewritten record");
        }
        fault::point("rebranded");
        DONE
    }

    /// Makes both copies of the record the pod's.
    async fn rebrand(&self, adoption: &Adoption) -> Result<(), RebrandError> {
        let containerd = &self.shared.containerd;
        let facts = self.shared.events.facts();
        let mut stored = adoption.clone();
        if let Some(facts) = facts
            && let Cow::Owned(config) = sysctls::stored(&adoption.config, &facts)
        {
            stored.config = config;
        }
        let adoption = &stored;
        let request = container_update(containerd, adoption, record::note(adoption)).await?;
        self.while_adopted(adoption, update_container(containerd, request))
            .await?;
        fault::point("rebranding");
        if let Some(request) = store_update(containerd, adoption).await? {
            self.while_adopted(adoption, update_store(containerd, request)).await?;
        }
        Ok(())
    }

    /// Looked at just before the write: a sandbox that was taken from its pod must not get the pod's name again.
    async fn while_adopted(
        &self,
        adoption: &Adoption,
        update: impl Future<Output = Result<(), RebrandError>>,
    ) -> Result<(), RebrandError> {
        let _writing = self.shared.writing.read().await;
        if self.shared.ledger.adoption(&adoption.sandbox_id).is_none() {
            return Err(RebrandError::Lost);
        }
        update.await
    }

    /// Gives the record of a sandbox, which the ledger does not call adopted any more, a name that no pod has, and the
    /// mark: two records of one name keep containerd from starting, and what is marked is removed.
    pub(super) async fn disown(&self, sandbox_id: &str) -> Result<(), RebrandError> {
        let _alone = self.shared.writing.write().await;
        let containerd = &self.shared.containerd;
        let nobody = nobodys(sandbox_id, self.shared.ledger.mark().value());
        let request = container_update(containerd, &nobody, record::NOTE_OF_NOBODY.to_vec()).await?;
        update_container(containerd, request).await?;
        match store_update(containerd, &nobody).await? {
            Some(request) => update_store(containerd, request).await,
            None => Ok(()),
        }
    }
}

/// A sandbox that is nobody's.
fn nobodys(sandbox_id: &str, mark: &str) -> Adoption {
    let metadata = PodSandboxMetadata {
        name: format!("dropped-{sandbox_id}"),
        uid: sandbox_id.to_owned(),
        namespace: "hullspeed".into(),
        attempt: 0,
    };
    Adoption {
        sandbox_id: sandbox_id.to_owned(),
        config: PodSandboxConfig {
            metadata: Some(metadata),
            labels: [(HULL_LABEL.to_owned(), mark.to_owned())].into(),
            ..Default::default()
        },
        runtime_handler: String::new(),
        adopted_at: 0,
    }
}

async fn container_update(
    containerd: &Containerd,
    adoption: &Adoption,
    note: Vec<u8>,
) -> Result<UpdateContainerRequest, RebrandError> {
    const SERVICE: &str = "containers.v1";
    let failed = |source| RebrandError::Record {
        service: SERVICE,
        source,
    };
    let mut client = containerd.containers();
    let id = adoption.sandbox_id.clone();
    let found = limited("Containers.Get", client.get(GetContainerRequest { id })).await?;
    let mut container = found.container.ok_or(RecordError::Missing).map_err(failed)?;
    let extension = container.extensions.get_mut(METADATA_EXTENSION);
    let extension = extension.ok_or(RecordError::Missing).map_err(failed)?;
    let edited = record::edit(&extension.value, adoption).map_err(failed)?;
    container.labels = record::labels(&container.labels, &edited.labels_before, adoption);
    extension.value = edited.json;
    let note = Any {
        type_url: ADOPTION_EXTENSION.into(),
        value: note,
    };
    container.extensions.insert(ADOPTION_EXTENSION.into(), note);
    let paths = vec![
        "labels".to_owned(),
        format!("extensions.{METADATA_EXTENSION}"),
        format!("extensions.{ADOPTION_EXTENSION}"),
    ];
    Ok(UpdateContainerRequest {
        container: Some(container),
        update_mask: Some(FieldMask { paths }),
    })
}

async fn update_container(containerd: &Containerd, request: UpdateContainerRequest) -> Result<(), RebrandError> {
    limited("Containers.Update", containerd.containers().update(request)).await?;
    Ok(())
}

/// None where there is no second copy.
async fn store_update(
    containerd: &Containerd,
    adoption: &Adoption,
) -> Result<Option<StoreUpdateRequest>, RebrandError> {
    const SERVICE: &str = "sandbox.v1";
    let failed = |source| RebrandError::Record {
        service: SERVICE,
        source,
    };
    let mut client = containerd.sandboxes();
    let sandbox_id = adoption.sandbox_id.clone();
    let found = match limited("Store.Get", client.get(StoreGetRequest { sandbox_id })).await {
        // containerd 1.6 has no such service, and sandboxes older than 2.0 are not in it.
        Err(error) if matches!(error.source.code(), Code::Unimplemented | Code::NotFound) => return Ok(None),
        other => other?,
    };
    let mut sandbox = found.sandbox.ok_or(RecordError::Missing).map_err(failed)?;
    let Some(extension) = sandbox.extensions.get_mut(STORE_EXTENSION) else {
        // 1.7 keeps sandboxes of other controllers here.
        return Ok(None);
    };
    extension.value = record::edit(&extension.value, adoption).map_err(failed)?.json;
    let mut fields = vec![format!("extensions.{STORE_EXTENSION}")];
    if let Some(metadata) = &adoption.config.metadata {
        sandbox.labels.insert("name".into(), sandbox_name(metadata));
        fields.push("labels.name".into());
    }
    // containerd reads the runtime of any update, there or not.
    sandbox.runtime.get_or_insert_default();
    Ok(Some(StoreUpdateRequest {
        sandbox: Some(sandbox),
        fields,
    }))
}

async fn update_store(containerd: &Containerd, request: StoreUpdateRequest) -> Result<(), RebrandError> {
    match limited("Store.Update", containerd.sandboxes().update(request)).await {
        Err(error) if error.source.code() == Code::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adopt::testing;

    #[test]
    fn adoptions_are_pending_until_their_records_are_rewritten_or_given_up() {
        let adoption = |id: &str| {
            Arc::new(Adoption {
                sandbox_id: id.into(),
                config: testing::pod(id),
                runtime_handler: String::new(),
                adopted_at: 7,
            })
        };
        let adoptions: Vec<_> = ["done", "waits", "refused"].map(adoption).into();
        // What was given up and is gone since does not count.
        let refused = BTreeSet::from(["refused".to_owned(), "gone".to_owned()]);
        let unbranded = Unbranded::of(adoptions, |id| id == "done", &refused);
        let expected = Unbranded {
            pending: vec![adoption("waits")],
            refused: vec![adoption("refused")],
        };
        assert_eq!(unbranded, expected);
    }
}
