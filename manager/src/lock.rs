//! Autolock: which unlock keys the cluster keeps, and for whom, as pure decisions.
//!
//! With it on, each manager seals its key file with the newest unlock key, which is nowhere on its disk: a program that
//! starts again waits for it. The keys themselves are in the replicated state, sealed under the key ring, so that every
//! manager that runs can take up the next one by itself, and an operator can be shown one. No manager uses a key before an
//! operator says to have seen it: a crash in between would lock the cluster's managers for ever. A manager that was down
//! while the key changed still opens with the one before, so that one is kept until it said that it uses a newer one.

use bulkhead_identity::UnlockKey;
use bulkhead_identity::seam::Entropy;
use bulkhead_proto::wire::{
    Autolock, Change, Cluster, Precondition, Sealed, SealedUnlockKey, change::Change as Step,
    object::Object as Any,
};
use bulkhead_raft::state::State;

use crate::key_ring::{KeyRing, KeyRingError, cluster_place};
use crate::view;

/// Unlock keys that are kept at once. A manager that is still locked with an older one than these must be removed before
/// the key rotates again.
pub const KEYS: usize = 16;

/// Why the lock does not change.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// There is nothing to rotate or show.
    #[error("autolock is off")]
    Off,
    /// Some manager was down for so long that the key it needs would be forgotten.
    #[error("a manager may still be locked with unlock key {0}, the oldest of {KEYS} that are kept")]
    Behind(u32),
    /// The key ring does not seal or open.
    #[error("the key ring is not open here")]
    KeyRing(#[from] KeyRingError),
}

/// The lock with a new key, which is in use once it is confirmed.
///
/// # Errors
/// [`LockError`].
pub fn renewed(cluster: &Cluster, ring: &KeyRing, entropy: &dyn Entropy) -> Result<Autolock, LockError> {
    let lock = cluster.autolock.clone().unwrap_or_default();
    if let (true, Some(oldest)) = (lock.keys.len() >= KEYS, lock.keys.first()) {
        return Err(LockError::Behind(oldest.generation));
    }
    let key = UnlockKey::generate(lock.generation + 1, entropy).map_err(KeyRingError::from)?;
    let sealed = ring.seal(
        cluster,
        cluster_place(cluster).ok_or(KeyRingError::Empty)?,
        key.expose(),
    )?;
    Ok(with(lock, &key, sealed))
}

/// The lock of a cluster that begins with this key, sealed under its first epoch.
pub(crate) fn first(key: &UnlockKey, sealed: Sealed) -> Autolock {
    Autolock {
        confirmed: key.generation(),
        ..with(Autolock::default(), key, sealed)
    }
}

fn with(mut lock: Autolock, key: &UnlockKey, sealed: Sealed) -> Autolock {
    lock.on = true;
    lock.generation = key.generation();
    lock.keys.push(SealedUnlockKey {
        generation: key.generation(),
        key: Some(sealed),
    });
    lock
}

/// The lock with its newest key in use; nothing where that is another, or is already.
pub fn confirmed(cluster: &Cluster, generation: u32) -> Option<Autolock> {
    let lock = cluster.autolock.clone().filter(|lock| lock.on)?;
    (lock.generation == generation && lock.confirmed != generation).then_some(Autolock {
        confirmed: generation,
        ..lock
    })
}

/// A key that waits to be seen by an operator; 0: none.
pub fn pending(cluster: &Cluster) -> u32 {
    match &cluster.autolock {
        Some(lock) if lock.on && lock.confirmed != lock.generation => lock.generation,
        _ => 0,
    }
}

/// The lock as it stands when it is turned off: the keys stay for managers that are down and locked.
pub fn off(cluster: &Cluster) -> Option<Autolock> {
    let mut lock = cluster.autolock.clone().filter(|lock| lock.on)?;
    lock.on = false;
    lock.confirmed = 0;
    Some(lock)
}

