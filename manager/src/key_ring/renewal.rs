//! How the key ring is renewed, as pure decisions: a new epoch, everything that is sealed moves to it, the old ones go.
//!
//! An epoch begins when an operator asks, when the newest is old, and when it has an envelope for somebody who is a
//! manager no more. That one could open whatever was sealed until then, the root's key as well: so a rotation of the root
//! becomes due with it. Who asked for the epoch does not matter for what follows; any leader goes on with it.

use std::time::Duration;

use bulkhead_proto::wire::{Cluster, Kind, Node, Sealed, Secret};
use bulkhead_proto::{ClusterId, NodeId, limits};
use bulkhead_raft::state::{Key, State};

use crate::ca::rotation;
use crate::view;

/// From the epoch that somebody's departure began to the rotation of the root that follows it. Who leaves hears by its old
/// certificate that it is out; it looks several times a second, for some seconds.
pub(super) const DEPARTURE: Duration = Duration::from_secs(5);

/// As [`DEPARTURE`], after a restore or a recovery: workers that were without a manager come back by the root that they
/// know, before another one follows.
pub(super) const RAISED: Duration = limits::WORKER_RETURN.saturating_add(DEPARTURE);

/// What is to be done about the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Begin an epoch.
    Epoch {
        /// Somebody who is a manager no more can open the newest one.
        exposed: bool,
    },
    /// Move what is sealed under older epochs.
    Move,
    /// Forget the older epochs: nothing is sealed under them.
    Forget,
    /// Begin a rotation of the root, whose key somebody could open who is a manager no more.
    Root,
}

/// The next thing to do, if anything is due.
pub(super) fn due(state: &State, now_ms: i64) -> Option<Due> {
    let cluster = view::cluster(state)?;
    let newest = cluster.key_ring.last()?;
    let stranger = |node: &[u8]| !view::managers(state).any(|it| it.id == node && it.quarantined_at == 0);
    if newest.envelopes.iter().any(|it| stranger(&it.node_id)) {
        return Some(Due::Epoch { exposed: true });
    }
    if cluster.key_ring.len() > 1 {
        return Some(match left(state) {
            0 => Due::Forget,
            _ => Due::Move,
        });
    }
    let age = Duration::from_millis(u64::try_from(now_ms.saturating_sub(newest.created_at)).unwrap_or(0));
    // A manager that missed the last rotation would not find back after another: it comes first.
    let wait = if cluster.return_until > now_ms {
        RAISED
    } else {
        DEPARTURE
    };
    let exposed = rotation::is_exposed(cluster) && cluster.rotation.is_none() && age >= wait;
    if exposed && rotation::behind(state).is_none() {
        return Some(Due::Root);
    }
    (age >= lifetime(cluster)).then_some(Due::Epoch { exposed: false })
}

/// The age at which an epoch is replaced.
fn lifetime(cluster: &Cluster) -> Duration {
    match cluster.settings.as_ref().map_or(0, |it| it.key_rotation_ms) {
        0 => limits::KEY_ROTATION,
        set => Duration::from_millis(set),
    }
}

/// The managers that have a key to make envelopes for.
pub fn holders(state: &State) -> Vec<(NodeId, &[u8])> {
    view::managers(state)
        .filter(|node| !node.envelope_key.is_empty())
        .filter_map(|node: &Node| Some((NodeId::try_from(node.id.as_slice()).ok()?, &node.envelope_key[..])))
        .collect()
}

/// Where the cluster object holds sealed values.
pub(super) fn places(cluster: &mut Cluster) -> impl Iterator<Item = &mut Sealed> {
    let rotation = cluster.rotation.as_mut().and_then(|it| it.root_key.as_mut());
    let lock = cluster.autolock.iter_mut().flat_map(|lock| &mut lock.keys);
    cluster
        .root_key
        .iter_mut()
        .chain(rotation)
        .chain(lock.filter_map(|it| it.key.as_mut()))
}

/// What a sealed value of the cluster object belongs to.
pub fn cluster_place(cluster: &Cluster) -> Option<Key> {
    let id = ClusterId::try_from(cluster.id.as_slice()).ok()?;
    Some(Key::new(Kind::Cluster, *id.as_bytes()))
}

/// How many values are sealed under another epoch than the newest.
pub fn left(state: &State) -> usize {
    let Some(cluster) = view::cluster(state) else {
        return 0;
    };
    if cluster.key_ring.len() < 2 {
        return 0; // there is nothing older: no need to look through every secret
    }
    let newest = cluster.key_ring.last().map_or(0, |it| it.epoch);
    let mut cluster = cluster.clone();
    let of_cluster = places(&mut cluster)
        .filter(|sealed| sealed.epoch < newest)
        .count();
    of_cluster + old_secrets(state, newest).count()
}

/// Secrets that are sealed under an epoch before this one.
pub(super) fn old_secrets(state: &State, newest: u32) -> impl Iterator<Item = &Secret> {
    view::secrets(state).filter(move |it| it.value.as_ref().is_some_and(|sealed| sealed.epoch < newest))
}
