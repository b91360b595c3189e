//! How far each sandbox and container has come, and the events between what was told of it and what is there now.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use hullspeed_proto::cri::v1::{ContainerEventType, ContainerState, PodSandboxState};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::super::{event, id_of, now};
use crate::containerd::Containerd;
use crate::rules::parts::{inner, number, put_text, text, without};
use crate::rules::question;
use crate::wire::{fields, put_varint};

/// How long CRI's state may lag behind an event. containerd itself gives up on an event after 10 s.
const PATIENCE: Duration = Duration::from_secs(15);

/// Between two looks at an id: at first, and at most.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LONGEST_LOOK: Duration = Duration::from_millis(320);

/// Most ids that are waited for.
const MAX_WAITING: usize = 4096;

/// A step in a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    Created,
    Started,
    Stopped,
    Deleted,
}

impl Step {
    const ALL: [Self; 4] = [Self::Created, Self::Started, Self::Stopped, Self::Deleted];

    fn event(self) -> ContainerEventType {
        match self {
            Self::Created => ContainerEventType::ContainerCreatedEvent,
            Self::Started => ContainerEventType::ContainerStartedEvent,
            Self::Stopped => ContainerEventType::ContainerStoppedEvent,
            Self::Deleted => ContainerEventType::ContainerDeletedEvent,
        }
    }

    /// The steps after `told`, until this one.
    fn since(self, told: Option<Self>) -> impl Iterator<Item = Self> {
        let untold = move |step: &Self| told.is_none_or(|told| *step > told) && *step <= self;
        Self::ALL.into_iter().filter(untold)
    }
}

/// Something happened to an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trigger {
    pub(super) id: String,
    pub(super) step: Step,
    /// How its process ended, if that is what happened.
    pub(super) exit: Option<Exit>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exit {
    /// Its exit code.
    pub(super) code: u32,
    /// When, in nanoseconds since the epoch.
    pub(super) at: i64,
}

/// Fields of `ContainerStatus`; the first one also of `PodSandboxStatus`.
const STATE: u32 = 3;
const FINISHED_AT: u32 = 6;
const EXIT_CODE: u32 = 7;
const REASON: u32 = 10;

impl Exit {
    /// A container's last status, as CRI would have shown it after this end.
    fn ended(self, last: &[u8]) -> Vec<u8> {
        let Ok(mut status) = without(last, &[STATE, FINISHED_AT, EXIT_CODE, REASON]) else {
            return last.to_vec();
        };
        let exited = ContainerState::ContainerExited as i32;
        put_varint(&mut status, STATE, u64::from(exited.unsigned_abs()));
        put_varint(&mut status, FINISHED_AT, self.at.cast_unsigned());
        put_varint(&mut status, EXIT_CODE, u64::from(self.code));
        put_text(&mut status, REASON, if self.code == 0 { "Completed" } else { "Error" });
        status
    }
}

/// A sandbox or a container.
#[derive(Debug, Clone)]
struct Track {
    /// The sandbox that it is in; its own id for a sandbox.
    sandbox: String,
    /// What was told last.
    told: Step,
}

#[derive(Debug)]
struct Waiting {
    trigger: Trigger,
    until: Instant,
    next: Instant,
    pause: Duration,
}

/// What CRI shows now, of one id.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    sandbox: String,
    /// `None` if containerd itself does not know: it could not reach the shim. It will stop it.
    step: Option<Step>,
}

/// All that is known.
pub(super) struct Tracks {
    containerd: Containerd,
    known: HashMap<String, Track>,
    waiting: VecDeque<Waiting>,
    /// The last status of each sandbox, for what is told when it is gone.
    statuses: HashMap<String, Vec<u8>>,
    /// The last status of each container, and how it ended, for one that is removed before its end is seen.
    lasts: HashMap<String, Vec<u8>>,
    exits: HashMap<String, Exit>,
}

impl Tracks {
    pub(super) fn new(containerd: Containerd) -> Self {
        Self {
            containerd,
            known: HashMap::new(),
            waiting: VecDeque::new(),
            statuses: HashMap::new(),
            lasts: HashMap::new(),
            exits: HashMap::new(),
        }
    }

    /// Takes what is there as told.
    pub(super) async fn seed(&mut self) -> Result<(), Status> {
        for (id, Shown { sandbox, step }) in self.all().await? {
            // One that containerd is not sure of has run, and its end will be told.
            let step = step.unwrap_or(Step::Started);
            self.known.insert(id, Track { sandbox, told: step });
        }
        Ok(())
    }