/// The key that a manager's file is to be sealed with; nothing where it is to be in the clear.
///
/// # Errors
/// [`KeyRingError`] where this manager cannot open it.
pub fn wanted(cluster: &Cluster, ring: &KeyRing) -> Result<Option<UnlockKey>, KeyRingError> {
    match generation(cluster) {
        0 => Ok(None),
        generation => key(cluster, ring, generation),
    }
}

/// The generation that a manager's file is to be sealed with; 0 for none.
pub fn generation(cluster: &Cluster) -> u32 {
    match &cluster.autolock {
        Some(lock) if lock.on => lock.confirmed,
        _ => 0,
    }
}

/// One of the keys that are kept.
///
/// # Errors
/// [`KeyRingError`] where this manager cannot open it.
pub fn key(cluster: &Cluster, ring: &KeyRing, generation: u32) -> Result<Option<UnlockKey>, KeyRingError> {
    let kept = cluster.autolock.iter().flat_map(|lock| &lock.keys);
    let sealed = kept
        .filter(|it| it.generation == generation)
        .find_map(|it| it.key.as_ref());
    let Some(sealed) = sealed else { return Ok(None) };
    let opened = ring.open(
        cluster,
        cluster_place(cluster).ok_or(KeyRingError::Empty)?,
        sealed,
    )?;
    Ok(UnlockKey::from_bytes(generation, &opened))
}

