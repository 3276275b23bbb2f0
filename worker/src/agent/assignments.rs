//! The assignments of this node as a session delivers them: complete first, then differences, never older than
//! what was seen before.

use super::assignment::{Assignment, Image, Layer, Malformed, id};
use crate::secrets::Secrets;
use bulkhead_proto::{ImageId, SecretId, TaskId, limits, wire};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use zeroize::Zeroizing;

/// The newest cluster state that this node has heard of. A manager that is behind it, or one from before a
/// restore, would bring back tasks that have moved elsewhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seen {
    /// The cluster's epoch; raised by restore and recover.
    pub epoch: u64,
    /// The commit index within it.
    pub index: u64,
}

/// Why an update was not taken. Each ends the session; nothing of the update was applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssignmentError {
    /// Try another manager, or the same one later.
    #[error("the manager is at index {} of epoch {}, this node has seen {} of epoch {}", got.index, got.epoch, seen.index, seen.epoch)]
    Stale {
        /// What this node has seen.
        seen: Seen,
        /// What the manager has.
        got: Seen,
    },
    /// An update was lost: the session must begin anew.
    #[error("assignment update {got} came where {expected} was due")]
    Gap {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// A difference came before the complete set.
    #[error("the session's first assignments are not complete")]
    NotComplete,
    /// No correct manager sends this.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// What this node was given, and the secrets for it.
#[derive(Debug, Default)]
pub struct Assignments {
    tasks: BTreeMap<TaskId, Assignment>,
    images: BTreeMap<ImageId, Image>,
    secrets: Secrets,
    seen: Seen,
    known: bool,
    sequence: Option<u64>,
    /// The first parts of an update that does not fit one message.
    part: Option<wire::Assignments>,
}

/// Bytes of one update over all of its messages: far more than a node's tasks need, and bounded.
const UPDATE_BYTES: usize = 16 * limits::MESSAGE_BYTES;

impl Assignments {
    /// Nothing yet, and what was seen before a restart.
    pub fn new(seen: Seen) -> Self {
        Assignments {
            seen,
            ..Assignments::default()
        }
    }

    /// A new session says where its manager stands.
    pub fn welcome(&mut self, got: Seen) -> Result<(), AssignmentError> {
        self.advance(got)?;
        self.sequence = None;
        self.part = None;
        Ok(())
    }

    /// Takes an update over, whole or not at all: an update in several messages once the last one is here.
    pub fn apply(&mut self, mut update: wire::Assignments) -> Result<(), AssignmentError> {
        match self.sequence {
            None if !update.complete => return Err(AssignmentError::NotComplete),
            Some(last) if update.sequence != last + 1 => {
                return Err(AssignmentError::Gap {
                    expected: last + 1,
                    got: update.sequence,
                });
            }
            None | Some(_) => {}
        }
        if let Some(first) = self.part.take() {
            update = join(first, update);
        }
        if update.more {
            if update.encoded_len() > UPDATE_BYTES {
                return Err(Malformed("an update is over its limit".into()).into());
            }
            self.sequence = Some(update.sequence);
            self.part = Some(update);
            return Ok(());
        }
        let put = each(update.put, Assignment::try_from)?;
        let images = each(update.images, Image::try_from)?;
        let secrets = each(update.secrets, secret)?;
        let remove = each(update.remove, |task| id::<TaskId>(&task))?;
        self.advance(Seen {
            epoch: self.seen.epoch,
            index: update.index,
        })?;

        if update.complete {
            self.tasks.clear();
            self.images.clear();
        }
        for task in remove {
            self.tasks.remove(&task);
        }
        self.tasks.extend(put.into_iter().map(|a| (a.task, a)));
        self.images
            .extend(images.into_iter().map(|image| (image.id, image)));
        for (id, value) in secrets {
            self.secrets.put(id, value);
        }
        self.forget_unneeded();
        self.sequence = Some(update.sequence);
        self.known = true;
        Ok(())
    }

    /// Whether a complete set has ever come since the program started. Before that nothing may be stopped as unknown.
    pub fn known(&self) -> bool {
        self.known
    }

    /// The tasks, in the order of their ids.
    pub fn tasks(&self) -> impl Iterator<Item = &Assignment> {
        self.tasks.values()
    }

    /// One task.
    pub fn task(&self, task: TaskId) -> Option<&Assignment> {
        self.tasks.get(&task)
    }

    /// The image of a task.
    pub fn image(&self, image: ImageId) -> Option<&Image> {
        self.images.get(&image)
    }

    /// The layers that these tasks need.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.images.values().flat_map(|image| &image.layers)
    }

    /// The secrets for these tasks.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// To be remembered, and told in the next session's first message.
    pub fn seen(&self) -> Seen {
        self.seen
    }

    fn advance(&mut self, got: Seen) -> Result<(), AssignmentError> {
        if got < self.seen {
            return Err(AssignmentError::Stale { seen: self.seen, got });
        }
        self.seen = got;
        Ok(())
    }

    /// Does not wait to be told: what no task here needs has no reason to be here. The managers' `forget` list
    /// says the same.
    fn forget_unneeded(&mut self) {
        let images: BTreeSet<_> = self.tasks.values().map(|task| task.image).collect();
        self.images.retain(|id, _| images.contains(id));
        let live = self
            .tasks
            .values()
            .filter(|task| task.desired < super::Desired::Shutdown);
        let needed = live
            .flat_map(|task| task.secrets.iter().map(|(id, _)| *id))
            .collect();
        self.secrets.keep_only(&needed);
    }
}