    /// Tells the steps between what was told and what is there.
    pub(super) async fn catch_up(&mut self) -> Result<Vec<Bytes>, Status> {
        let shown = self.all().await?;
        let mut events = Vec::new();
        let mut gone: Vec<String> = self.known.keys().cloned().collect();
        let there: HashSet<&str> = shown.iter().map(|(id, _)| id.as_str()).collect();
        gone.retain(|id| !there.contains(id.as_str()));
        // Containers before their sandboxes.
        gone.sort_by_key(|id| self.known.get(id).is_some_and(|track| track.sandbox == *id));
        for id in gone {
            events.extend(self.deleted(&id).await);
        }
        for (id, Shown { sandbox, step }) in shown {
            if let Some(step) = step {
                events.extend(self.reached(&id, &sandbox, step).await);
            }
        }
        Ok(events)
    }

    /// Something happened.
    pub(super) async fn take(&mut self, trigger: Trigger) -> Vec<Bytes> {
        if trigger.step == Step::Deleted {
            self.waiting.retain(|waiting| waiting.trigger.id != trigger.id);
            return self.deleted(&trigger.id).await;
        }
        if let (Some(exit), true) = (trigger.exit, self.known.contains_key(&trigger.id)) {
            self.exits.insert(trigger.id.clone(), exit);
        }
        let (events, arrived) = self.look(&trigger).await;
        if !arrived && self.waiting.len() < MAX_WAITING {
            let at = Instant::now();
            self.waiting.push_back(Waiting {
                trigger,
                until: at + PATIENCE,
                next: at + FIRST_LOOK,
                pause: FIRST_LOOK,
            });
        }
        events
    }

    /// When to call [`Self::look_again`].
    pub(super) fn due(&self) -> Option<Instant> {
        self.waiting.iter().map(|waiting| waiting.next).min()
    }

    /// Looks at what is waited for and due.
    pub(super) async fn look_again(&mut self) -> Vec<Bytes> {
        let mut events = Vec::new();
        for mut waiting in std::mem::take(&mut self.waiting) {
            let at = Instant::now();
            if at < waiting.next {
                self.waiting.push_back(waiting);
                continue;
            }
            let (told, arrived) = self.look(&waiting.trigger).await;
            events.extend(told);
            if !arrived && at < waiting.until {
                waiting.pause = (waiting.pause * 2).min(LONGEST_LOOK);
                waiting.next = Instant::now() + waiting.pause;
                self.waiting.push_back(waiting);
            }
        }
        events
    }

    /// Tells how far an id has come, and whether that is as far as was said.
    async fn look(&mut self, trigger: &Trigger) -> (Vec<Bytes>, bool) {
        let Ok(Some(Shown {
            sandbox,
            step: Some(step),
        })) = self.shown(&trigger.id).await
        else {
            return (Vec::new(), false);
        };
        let mut events = Vec::new();
        if sandbox != trigger.id && !self.known.contains_key(&sandbox) {
            // The sandbox comes before what is in it.
            if let Ok(Some(Shown { step: Some(step), .. })) = self.shown(&sandbox).await {
                events.extend(self.reached(&sandbox, &sandbox, step).await);
            }
        }
        events.extend(self.reached(&trigger.id, &sandbox, step).await);
        (events, step >= trigger.step)
    }

    /// Tells the steps until `step`.
    async fn reached(&mut self, id: &str, sandbox: &str, step: Step) -> Vec<Bytes> {
        let told = self.known.get(id).map(|track| track.told);
        let steps: Vec<Step> = step.since(told).collect();
        if steps.is_empty() {
            return Vec::new();
        }
        let track = Track {
            sandbox: sandbox.to_owned(),
            told: step,
        };
        self.known.insert(id.to_owned(), track);
        self.events(id, sandbox, &steps).await
    }

    async fn deleted(&mut self, id: &str) -> Vec<Bytes> {
        let Some(Track { sandbox, told }) = self.known.remove(id) else {
            return Vec::new();
        };
        // One that ran was stopped first.
        let mut steps: Vec<Step> = Step::Deleted.since(Some(told)).collect();
        if told == Step::Created {
            steps = vec![Step::Deleted];
        }
        let events = self.events(id, &sandbox, &steps).await;
        self.statuses.remove(id);
        self.lasts.remove(id);
        self.exits.remove(id);
        events
    }

    async fn events(&mut self, id: &str, sandbox: &str, steps: &[Step]) -> Vec<Bytes> {
        if let Ok(answer) = question::sandbox_status(&self.containerd, sandbox).await
            && let Ok(Some(status)) = inner(&answer, 1)
        {
            self.statuses.insert(sandbox.to_owned(), status.into_owned());
        }
        if id == sandbox && steps.iter().any(|step| *step >= Step::Stopped) {
            // It may have been removed before its end could be seen.
            self.statuses.entry(id.to_owned()).and_modify(not_ready);
        }
        let containers = self.containers(sandbox).await.unwrap_or_default();
        let status = self.statuses.get(sandbox).map(Vec::as_slice);
        let told = steps.iter().map(|step| {
            let mut shown: Vec<Vec<u8>> = Vec::new();
            for (of, container) in &containers {
                if of != id || *step != Step::Deleted {
                    shown.push(container.clone());
                }
            }
            if *step == Step::Stopped && containers.iter().all(|(of, _)| of != id) {
                // It was removed before its end could be seen.
                shown.extend(
                    self.exits
                        .get(id)
                        .zip(self.lasts.get(id))
                        .map(|(exit, last)| exit.ended(last)),
                );
            }
            event(id, step.event(), now(), status, &shown)
        });
        let told = told.collect();
        self.lasts.extend(containers.into_iter().filter(|(of, _)| of == id));
        told
    }

