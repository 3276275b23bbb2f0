//! What a worker is to be told: the difference between what its tasks need and what its session was told before.
//!
//! Pure. A worker gets an object only because a task of its own needs it, and is told to forget it when the last such
//! task ends.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::wire::{
    AssignedSecret, AssignedTask, Assignments, DesiredState, Image, Task, TaskState, TaskStatus,
};
use bulkhead_proto::{Digest, ImageId, NodeId, SecretId, TaskId};
use bulkhead_raft::state::State;
use prost::Message as _;

use crate::view;

/// Bytes after which an update goes on in another message. One more item, of at most a transaction's size, still fits a
/// message.
const PART_BYTES: usize = 2 << 20;

/// What a session has told its worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    tasks: BTreeMap<TaskId, Wanted>,
    secrets: BTreeSet<SecretId>,
    images: BTreeSet<ImageId>,
}

/// What of a task matters to its worker. The rest of its record changes with the worker's own reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    desired: i32,
    spec_version: u64,
    start_after: i64,
    fence: u64,
}

/// What to tell it now.
#[derive(Debug, Default, PartialEq)]
pub struct Update {
    /// New or changed tasks.
    pub put: Vec<AssignedTask>,
    /// Tasks that are no longer the node's.
    pub remove: Vec<TaskId>,
    /// Images that it needs and was not told of.
    pub images: Vec<Image>,
    /// Secrets that it needs and was not given. They are still sealed.
    pub secrets: Vec<SecretId>,
    /// Secrets that it no longer needs.
    pub forget: Vec<SecretId>,
    /// What it has been told once all this was sent.
    pub told: Told,
}

impl Update {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.put.is_empty() && self.remove.is_empty() && self.secrets.is_empty() && self.forget.is_empty()
    }

    /// The messages, in order, with the secrets that could be opened. Those that could not are taken out of what was
    /// told, so that they are tried again.
    pub fn into_parts(
        self,
        complete: bool,
        index: u64,
        sequence: u64,
        secrets: Vec<AssignedSecret>,
    ) -> (Told, Vec<Assignments>) {
        let mut told = self.told;
        for wanted in &self.secrets {
            if !secrets.iter().any(|it| it.id == wanted.as_bytes()) {
                told.secrets.remove(wanted);
            }
        }
        let mut parts = Parts {
            done: Vec::new(),
            bytes: 0,
            empty: Assignments {
                complete,
                index,
                ..Default::default()
            },
        };
        parts.part();
        for task in self.put {
            let bytes = task.encoded_len();
            parts.with(bytes).put.push(task);
        }
        for task in self.remove {
            parts.with(20).remove.push(task.to_wire());
        }
        for image in self.images {
            let bytes = image.encoded_len();
            parts.with(bytes).images.push(image);
        }
        for secret in secrets {
            let bytes = secret.encoded_len();
            parts.with(bytes).secrets.push(secret);
        }
        for secret in self.forget {
            parts.with(20).forget.push(secret.to_wire());
        }
        let mut done = parts.done;
        let last = done.len() - 1;
        for (at, part) in (0u64..).zip(done.iter_mut()) {
            part.sequence = sequence + at;
        }
        done.iter_mut().take(last).for_each(|part| part.more = true);
        (told, done)
    }
}

/// An update being cut into messages.
struct Parts {
    done: Vec<Assignments>,
    bytes: usize,
    empty: Assignments,
}

impl Parts {
    fn part(&mut self) -> &mut Assignments {
        if self.done.is_empty() {
            self.done.push(self.empty.clone());
        }
        self.done.last_mut().expect("just filled")
    }

    /// The message that an item of this size goes into.
    fn with(&mut self, bytes: usize) -> &mut Assignments {
        if self.bytes > 0 && self.bytes + bytes > PART_BYTES {
            self.done.push(self.empty.clone());
            self.bytes = 0;
        }
        self.bytes += bytes;
        self.part()
    }
}

