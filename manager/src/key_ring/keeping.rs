//! The leader's part in renewing the key ring: what [`due`](super::renewal::due) says is sealed, opened and committed.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    Change, Cluster, Kind, ObjectRef, Precondition, Rotation, Secret, VersionIs, change::Change as Step,
    object::Object as Any, precondition::Precondition as Condition,
};
use bulkhead_raft::Replica;
use bulkhead_raft::state::{Key, State};
use prost::Message as _;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::renewal::{self, Due};
use super::{KeyRing, KeyRingError};
use crate::ca::CaError;
use crate::ca::rotation::{self, Order};
use crate::proposer::Proposer;
use crate::view;

/// Finds what only time changes, and what failed before.
const LOOK: Duration = Duration::from_millis(500);
/// Bytes of sealed values that one transaction moves; one value of the largest size fits a transaction beside them.
const MOVED_BYTES: usize = 256 << 10;

/// What keeps the ring, on the manager that leads.
#[derive(Debug)]
pub struct Keeping {
    /// Read from.
    pub replica: Replica,
    /// Written through.
    pub proposer: Proposer,
    /// Seals and opens.
    pub ring: KeyRing,
    /// Wall time for an epoch's age.
    pub clock: Arc<dyn Clock>,
}

/// What is committed next.
#[derive(Debug)]
struct Next {
    preconditions: Vec<Precondition>,
    changes: Vec<Change>,
    what: &'static str,
}

impl Keeping {
    /// Carries the ring on while this manager leads; ends when stopped. It looks now and then, not at each of thousands of
    /// commits a second; once something is due it goes on without a pause.
    pub async fn run(self, stop: CancellationToken) {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            while self.step().await && !stop.is_cancelled() {}
        }
    }

    /// Commits what is due; false where nothing is, or it was not committed.
    async fn step(&self) -> bool {
        let Some(term) = self.replica.leadership().borrow().leading else {
            return false;
        };
        let now = i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX);
        let next = match next(&self.ring, &self.replica.state(), now) {
            Ok(Some(next)) => next,
            Ok(None) => return false,
            Err(error) => {
                let error = crate::refusal::chain(&error);
                tracing::warn!(error, "the key ring cannot be renewed here");
                return false;
            }
        };
        let proposed = self.proposer.controller(term, next.preconditions, next.changes);
        match proposed.await {
            Ok(outcome) if outcome.rejection.is_none() => {
                tracing::info!(target: "audit", index = outcome.index, "key ring: {}", next.what);
                self.replica.wait_applied(outcome.index).await;
                true
            }
            // Overtaken, or not this manager's to lead any more: it is planned again.
            Ok(_) => false,
            Err(error) => {
                tracing::debug!(%error, "a step of the key ring was not proposed");
                false
            }
        }
    }
}

/// What is due, made and sealed.
fn next(ring: &KeyRing, state: &State, now: i64) -> Result<Option<Next>, CaError> {
    let (Some(due), Some(cluster)) = (renewal::due(state, now), view::cluster(state)) else {
        return Ok(None);
    };
    let mut new = cluster.clone();
    let what = match due {
        Due::Epoch { exposed } => {
            new.key_ring = ring.with_next_epoch(cluster, &renewal::holders(state), now)?;
            new.root_exposed |= exposed;
            "a new epoch begins"
        }
        Due::Move => return Ok(Some(moved(ring, state, cluster)?)),
        Due::Forget => {
            let newest = new.key_ring.pop();
            new.key_ring = newest.into_iter().collect();
            new.reseal += 1;
            "the epochs of before are forgotten"
        }
        Due::Root => {
            let order = Order {
                deadline: limits::ROTATION_DEADLINE,
                compromised: false,
            };
            let rotation = rotation::begin(cluster, order, ring, now)?;
            new.rotation = Some(Rotation {
                exposed: true,
                ..rotation
            });
            new.root_exposed = false;
            "a rotation of the root begins: a manager that could open its key is gone"
        }
    };
    Ok(Some(Next {
        preconditions: vec![view::unchanged_cluster(cluster)],
        changes: vec![replace(Any::Cluster(new))],
        what,
    }))
}

