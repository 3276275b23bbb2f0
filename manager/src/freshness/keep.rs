//! Keeps what was measured of the nodes' clocks in their records, for `node ls` and `node inspect`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_proto::wire::{
    Change, Node, Outcome, Precondition, change::Change as Step, object::Object as Any,
};
use bulkhead_proto::{NodeId, RequestId, limits};
use bulkhead_raft::Replica;
use bulkhead_raft::state::{Key, State};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::Fresh;
use crate::ca::renewal::unchanged;
use crate::proposer::Proposer;
use crate::view;

/// Readings are looked at this often. A clock that moves is an entry of the log each time.
const LOOK: Duration = Duration::from_secs(5);
/// A record is written at most this often: a node whose clock jumps about, or that lies, writes no more entries.
const EACH: Duration = Duration::from_secs(60);
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
    let mut overtaken = BTreeSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let readings = fresh.clocks().readings(own, clock.monotonic());
        let now = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
        let (preconditions, changes) = plan(&replica.state(), &readings, &overtaken, now);
        let mut request = [0; 16];
        if changes.is_empty() {
            overtaken.clear();
            continue;
        }
        if !fresh.is_fresh() || entropy.fill(&mut request).is_err() {
            continue;
        }
        let actor = format!("manager/{own}");
        // Unknown: the next look plans again from what stands then.
        if let Ok(outcome) = proposer
            .client(&actor, RequestId::from_bytes(request), preconditions, changes)
            .await
        {
            learn(&mut overtaken, &outcome);
        }
    }
}

/// One record that changes all the time must not hold back the others that are written with it: it is left out until they
/// were written.
fn learn(overtaken: &mut BTreeSet<NodeId>, outcome: &Outcome) {
    let rejection = outcome.rejection.as_ref();
    match rejection.map(|it| it.object.as_ref().and_then(Key::from_wire)) {
        None => overtaken.clear(),
        Some(object) => overtaken.extend(object.map(|it| NodeId::from_bytes(*it.id()))),
    }
}

/// The records of which another clock was measured than they say.
fn plan(
    state: &State,
    readings: &BTreeMap<NodeId, i64>,
    overtaken: &BTreeSet<NodeId>,
    now_ms: i64,
) -> (Vec<Precondition>, Vec<Change>) {
    let each = i64::try_from(EACH.as_millis()).unwrap_or(i64::MAX);
    let readings = readings.iter().filter(|(node, _)| !overtaken.contains(node));
    let moved = readings.filter_map(|(node, ahead_ms)| {
        let record = view::node(state, *node)?;
        let apart = Duration::from_millis(record.clock_ahead_ms.abs_diff(*ahead_ms));
        let lately = (0..each).contains(&now_ms.saturating_sub(record.clock_measured_at));
        let due = apart >= limits::CLOCK_MOVED && !lately;
        (record.clock_measured_at == 0 || due).then_some((record, *ahead_ms))
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

    const LATER: i64 = 100_000;

    fn node(n: u8) -> NodeId {
        NodeId::from_bytes([n; 16])
    }

    fn record(n: u8, ahead: i64, measured: i64) -> Node {
        Node {
            id: node(n).to_wire(),
            name: format!("node-{n}"),
            clock_ahead_ms: ahead,
            clock_measured_at: measured,
            ..Default::default()
        }
    }

    fn apply(state: &mut State, preconditions: Vec<Precondition>, changes: Vec<Change>) -> Outcome {
        let transaction = Transaction {
            level: 1,
            preconditions,
            changes,
            ..Default::default()
        };
        let applied = state.apply(state.index() + 1, 1, &transaction.encode_to_vec());
        applied.expect("a known level").outcome
    }

    fn given(records: impl IntoIterator<Item = Node>) -> State {
        let mut state = State::default();
        let create = |it| Change {
            change: Some(Step::Create(view::object(Any::Node(it)))),
        };
        let changes = records.into_iter().map(create).collect();
        assert_eq!(apply(&mut state, Vec::new(), changes).rejection, None);
        state
    }

    fn written(changes: Vec<Change>) -> Vec<(String, i64, i64)> {
        let node = |it: Change| match it.change? {
            Step::Replace(object) => match object.object? {
                Any::Node(node) => Some((node.name, node.clock_ahead_ms, node.clock_measured_at)),
                _ => None,
            },
            _ => None,
        };
        changes.into_iter().filter_map(node).collect()
    }

    #[test]
    fn a_record_is_written_when_its_clock_was_never_measured_or_moved_and_once_a_minute() {
        let check = |record: Node, reading: i64, expected: Option<i64>| {
            let state = given([record]);
            let readings = [(node(1), reading), (node(9), 60_000)].into();
            let (preconditions, changes) = plan(&state, &readings, &BTreeSet::new(), LATER);
            assert_eq!(preconditions.len(), changes.len());
            let expected = expected.map(|ahead| ("node-1".to_owned(), ahead, LATER));
            assert_eq!(written(changes), Vec::from_iter(expected), "{reading}");
        };
        check(record(1, 0, 0), 20, Some(20));
        check(record(1, 500, 7), 1_499, None);
        check(record(1, 500, 7), 1_500, Some(1_500));
        check(record(1, 500, 7), -500, Some(-500));
        check(record(1, 500, LATER - 59_999), -500, None);
        check(record(1, 500, LATER - 60_000), -500, Some(-500));
        // Written by a clock that was ahead.
        check(record(1, 500, LATER + 1), -500, Some(-500));
    }

    #[test]
    fn a_record_that_always_changes_holds_no_other_back() {
        let mut state = given((1..=100).map(|n| record(n, 0, 0)));
        let readings: BTreeMap<NodeId, i64> = (1..=100).map(|n| (node(n), 2_000)).collect();
        let mut overtaken = BTreeSet::new();
        let busy = |n: u8| n == 1 || n == 2;
        for _ in 0..6 {
            let (preconditions, changes) = plan(&state, &readings, &overtaken, LATER);
            for n in (1..=100).filter(|n| busy(*n)) {
                let changed = view::node(&state, node(n)).expect("there").clone();
                let change = Change {
                    change: Some(Step::Replace(view::object(Any::Node(changed)))),
                };
                assert_eq!(apply(&mut state, Vec::new(), vec![change]).rejection, None);
            }
            let outcome = apply(&mut state, preconditions, changes);
            learn(&mut overtaken, &outcome);
        }
        let measured = |n: &u8| view::node(&state, node(*n)).expect("there").clock_measured_at != 0;
        let kept: Vec<u8> = (1..=100).filter(measured).collect();
        assert_eq!(kept, (3..=100).collect::<Vec<_>>());
    }
}