/// Two parts of one update as one.
fn join(mut first: wire::Assignments, next: wire::Assignments) -> wire::Assignments {
    first.put.extend(next.put);
    first.remove.extend(next.remove);
    first.secrets.extend(next.secrets);
    first.forget.extend(next.forget);
    first.images.extend(next.images);
    first.sequence = next.sequence;
    first.index = next.index;
    first.more = next.more;
    first
}

fn each<T, U>(items: Vec<T>, check: impl Fn(T) -> Result<U, Malformed>) -> Result<Vec<U>, Malformed> {
    items.into_iter().map(check).collect()
}

fn secret(secret: wire::AssignedSecret) -> Result<(SecretId, Zeroizing<Vec<u8>>), Malformed> {
    let value = Zeroizing::new(secret.value);
    if value.len() > limits::SECRET_BYTES {
        return Err(Malformed("a secret is over its limit".into()));
    }
    Ok((id(&secret.id)?, value))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn wire_task(n: u8, desired: wire::DesiredState) -> wire::AssignedTask {
        wire::AssignedTask {
            task: Some(wire::Task {
                id: vec![n; 16],
                service_id: vec![9; 16],
                slot: 1,
                fence: u64::from(n),
                desired: desired.into(),
                ..Default::default()
            }),
            spec: Some(wire::ServiceSpec {
                image_id: vec![7; 16],
                secrets: vec![wire::SecretReference {
                    secret_id: vec![5; 16],
                    name: "password".into(),
                }],
                ..Default::default()
            }),
            service_name: "web".into(),
        }
    }

    pub(crate) fn wire_image() -> wire::Image {
        wire::Image {
            id: vec![7; 16],
            name: "web:1".into(),
            layers: vec![wire::ImageLayer {
                digest: vec![1; 32],
                size: 10,
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
                diff_id: vec![2; 32],
            }],
            config: Some(wire::ImageConfig {
                entrypoint: vec!["/web".into()],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(crate) fn complete(index: u64, tasks: Vec<wire::AssignedTask>) -> wire::Assignments {
        wire::Assignments {
            complete: true,
            sequence: 1,
            index,
            put: tasks,
            secrets: vec![wire::AssignedSecret {
                id: vec![5; 16],
                name: "password".into(),
                value: b"hunter2".to_vec(),
            }],
            images: vec![wire_image()],
            ..Default::default()
        }
    }

    fn with_one_task() -> Assignments {
        let mut assignments = Assignments::default();
        assignments.welcome(Seen { epoch: 1, index: 5 }).expect("fresh");
        let update = complete(6, vec![wire_task(1, wire::DesiredState::Running)]);
        assignments.apply(update).expect("complete");
        assignments
    }

    #[test]
    fn an_update_in_parts_is_taken_over_with_the_last_one() {
        let mut assignments = with_one_task();
        assignments.welcome(Seen { epoch: 1, index: 7 }).expect("newer");
        let mut first = complete(8, vec![wire_task(2, wire::DesiredState::Running)]);
        first.more = true;
        assignments.apply(first).expect("a first part");
        let ids = |it: &Assignments| it.tasks().map(|task| task.fence).collect::<Vec<_>>();
        assert_eq!(ids(&assignments), [1]);
        let last = wire::Assignments {
            sequence: 2,
            index: 8,
            put: vec![wire_task(3, wire::DesiredState::Running)],
            ..Default::default()
        };
        assignments.apply(last).expect("the last part");
        assert_eq!(ids(&assignments), [2, 3]);
    }

    #[test]
    fn an_older_manager_is_refused_and_changes_nothing() {
        let mut assignments = with_one_task();
        let seen = assignments.seen();
        for got in [Seen { epoch: 1, index: 5 }, Seen { epoch: 0, index: 99 }] {
            assert_eq!(
                assignments.welcome(got),
                Err(AssignmentError::Stale { seen, got })
            );
        }
        assert_eq!(
            assignments.welcome(Seen { epoch: 2, index: 0 }),
            Ok(()),
            "a restored cluster"
        );
    }

    #[test]
    fn updates_come_in_order_and_whole() {
        let mut assignments = with_one_task();
        let mut update = wire::Assignments {
            sequence: 3,
            index: 7,
            remove: vec![vec![1; 16]],
            ..Default::default()
        };
        let gap = AssignmentError::Gap { expected: 2, got: 3 };
        assert_eq!(assignments.apply(update.clone()), Err(gap));
        update.sequence = 2;
        update.put = vec![wire::AssignedTask::default()];
        assert!(matches!(
            assignments.apply(update.clone()),
            Err(AssignmentError::Malformed(_))
        ));
        assert_eq!(assignments.tasks().count(), 1, "a bad update removed nothing");
        update.put.clear();
        assignments.apply(update).expect("a difference");
        assert_eq!(assignments.tasks().count(), 0);
    }

    #[test]
    fn a_session_starts_complete() {
        let mut assignments = with_one_task();
        assignments.welcome(Seen { epoch: 1, index: 9 }).expect("newer");
        let difference = wire::Assignments {
            sequence: 2,
            index: 9,
            ..Default::default()
        };
        assert_eq!(assignments.apply(difference), Err(AssignmentError::NotComplete));
    }

    #[test]
    fn a_secret_goes_with_the_last_task_that_needs_it() {
        let mut assignments = with_one_task();
        assert_eq!(
            assignments.secrets().get(SecretId::from_bytes([5; 16])),
            Some(&b"hunter2"[..])
        );
        assert!(!format!("{assignments:?}").contains("hunter2"));
        let update = wire::Assignments {
            sequence: 2,
            index: 7,
            put: vec![wire_task(1, wire::DesiredState::Shutdown)],
            ..Default::default()
        };
        assignments.apply(update).expect("stop it");
        assert_eq!(assignments.secrets().ids().count(), 0);
    }

    #[test]
    fn what_no_manager_sends_is_refused() {
        let cases: [fn(&mut wire::Assignments); 5] = [
            |update| update.put[0].task.as_mut().expect("task").desired = 77,
            |update| update.put[0].task.as_mut().expect("task").id = vec![1; 15],
            |update| {
                update.put[0].spec.as_mut().expect("spec").ports = vec![wire::PublishedPort {
                    host: 65536,
                    target: 80,
                }]
            },
            |update| update.images[0].layers[0].media_type = "text/plain".into(),
            |update| update.secrets[0].value = vec![0; limits::SECRET_BYTES + 1],
        ];
        for spoil in cases {
            let mut update = complete(1, vec![wire_task(1, wire::DesiredState::Running)]);
            spoil(&mut update);
            let mut assignments = Assignments::default();
            assert!(matches!(
                assignments.apply(update),
                Err(AssignmentError::Malformed(_))
            ));
            assert!(!assignments.known());
        }
    }
}