/// Seals some of what is left anew: first what the cluster object holds, then secrets, as many as fit.
fn moved(ring: &KeyRing, state: &State, cluster: &Cluster) -> Result<Next, KeyRingError> {
    let place = renewal::cluster_place(cluster).ok_or(KeyRingError::Empty)?;
    let mut new = cluster.clone();
    for sealed in renewal::places(&mut new) {
        if let Some(moved) = ring.moved(cluster, place, sealed)? {
            *sealed = moved;
        }
    }
    let what = "what is sealed moves to the newest epoch";
    if new != *cluster {
        return Ok(Next {
            preconditions: vec![view::unchanged_cluster(cluster)],
            changes: vec![replace(Any::Cluster(new))],
            what,
        });
    }
    // The ring itself must be the one that was read: a value must not move to an epoch that is no more.
    let mut preconditions = vec![view::unchanged_cluster(cluster)];
    let (mut changes, mut bytes) = (Vec::new(), 0);
    let newest = ring.newest(cluster)?;
    for secret in renewal::old_secrets(state, newest) {
        if bytes > MOVED_BYTES {
            break;
        }
        bytes += secret.encoded_len();
        let id = secret.id.as_slice().try_into().unwrap_or_default();
        let sealed = secret.value.as_ref();
        let moved = match sealed {
            Some(sealed) => ring.moved(cluster, Key::new(Kind::Secret, id), sealed)?,
            None => None,
        };
        preconditions.push(unchanged(secret));
        changes.push(replace(Any::Secret(Secret {
            value: moved.or_else(|| secret.value.clone()),
            ..secret.clone()
        })));
    }
    Ok(Next {
        preconditions,
        changes,
        what,
    })
}

fn replace(any: Any) -> Change {
    Change {
        change: Some(Step::Replace(view::object(any))),
    }
}

