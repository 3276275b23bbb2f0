//! Keeps what was measured of the nodes' clocks in their records, for `node ls` and `node inspect`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_proto::wire::{Change, Node, Precondition, change::Change as Step, object::Object as Any};
use bulkhead_proto::{NodeId, RequestId, limits};
use bulkhead_raft::Replica;
use bulkhead_raft::state::State;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Fresh;
use crate::ca::renewal::unchanged;
use crate::proposer::Proposer;
use crate::view;

/// Readings are looked at this often. A clock that moves is an entry of the log each time.
const LOOK: Duration = Duration::from_secs(5);
/// Records that are written together.
const TOGETHER: usize = 64;

/// Runs until it is stopped.
pub async fn keep(
    own: NodeId,
    replica: Replica,
    proposer: Proposer,
    fresh: Fresh,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    stop: CancellationToken,
) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let readings = fresh.clocks().readings(own, clock.monotonic());
        let now = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
        let (preconditions, changes) = plan(&replica.state(), &readings, now);
        let mut request = [0; 16];
        if changes.is_empty() || !fresh.is_fresh() || entropy.fill(&mut request).is_err() {
            continue;
        }
        let actor = format!("manager/{own}");
        // Overtaken or unknown: the next look plans again from what stands then.
        let _again = proposer
            .client(&actor, RequestId::from_bytes(request), preconditions, changes)
            .await;
    }
}

/// The records of which another clock was measured than they say.
fn plan(state: &State, readings: &BTreeMap<NodeId, i64>, now_ms: i64) -> (Vec<Precondition>, Vec<Change>) {
    let moved = readings.iter().filter_map(|(node, ahead_ms)| {
        let record = view::node(state, *node)?;
        let apart = Duration::from_millis(record.clock_ahead_ms.abs_diff(*ahead_ms));
        (record.clock_measured_at == 0 || apart >= limits::CLOCK_MOVED).then_some((record, *ahead_ms))
    });
    moved
        .take(TOGETHER)
        .map(|(record, ahead_ms)| {
            let new = Node {
                clock_ahead_ms: ahead_ms,
                clock_measured_at: now_ms,
                ..record.clone()
            };
            let replace = Change {
                change: Some(Step::Replace(view::object(Any::Node(new)))),
            };
            (unchanged(record), replace)
        })
        .unzip()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::wire::Transaction;
    use prost::Message as _;

    #[test]
    fn a_record_is_written_when_its_clock_was_never_measured_or_moved() {
        let node = |n: u8| NodeId::from_bytes([n; 16]);
        let record = |n: u8, ahead: i64, measured: i64| Node {
            id: node(n).to_wire(),
            name: format!("node-{n}"),
            clock_ahead_ms: ahead,
            clock_measured_at: measured,
            ..Default::default()
        };
        let mut state = State::default();
        let transaction = Transaction {
            level: 1,
            changes: [record(1, 0, 0), record(2, 500, 7), record(3, 500, 7)]
                .map(|it| Change {
                    change: Some(Step::Create(view::object(Any::Node(it)))),
                })
                .into(),
            ..Default::default()
        };
        state
            .apply(1, 1, &transaction.encode_to_vec())
            .expect("a known level");
        let readings = [
            (node(1), 20),
            (node(2), 1_499),
            (node(3), -500),
            (node(9), 60_000),
        ]
        .into();
        let (preconditions, changes) = plan(&state, &readings, 9);
        let written: Vec<_> = changes
            .iter()
            .filter_map(|it| match it.change.as_ref()? {
                Step::Replace(object) => match object.object.as_ref()? {
                    Any::Node(node) => {
                        Some((node.name.as_str(), node.clock_ahead_ms, node.clock_measured_at))
                    }
                    _ => None,
                },
                _ => None,
            })
            .collect();
        assert_eq!(written, [("node-1", 20, 9), ("node-3", -500, 9)]);
        assert_eq!(preconditions.len(), 2);
    }
}