/// Compares what the node's tasks need with what it was told.
pub fn plan(state: &State, node: NodeId, told: &Told) -> Update {
    let mut update = Update::default();
    let mut images: BTreeMap<ImageId, &Image> = BTreeMap::new();
    for task in view::tasks_of(state, node) {
        let (Ok(id), Some((service, spec))) =
            (TaskId::try_from(task.id.as_slice()), view::spec_of(state, task))
        else {
            continue;
        };
        let wanted = wanted(task);
        update.told.tasks.insert(id, wanted);
        if wanted.desired < i32::from(DesiredState::Shutdown) {
            let image = ImageId::try_from(spec.image_id.as_slice()).ok();
            images.extend(image.and_then(|id| Some((id, view::image(state, id)?))));
            let secrets = spec
                .secrets
                .iter()
                .filter_map(|it| SecretId::try_from(it.secret_id.as_slice()).ok());
            update.told.secrets.extend(secrets);
        }
        if told.tasks.get(&id) != Some(&wanted) {
            update.put.push(AssignedTask {
                task: Some(as_told(task, wanted)),
                spec: Some(spec.clone()),
                service_name: service
                    .versions
                    .last()
                    .and_then(|version| version.spec.as_ref())
                    .map_or_else(String::new, |spec| spec.name.clone()),
            });
        }
    }
    update.told.images = images.keys().copied().collect();
    let new_images = images.iter().filter(|(id, _)| !told.images.contains(id));
    update.images = new_images.map(|(_, image)| (*image).clone()).collect();
    update.remove = told
        .tasks
        .keys()
        .filter(|id| !update.told.tasks.contains_key(id))
        .copied()
        .collect();
    update.secrets = update.told.secrets.difference(&told.secrets).copied().collect();
    update.forget = told.secrets.difference(&update.told.secrets).copied().collect();
    update
}

/// A task that ended, or that was given up as lost, is never wanted again, whatever its record still desires: a worker
/// that lost its own records would start it a second time.
fn wanted(task: &Task) -> Wanted {
    let over = task.status.as_ref().map_or(0, |it| it.state) >= i32::from(TaskState::Complete);
    let desired = match over {
        true => task.desired.max(DesiredState::Shutdown.into()),
        false => task.desired,
    };
    Wanted {
        desired,
        spec_version: task.spec_version,
        start_after: task.start_after,
        fence: task.fence,
    }
}

/// The task without what only managers read.
fn as_told(task: &Task, wanted: Wanted) -> Task {
    Task {
        desired: wanted.desired,
        meta: None,
        refusals: Vec::new(),
        status: task.status.as_ref().map(|status| TaskStatus {
            state: status.state,
            ..Default::default()
        }),
        ..task.clone()
    }
}

/// Whether the task may still run: then its node has what it needs.
pub fn may_still_run(task: &Task) -> bool {
    wanted(task).desired < i32::from(DesiredState::Shutdown)
}

/// Whether a task of this node that may still run is made of an image with this blob.
pub fn needs_blob(state: &State, node: NodeId, digest: &Digest) -> bool {
    let id = digest.as_bytes();
    view::tasks_of(state, node)
        .filter(|task| may_still_run(task))
        .filter_map(|task| {
            let (_, spec) = view::spec_of(state, task)?;
            view::image(state, ImageId::try_from(spec.image_id.as_slice()).ok()?)
        })
        .any(|image| {
            let layers = image.layers.iter().map(|layer| &layer.digest);
            layers
                .chain([&image.manifest_digest, &image.config_digest])
                .any(|it| it == id)
        })
}

/// Whether a task of this node that may still run uses this secret: asked once more, right before it leaves.
pub fn needs_secret(state: &State, node: NodeId, secret: SecretId) -> bool {
    view::tasks_of(state, node)
        .filter(|task| may_still_run(task))
        .filter_map(|task| view::spec_of(state, task))
        .any(|(_, spec)| spec.secrets.iter().any(|it| it.secret_id == secret.as_bytes()))
}