fn unchanged(secret: &Secret) -> Precondition {
    let read = VersionIs {
        object: Some(ObjectRef {
            kind: Kind::Secret.into(),
            id: secret.id.clone(),
        }),
        version: secret.meta.as_ref().map_or(0, |meta| meta.version),
    };
    Precondition {
        precondition: Some(Condition::VersionIs(read)),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::seam::SystemEntropy;
    use bulkhead_identity::{Authority, Unswapped};
    use bulkhead_proto::wire::{Node, Role, Transaction};
    use bulkhead_proto::{ClusterId, NodeId};

    use super::*;
    use crate::key_ring::{EnvelopeKey, begin};
    use crate::lock;

    const NOW: i64 = 1_700_000_000_000;

    fn ring(n: u8) -> KeyRing {
        let key = EnvelopeKey::from_bytes(Unswapped::new([n; 32]));
        KeyRing::new(NodeId::from_bytes([n; 16]), key, Arc::new(SystemEntropy))
    }

    fn manager(n: u8) -> Node {
        Node {
            id: vec![n; 16],
            name: format!("m{n}"),
            role: Role::Manager.into(),
            envelope_key: ring(n).public().to_vec(),
            ..Default::default()
        }
    }

    fn create(any: Any) -> Change {
        Change {
            change: Some(Step::Create(view::object(any))),
        }
    }

    fn commit(state: &mut State, preconditions: Vec<Precondition>, changes: Vec<Change>) {
        let index = state.index() + 1;
        let transaction = Transaction {
            level: 1,
            at: NOW,
            preconditions,
            changes,
            ..Default::default()
        };
        let applied = state
            .apply(index, 1, &transaction.encode_to_vec())
            .expect("a known level");
        assert_eq!(applied.outcome.rejection, None);
    }

    fn cluster(state: &State) -> &Cluster {
        view::cluster(state).expect("a cluster")
    }

    /// Two managers, a root, an unlock key and so many secrets, of which some are large.
    fn state(secrets: u8) -> State {
        let id = [9; 16];
        let authority = Authority::generate(ClusterId::from_bytes(id), NOW).expect("a root");
        let place = Key::new(Kind::Cluster, id);
        let first = (NodeId::from_bytes([1; 16]), &ring(1).public()[..]);
        let sealed = [(place, authority.key_pkcs8())];
        let (epoch, root_key) = begin(&id, first, &sealed, NOW, &SystemEntropy).expect("begun");
        let mut new = Cluster {
            id: id.to_vec(),
            root_certificate: authority.root_der().to_vec(),
            root_key: root_key.into_iter().next(),
            key_ring: vec![epoch],
            ..Default::default()
        };
        let second = NodeId::from_bytes([2; 16]);
        new.key_ring = ring(1)
            .enveloped_for(&new, second, &ring(2).public())
            .expect("enveloped");
        new.autolock = Some(lock::renewed(&new, &ring(1), &SystemEntropy).expect("locked"));
        let mut state = State::default();
        let nodes = [1, 2].map(|n| create(Any::Node(manager(n))));
        let changes = nodes.into_iter().chain([create(Any::Cluster(new))]).collect();
        commit(&mut state, Vec::new(), changes);
        for n in 0..secrets {
            let value = vec![n; if n % 5 == 0 { limits::SECRET_BYTES } else { 100 }];
            let place = Key::new(Kind::Secret, [n + 100; 16]);
            let secret = Secret {
                id: vec![n + 100; 16],
                name: format!("secret-{n}"),
                value: Some(ring(1).seal(cluster(&state), place, &value).expect("sealed")),
                ..Default::default()
            };
            commit(&mut state, Vec::new(), vec![create(Any::Secret(secret))]);
        }
        state
    }

    /// Commits what is due until nothing is, each step by another leader; what was done, in order.
    fn settle(state: &mut State, now: i64) -> Vec<&'static str> {
        let mut done = Vec::new();
        for step in 0..60 {
            let leader = ring(1 + step % 2);
            let Some(next) = next(&leader, state, now).expect("it opens") else {
                return done;
            };
            if done.last() != Some(&next.what) {
                done.push(next.what);
            }
            commit(state, next.preconditions, next.changes);
        }
        panic!("it never ends: {done:?}")
    }

    fn assert_opens(state: &State, epoch: u32) {
        let cluster = cluster(state);
        let epochs: Vec<u32> = cluster.key_ring.iter().map(|it| it.epoch).collect();
        assert_eq!((epochs, renewal::left(state)), (vec![epoch], 0));
        let reader = ring(2);
        for secret in view::secrets(state) {
            let place = Key::new(Kind::Secret, secret.id.as_slice().try_into().expect("an id"));
            let sealed = secret.value.as_ref().expect("a value");
            let value = reader
                .open(cluster, place, sealed)
                .expect("the new epoch opens it");
            assert!(
                value.iter().all(|byte| *byte == secret.id[0] - 100),
                "{}",
                secret.name
            );
        }
        let root = cluster.root_key.as_ref().expect("a root's key");
        let place = renewal::cluster_place(cluster).expect("an id");
        let pkcs8 = reader.open(cluster, place, root).expect("the new epoch opens it");
        Authority::from_parts(&cluster.root_certificate, &pkcs8).expect("the root's own key");
        assert!(lock::key(cluster, &reader, 1).expect("opens").is_some());
    }

    #[test]
    fn at_its_age_the_ring_is_renewed_and_nothing_is_lost() {
        let mut state = state(12);
        let age = i64::try_from(limits::KEY_ROTATION.as_millis()).expect("small");
        assert_eq!(settle(&mut state, NOW + age - 1), Vec::<&str>::new());
        assert_eq!(
            settle(&mut state, NOW + age),
            [
                "a new epoch begins",
                "what is sealed moves to the newest epoch",
                "the epochs of before are forgotten"
            ]
        );
        assert_opens(&state, 2);
        assert_eq!(cluster(&state).reseal, 1, "managers are to forget it, too");
        assert!(!cluster(&state).root_exposed && cluster(&state).rotation.is_none());
    }

    #[test]
    fn who_is_a_manager_no_more_opens_nothing_that_is_sealed_later() {
        let away = |state: &mut State, change: Step| {
            commit(state, Vec::new(), vec![Change { change: Some(change) }])
        };
        let mut third = manager(3);
        for quarantined in [false, true] {
            let mut state = state(3);
            let ring_of_three = ring(1)
                .enveloped_for(cluster(&state), NodeId::from_bytes([3; 16]), &ring(3).public())
                .expect("enveloped");
            let with_third = Cluster {
                key_ring: ring_of_three,
                ..cluster(&state).clone()
            };
            commit(
                &mut state,
                Vec::new(),
                vec![replace(Any::Cluster(with_third)), create(Any::Node(manager(3)))],
            );
            assert_eq!(settle(&mut state, NOW), Vec::<&str>::new());
            third.quarantined_at = NOW;
            third.envelope_key.clear();
            let key = Key::new(Kind::Node, [3; 16]);
            match quarantined {
                true => away(&mut state, Step::Replace(view::object(Any::Node(third.clone())))),
                false => away(&mut state, Step::Delete(key.to_wire())),
            }
            let done = settle(&mut state, NOW);
            assert_eq!(done.len(), 3, "{done:?}");
            let later = i64::try_from(renewal::DEPARTURE.as_millis()).expect("small");
            assert_eq!(settle(&mut state, NOW + later - 1), Vec::<&str>::new());
            assert_eq!(settle(&mut state, NOW + later).len(), 1, "then the root rolls");
            assert!(cluster(&state).rotation.is_some() && !cluster(&state).root_exposed);
            assert_opens(&state, 2);
            let secret = view::secrets(&state).next().expect("a secret");
            let place = Key::new(Kind::Secret, secret.id.as_slice().try_into().expect("an id"));
            let opened = ring(3).open(cluster(&state), place, secret.value.as_ref().expect("a value"));
            assert_eq!(opened, Err(KeyRingError::NoEnvelope(2)));
        }
    }
}
