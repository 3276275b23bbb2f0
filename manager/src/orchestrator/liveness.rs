//! Which workers are down: the leader's state, fed with the ages that every manager reports of its streams.
//!
//! A manager reports *how long ago* it heard from a worker, so that no two clocks are compared. What the leader does
//! not know it assumes in the worker's favour: a new leader, or one that lost a reporter, waits
//! [`limits::LIVENESS_EXTENSION`] longer, since the worker may be moving to another manager just now. And if
//! many workers fall silent at once the fault is more likely ours: then nobody is declared down.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bulkhead_proto::ids::NodeId;
use bulkhead_proto::limits;

/// Workers that expire within this time count as failing together. Half of their time: every worker expires within
/// all of it unless it speaks again, so a longer window would count the healthy ones, too.
const FREEZE_WINDOW: Duration = Duration::from_millis(1_250);
/// So many may always expire together: in a small cluster a rack is a large share.
const FREEZE_ABOVE: usize = 3;
/// Above both bounds evictions freeze: this share of the live nodes, in percent.
const FREEZE_ABOVE_PERCENT: usize = 20;

/// What the leader knows of its workers' signs of life. Times are readings of its own monotonic clock.
#[derive(Debug)]
pub struct Liveness {
    deadlines: BTreeMap<NodeId, Duration>,
    /// Workers that this leader has not heard of yet.
    awaited: BTreeSet<NodeId>,
    /// Until then others may still report on workers to the leader before.
    known_by: Duration,
}

/// What the leader should write.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// These workers are down. Usually none.
    Down(BTreeSet<NodeId>),
    /// Too many would expire together; nobody is declared down, and an event should say so.
    Frozen {
        /// Live workers that are or soon would be silent for too long.
        expiring: usize,
        /// Live workers.
        live: usize,
        /// Those that would be down by now.
        silent: BTreeSet<NodeId>,
    },
}

impl Liveness {
    /// The state of a leader that was just elected. `live` are the workers that the record does not call down. Where the
    /// cluster served nobody before, they lost their sessions with every manager and need time to find one again.
    pub fn of_new_leader(live: impl IntoIterator<Item = NodeId>, now: Duration, served: bool) -> Self {
        let known_by = now + limits::WORKER_LIVENESS + limits::LIVENESS_EXTENSION;
        let deadline = match served {
            true => known_by,
            false => now + limits::WORKER_RETURN,
        };
        let deadlines: BTreeMap<NodeId, Duration> = live.into_iter().map(|node| (node, deadline)).collect();
        Self {
            awaited: deadlines.keys().copied().collect(),
            deadlines,
            known_by,
        }
    }

    /// A manager heard from the worker `age` before `now`. A worker that was down lives again by this.
    ///
    /// An older sign never takes time away that a newer one or an extension gave.
    pub fn heard(&mut self, node: NodeId, age: Duration, now: Duration) {
        // An age beyond our clock's own zero says nothing that "now, at the earliest" would not.
        let deadline = (now + limits::WORKER_LIVENESS).saturating_sub(age);
        if deadline <= now {
            return;
        }
        if self.awaited.remove(&node) {
            // It is back: what it was given to find a manager is over.
            self.deadlines.insert(node, deadline.max(self.known_by));
            return;
        }
        let known = self.deadlines.entry(node).or_insert(deadline);
        *known = (*known).max(deadline);
    }

    /// The worker said that its agent restarts and will be silent for so long at most; the caller bounds it.
    pub fn grace_announced(&mut self, node: NodeId, grace: Duration, now: Duration) {
        let deadline = now + limits::WORKER_LIVENESS + grace;
        if let Some(known) = self.deadlines.get_mut(&node) {
            *known = (*known).max(deadline);
        }
    }

    /// A manager that reported on these workers is gone; they need time to find another one.
    ///
    /// The extension counts from now and does not add up, so a flapping manager cannot keep a dead worker alive
    /// for longer than it flaps.
    pub fn reporter_lost(&mut self, nodes: impl IntoIterator<Item = NodeId>, now: Duration) {
        for node in nodes {
            if let Some(known) = self.deadlines.get_mut(&node) {
                *known = (*known).max(now + limits::LIVENESS_EXTENSION);
            }
        }
    }

    /// Forgets whoever does not pass: nodes that were removed, or that are called down and are still silent.
    pub fn retain(&mut self, mut expected: impl FnMut(NodeId) -> bool) {
        self.deadlines.retain(|node, _| expected(*node));
        self.awaited.retain(|node| self.deadlines.contains_key(node));
    }

