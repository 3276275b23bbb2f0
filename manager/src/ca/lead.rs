//! The leader's part in a rotation of the root and in autolock: what their plans decide is committed, by whoever leads.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_raft::Replica;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Ca;
use super::rotation::{self, Signer};
use crate::lock;
use crate::proposer::Proposer;

/// Finds what only time changes: a deadline.
const LOOK: Duration = Duration::from_millis(500);

/// Carries them on while this manager leads; ends when stopped.
pub async fn lead(
    replica: Replica,
    proposer: Proposer,
    ca: Ca,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let mut applied = replica.applied();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Cancel-safe: both only say that it is time to look.
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            changed = applied.changed() => if changed.is_err() { return },
            _ = ticks.tick() => {}
        }
        let Some(term) = replica.leadership().borrow().leading else {
            continue;
        };
        let now = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
        let state = replica.state();
        let signer = Signer::of(&state, ca.signers());
        let planned = rotation::plan(&state, signer, now).or_else(|| lock::plan(&state));
        let Some((unchanged, change, what)) = planned else {
            continue;
        };
        match proposer.controller(term, vec![unchanged], vec![change]).await {
            Ok(outcome) if outcome.rejection.is_none() => {
                tracing::info!(target: "audit", index = outcome.index, "{what}");
                replica.wait_applied(outcome.index).await;
            }
            // Overtaken, or not this manager's to lead any more: it is planned again.
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "a step was not proposed"),
        }
    }
}
