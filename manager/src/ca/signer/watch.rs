//! Each manager asks the cluster's external signers now and then for a certificate that nobody gets: so people hear that
//! one fails before nodes need it, and what waits for a signer goes on once it signs again.

use std::time::Duration;

use bulkhead_proto::KeyId;
use bulkhead_proto::wire::{Cluster, ExternalSigner, RotationPhase};
use bulkhead_raft::Replica;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{Need, Signers};
use crate::ca::{Ca, trust};
use crate::view;

/// Finds a signer that is new in the cluster, and those that are due.
const LOOK: Duration = Duration::from_secs(1);

/// Watches them; ends when stopped.
pub async fn watch(replica: Replica, ca: Ca, signers: Signers, stop: CancellationToken) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Cancel-safe: a tick only says that it is time to look.
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let state = replica.state();
        let Some(cluster) = view::cluster(&state) else {
            continue;
        };
        let all = outside(cluster);
        signers.keep(&all.iter().map(|(root, ..)| *root).collect::<Vec<_>>());
        let now = signers.now_ms();
        for (id, root, signer) in all {
            let need = need(cluster, root);
            if signers.health(id).is_some_and(|health| !health.is_due(need, now)) {
                continue;
            }
            // What came of it is in the signers' own memory, and in the log.
            let asked = ca.probe(root, signer);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                _noted = asked => {}
            }
        }
    }
}

/// When the signer of this root will be needed.
fn need(cluster: &Cluster, root: &[u8]) -> Need {
    let rotation = cluster.rotation.as_ref();
    match rotation.is_some_and(|it| it.phase() == RotationPhase::Bundle && it.root == root) {
        true => Need::Soon,
        false => Need::Later,
    }
}

/// The signers of a cluster, with their roots: of the present one, and of the one that a rotation leads to.
pub(crate) fn outside(cluster: &Cluster) -> Vec<(KeyId, &[u8], &ExternalSigner)> {
    let next = cluster.rotation.as_ref().map(trust::next);
    let all = [Some(trust::present(cluster)), next].into_iter().flatten();
    all.filter_map(|by| Some((trust::key_id(by.root).ok()?, by.root, by.outside?)))
        .collect()
}