    /// Statuses of a sandbox's containers, by id.
    async fn containers(&self, sandbox: &str) -> Result<Vec<(String, Vec<u8>)>, Status> {
        let mut statuses = Vec::new();
        for (id, _) in items(&question::containers(&self.containerd, "", sandbox).await?) {
            match question::container_status(&self.containerd, &id).await {
                Ok(answer) => {
                    let status = inner(&answer, 1).ok().flatten();
                    statuses.extend(status.map(|status| (id, status.into_owned())));
                }
                Err(status) if status.code() == Code::NotFound => {}
                Err(status) => return Err(status),
            }
        }
        Ok(statuses)
    }

    /// What CRI shows of an id.
    async fn shown(&self, id: &str) -> Result<Option<Shown>, Status> {
        let containers = question::containers(&self.containerd, id, "").await?;
        if let Some((_, item)) = items(&containers).into_iter().find(|(of, _)| of == id) {
            return Ok(container(&item));
        }
        let sandboxes = question::sandboxes(&self.containerd, id).await?;
        let found = items(&sandboxes).into_iter().find(|(of, _)| of == id);
        Ok(found.and_then(|(id, item)| sandbox(&id, &item)))
    }

    /// All that CRI shows, sandboxes first.
    async fn all(&self) -> Result<Vec<(String, Shown)>, Status> {
        let sandboxes = question::sandboxes(&self.containerd, "").await?;
        let containers = question::containers(&self.containerd, "", "").await?;
        let mut all = Vec::new();
        for (id, item) in items(&sandboxes) {
            all.extend(sandbox(&id, &item).map(|shown| (id, shown)));
        }
        for (id, item) in items(&containers) {
            all.extend(container(&item).map(|shown| (id, shown)));
        }
        Ok(all)
    }
}

/// A `PodSandboxStatus` of a sandbox that has stopped.
fn not_ready(status: &mut Vec<u8>) {
    if let Ok(mut stopped) = without(status, &[STATE]) {
        let state = PodSandboxState::SandboxNotready as i32;
        put_varint(&mut stopped, STATE, u64::from(state.unsigned_abs()));
        *status = stopped;
    }
}

/// Items of a list, by id.
fn items(list: &[u8]) -> Vec<(String, Vec<u8>)> {
    let of = fields(list).flatten().filter(|field| field.number == 1);
    of.filter_map(|field| field.value.bytes())
        .filter_map(|item| Some((id_of(item)?, item.to_vec())))
        .collect()
}

/// A `PodSandbox`.
fn sandbox(id: &str, item: &[u8]) -> Option<Shown> {
    let ready = number(item, 3).ok()?.unwrap_or_default() == 0;
    Some(Shown {
        sandbox: id.to_owned(),
        step: Some(if ready { Step::Started } else { Step::Stopped }),
    })
}

/// A `Container`.
fn container(item: &[u8]) -> Option<Shown> {
    let step = match number(item, 6).ok()?.unwrap_or_default() {
        0 => Some(Step::Created),
        1 => Some(Step::Started),
        2 => Some(Step::Stopped),
        _ => None,
    };
    Some(Shown {
        sandbox: text(item, 2).ok()?,
        step,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hullspeed_proto::cri::v1::ContainerStatus;
    use prost::Message as _;

    #[test]
    fn an_end_that_was_not_seen() {
        let running = ContainerStatus {
            id: "c".into(),
            state: ContainerState::ContainerRunning.into(),
            started_at: 5,
            log_path: "log".into(),
            ..Default::default()
        };
        let exit = Exit { code: 3, at: 9 };
        let ended = ContainerStatus::decode(exit.ended(&running.encode_to_vec()).as_slice()).unwrap();
        let expected = ContainerStatus {
            state: ContainerState::ContainerExited.into(),
            finished_at: 9,
            exit_code: 3,
            reason: "Error".into(),
            ..running
        };
        assert_eq!(ended, expected);
    }

    #[test]
    fn steps_since() {
        let steps = |to: Step, told| to.since(told).collect::<Vec<_>>();
        assert_eq!(steps(Step::Started, None), [Step::Created, Step::Started]);
        assert_eq!(
            steps(Step::Stopped, Some(Step::Created)),
            [Step::Started, Step::Stopped]
        );
        assert_eq!(steps(Step::Started, Some(Step::Stopped)), []);
        assert_eq!(steps(Step::Deleted, Some(Step::Stopped)), [Step::Deleted]);
    }
}