/// Forgets keys that no manager's file needs any more, if there are such. A manager seals its file first and says so later,
/// so its file may need any key from the one that it named on.
pub fn plan(state: &State) -> Option<(Precondition, Change, &'static str)> {
    let cluster = view::cluster(state)?;
    // The newest key always stays, and this is asked at every commit.
    let lock = cluster.autolock.as_ref().filter(|lock| lock.keys.len() > 1)?;
    let oldest = view::managers(state).map(|node| node.locked_with).min()?;
    let needed = |generation: u32| generation >= oldest;
    if lock.keys.iter().all(|key| needed(key.generation)) {
        return None;
    }
    let mut new = cluster.clone();
    let kept = new.autolock.get_or_insert_default();
    kept.keys.retain(|key| needed(key.generation));
    let change = Change {
        change: Some(Step::Replace(view::object(Any::Cluster(new)))),
    };
    Some((
        view::unchanged_cluster(cluster),
        change,
        "unlock keys that no manager needs are forgotten",
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bulkhead_identity::Unswapped;
    use bulkhead_identity::seam::SystemEntropy;
    use bulkhead_proto::NodeId;
    use bulkhead_proto::wire::{Kind, Node, Role, Transaction};
    use bulkhead_raft::state::Key;
    use prost::Message as _;

    use super::*;
    use crate::key_ring::{self, EnvelopeKey};

    fn ring() -> KeyRing {
        let key = EnvelopeKey::from_bytes(Unswapped::new([1; 32]));
        KeyRing::new(NodeId::from_bytes([1; 16]), key, Arc::new(SystemEntropy))
    }

    fn cluster() -> Cluster {
        let node = (NodeId::from_bytes([1; 16]), &ring().public()[..]);
        let (epoch, _) = key_ring::begin(
            &[9; 16],
            node,
            &[(Key::new(Kind::Cluster, [9; 16]), b"a root")],
            0,
            &SystemEntropy,
        )
        .expect("begun");
        Cluster {
            id: vec![9; 16],
            key_ring: vec![epoch],
            ..Default::default()
        }
    }

    fn renew(cluster: &mut Cluster) -> u32 {
        cluster.autolock = Some(renewed(cluster, &ring(), &SystemEntropy).expect("renewed"));
        let new = pending(cluster);
        assert_ne!(generation(cluster), new, "nobody has seen it");
        assert_eq!(confirmed(cluster, new + 1), None);
        cluster.autolock = confirmed(cluster, new);
        assert_eq!((generation(cluster), pending(cluster)), (new, 0));
        assert_eq!(confirmed(cluster, new), None, "a retry changes nothing");
        new
    }

    fn state(cluster: &Cluster, locked_with: &[u32]) -> State {
        let nodes = locked_with.iter().zip(1u8..).map(|(generation, n)| {
            Any::Node(Node {
                id: vec![n; 16],
                name: format!("m{n}"),
                role: Role::Manager.into(),
                locked_with: *generation,
                ..Default::default()
            })
        });
        let transaction = Transaction {
            level: 1,
            request_id: vec![7; 16],
            changes: nodes
                .chain([Any::Cluster(cluster.clone())])
                .map(|any| Change {
                    change: Some(Step::Create(view::object(any))),
                })
                .collect(),
            ..Default::default()
        };
        let mut state = State::default();
        let applied = state
            .apply(1, 1, &transaction.encode_to_vec())
            .expect("known level");
        assert_eq!(applied.outcome.rejection, None);
        state
    }

    #[test]
    fn each_key_is_another_and_opens_while_it_is_kept() {
        let mut cluster = cluster();
        assert!(wanted(&cluster, &ring()).expect("nothing to open").is_none());
        assert_eq!((renew(&mut cluster), renew(&mut cluster)), (1, 2));
        let first = key(&cluster, &ring(), 1).expect("opens").expect("kept");
        let newest = wanted(&cluster, &ring()).expect("opens").expect("it is on");
        assert_eq!(newest.generation(), 2);
        assert_ne!(first.expose(), newest.expose());
        assert!(key(&cluster, &ring(), 3).expect("nothing to open").is_none());
        cluster.autolock = off(&cluster);
        assert!(wanted(&cluster, &ring()).expect("nothing to open").is_none());
        assert!(
            key(&cluster, &ring(), 2).expect("opens").is_some(),
            "for who is down"
        );
        assert_eq!(off(&cluster), None);
        assert_eq!(renew(&mut cluster), 3, "a generation is never used again");
    }

    #[test]
    fn a_key_is_kept_as_long_as_a_manager_needs_it() {
        let mut cluster = cluster();
        for _ in 0..3 {
            renew(&mut cluster);
        }
        let kept = |cluster: &Cluster, locked_with: &[u32]| {
            let (_, change, _) = plan(&state(cluster, locked_with))?;
            let Some(Step::Replace(object)) = change.change else {
                panic!("it replaces")
            };
            let Some(Any::Cluster(new)) = object.object else {
                panic!("the cluster")
            };
            let keys = new.autolock.expect("a lock").keys;
            Some(keys.iter().map(|key| key.generation).collect::<Vec<_>>())
        };
        assert_eq!(kept(&cluster, &[1, 2, 3]), None);
        assert_eq!(
            kept(&cluster, &[1, 3, 3]),
            None,
            "it may have sealed with 2 before it could say so"
        );
        assert_eq!(kept(&cluster, &[2, 3, 3]), Some(vec![2, 3]));
        assert_eq!(kept(&cluster, &[0, 3, 3]), None, "one that joined just now");
        assert_eq!(kept(&cluster, &[3, 3, 3]), Some(vec![3]));
        let mut seen_by_none = cluster.clone();
        seen_by_none.autolock = Some(renewed(&cluster, &ring(), &SystemEntropy).expect("renewed"));
        assert_eq!(kept(&seen_by_none, &[3, 3, 3]), Some(vec![3, 4]));
        cluster.autolock = off(&cluster);
        assert_eq!(kept(&cluster, &[3, 0, 0]), None, "for who is down");
    }

    #[test]
    fn a_manager_that_is_far_behind_is_not_locked_out() {
        let mut cluster = cluster();
        for _ in 0..KEYS {
            renew(&mut cluster);
        }
        assert_eq!(
            renewed(&cluster, &ring(), &SystemEntropy),
            Err(LockError::Behind(1))
        );
    }
}