    /// Who is down at `now`. Changes nothing: a verdict whose commit failed is simply reached again; after the
    /// commit the caller does not [`retain`](Self::retain) the node.
    pub fn verdict(&self, now: Duration) -> Verdict {
        let live = self.deadlines.len();
        let silent_by = |at: Duration| {
            self.deadlines
                .iter()
                .filter(move |(_, deadline)| **deadline <= at)
        };
        let down: BTreeSet<_> = silent_by(now).map(|(node, _)| *node).collect();
        let expiring = silent_by(now + FREEZE_WINDOW).count();
        if !down.is_empty() && expiring > FREEZE_ABOVE.max(live * FREEZE_ABOVE_PERCENT / 100) {
            return Verdict::Frozen {
                expiring,
                live,
                silent: down,
            };
        }
        Verdict::Down(down)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_secs(100);

    fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 16])
    }

    fn millis(after_start: u64) -> Duration {
        START + Duration::from_millis(after_start)
    }

    /// `count` workers that were all heard at the start, by a leader elected long before.
    fn heard(count: u8) -> Liveness {
        let mut liveness = Liveness::of_new_leader([], Duration::ZERO, true);
        (0..count).for_each(|number| liveness.heard(id(number), Duration::ZERO, START));
        liveness
    }

    #[track_caller]
    fn check(liveness: &Liveness, after_ms: u64, down: &[u8]) {
        let expected = Verdict::Down(down.iter().map(|&number| id(number)).collect());
        assert_eq!(
            liveness.verdict(millis(after_ms)),
            expected,
            "{after_ms} ms after the start"
        );
    }

    #[track_caller]
    fn check_frozen(liveness: &Liveness, expiring: usize, live: usize, silent: &[u8]) {
        let expected = Verdict::Frozen {
            expiring,
            live,
            silent: silent.iter().map(|&number| id(number)).collect(),
        };
        assert_eq!(liveness.verdict(millis(2_500)), expected);
    }

    #[test]
    fn a_silent_worker_is_down_after_its_time() {
        check(&heard(1), 2_499, &[]);
        check(&heard(1), 2_500, &[0]);
    }

    #[test]
    fn an_age_counts_from_when_the_sign_was_heard_and_an_older_one_takes_nothing_away() {
        let mut liveness = heard(1);
        liveness.heard(id(0), Duration::from_millis(400), millis(1_000));
        liveness.heard(id(0), Duration::from_millis(2_000), millis(1_000));
        check(&liveness, 3_099, &[]);
        check(&liveness, 3_100, &[0]);
    }

    #[test]
    fn a_stale_report_does_not_bring_a_worker_back() {
        let mut liveness = heard(1);
        liveness.retain(|node| node != id(0));
        liveness.heard(id(0), Duration::from_secs(3), millis(4_000));
        check(&liveness, 4_000, &[]);
        liveness.heard(id(0), Duration::ZERO, millis(4_000));
        check(&liveness, 6_500, &[0]);
    }

    #[test]
    fn a_new_leader_waits_longer() {
        let liveness = Liveness::of_new_leader([id(0)], START, true);
        check(&liveness, 4_499, &[]);
        check(&liveness, 4_500, &[0]);
    }

    /// A worker that could not reach any manager for minutes tries each in turn, seconds apart.
    #[test]
    fn where_nobody_was_served_workers_have_time_to_find_a_manager_and_then_none_to_be_silent() {
        let mut liveness = Liveness::of_new_leader([id(0), id(1)], START, false);
        check(&liveness, 29_999, &[]);
        liveness.heard(id(0), Duration::ZERO, millis(3_000));
        check(&liveness, 5_499, &[]);
        check(&liveness, 5_500, &[0]);
        check(&liveness, 30_000, &[0, 1]);
    }

    #[test]
    fn a_lost_reporter_gives_time_once() {
        let mut liveness = heard(2);
        liveness.reporter_lost([id(0)], millis(2_000));
        liveness.reporter_lost([id(0)], millis(2_000));
        check(&liveness, 3_999, &[1]);
        check(&liveness, 4_000, &[0, 1]);
    }

    #[test]
    fn an_announced_restart_is_waited_for() {
        let mut liveness = heard(1);
        liveness.grace_announced(id(0), Duration::from_secs(10), START);
        check(&liveness, 12_499, &[]);
        check(&liveness, 12_500, &[0]);
    }

    #[test]
    fn many_silent_workers_at_once_freeze_evictions() {
        check(&heard(3), 2_500, &[0, 1, 2]);
        check_frozen(&heard(4), 4, 4, &[0, 1, 2, 3]);
    }

    #[test]
    fn the_freeze_counts_a_share_of_a_large_cluster_and_those_about_to_expire() {
        let with_silent = |silent: u8| {
            let mut liveness = heard(30);
            (silent..30).for_each(|number| liveness.heard(id(number), Duration::ZERO, millis(2_500)));
            liveness
        };
        check(&with_silent(6), 2_500, &[0, 1, 2, 3, 4, 5]);
        check_frozen(&with_silent(7), 7, 30, &[0, 1, 2, 3, 4, 5, 6]);
        let mut staggered = heard(1);
        (1..4).for_each(|number| staggered.heard(id(number), Duration::ZERO, millis(900)));
        check_frozen(&staggered, 4, 4, &[0]);
    }
}
