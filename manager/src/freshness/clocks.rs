//! What a manager knows of the other nodes' clocks, from what they say of them: one whose own clock is far off the median of
//! all managers must not decide when tickets and certificates end.
//!
//! The leader hears every manager with its questions, each manager its own workers on their streams. What was measured
//! is kept in the node's record, for people: no decision reads it there.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_proto::{NodeId, limits};

/// A clock that was not heard of for so long does not count. Questions come each 150 ms.
const HEARD: Duration = Duration::from_secs(2);
/// A leader with a wrong clock hands over at most this often: where all others are gone or wrong too, leading must not
/// circle. And no manager says more often than this that its clock is wrong.
const PAUSE: Duration = Duration::from_secs(30);
/// Readings of one clock that are compared: what a message waits on its way makes a clock look behind, never ahead, so
/// the one furthest ahead is the truest.
const READINGS: usize = 4;

/// The clocks that were heard of lately. Times are readings of this manager's monotonic clock.
#[derive(Debug, Default)]
pub struct Clocks(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    managers: BTreeMap<NodeId, Heard>,
    workers: BTreeMap<NodeId, Heard>,
    handed_over: Option<Duration>,
    complained: Option<Duration>,
}

/// What is known of one clock.
#[derive(Debug, Default)]
struct Heard {
    ahead_ms: VecDeque<i64>,
    at: Duration,
}

impl Heard {
    fn add(&mut self, ahead_ms: i64, now: Duration) {
        if self.ahead_ms.len() == READINGS {
            self.ahead_ms.pop_front();
        }
        self.ahead_ms.push_back(ahead_ms);
        self.at = now;
    }

    fn newest(&self) -> i64 {
        self.ahead_ms.back().copied().unwrap_or_default()
    }

    fn best(&self) -> i64 {
        self.ahead_ms.iter().copied().max().unwrap_or_default()
    }
}

/// What the leader makes of a manager's question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// How far the asker's clock is ahead of the median; 0 where nobody can say.
    pub asker_ahead_ms: i64,
    /// This manager's own clock is too far off the median, which is so far ahead, and that was not said lately: it should
    /// not lead.
    pub hand_over: Option<i64>,
}

/// Whether a clock that is so far ahead of the median is too far off it to decide by.
pub fn is_off(ahead_ms: i64) -> bool {
    u128::from(ahead_ms.unsigned_abs()) > limits::CLOCK_SKEW.as_millis()
}

impl Clocks {
    /// A manager asked, and its clock was so far ahead of this one.
    pub fn manager(&self, node: NodeId, ahead_ms: i64, now: Duration) -> Judgement {
        let mut inner = self.lock();
        inner.managers.entry(node).or_default().add(ahead_ms, now);
        let median = inner.median(now);
        let lately = inner.handed_over.is_some_and(|at| now.saturating_sub(at) < PAUSE);
        let hand_over = (is_off(median) && !lately).then_some(median);
        if hand_over.is_some() {
            inner.handed_over = Some(now);
        }
        Judgement {
            asker_ahead_ms: match inner.can_tell() {
                true => ahead_ms.saturating_sub(median),
                false => 0,
            },
            hand_over,
        }
    }

    /// A worker whose stream ends here said what its clock says: so far ahead of this one.
    pub fn worker(&self, node: NodeId, ahead_ms: i64, now: Duration) {
        self.lock().workers.entry(node).or_default().add(ahead_ms, now);
    }

    /// How far this manager's own clock is ahead of the median, as it knows while it leads; 0 where it cannot say.
    pub fn own_ahead_ms(&self, now: Duration) -> i64 {
        self.lock().median(now).saturating_neg()
    }

    /// How far a clock is ahead of the median that is so far ahead of this one; 0 where nobody can say.
    pub fn ahead_of_median_ms(&self, ahead_ms: i64, now: Duration) -> i64 {
        let mut inner = self.lock();
        let median = inner.median(now);
        match inner.can_tell() {
            true => ahead_ms.saturating_sub(median),
            false => 0,
        }
    }

    /// Whether a wrong clock is to be complained of now: not each time that it is noticed.
    pub fn complains(&self, now: Duration) -> bool {
        let mut inner = self.lock();
        let lately = inner.complained.is_some_and(|at| now.saturating_sub(at) < PAUSE);
        if !lately {
            inner.complained = Some(now);
        }
        !lately
    }

    /// How far each clock is ahead that was heard of lately: a manager's of the median of all, or of this one where there
    /// is none; a worker's of this one.
    pub fn readings(&self, own: NodeId, now: Duration) -> BTreeMap<NodeId, i64> {
        let mut inner = self.lock();
        let median = inner.median(now);
        let managers: BTreeMap<NodeId, i64> = inner
            .managers
            .iter()
            .map(|(node, heard)| (*node, heard.best().saturating_sub(median)))
            .collect();
        let own = (!managers.is_empty()).then_some((own, median.saturating_neg()));
        inner
            .workers
            .retain(|_, heard| now.saturating_sub(heard.at) < HEARD);
        let workers = inner.workers.iter().map(|(node, heard)| (*node, heard.best()));
        workers.chain(managers).chain(own).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The median of the others' clocks and this one; 0 where nobody can say.
    fn median(&mut self, now: Duration) -> i64 {
        self.managers
            .retain(|_, heard| now.saturating_sub(heard.at) < HEARD);
        let mut ahead: Vec<i64> = self.managers.values().map(Heard::newest).chain([0]).collect();
        ahead.sort_unstable();
        match self.can_tell() {
            false => 0,
            true => ahead[ahead.len() / 2],
        }
    }

    /// Of two clocks nobody can say which is wrong.
    fn can_tell(&self) -> bool {
        self.managers.len() >= 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: usize) -> NodeId {
        NodeId::from_bytes([u8::try_from(n).expect("few"); 16])
    }

    #[test]
    fn a_wrong_clock_is_found_on_its_own_manager_only_and_said_once() {
        let now = Duration::from_secs(100);
        let check = |heard: &[i64], expected: Option<i64>| {
            let clocks = Clocks::default();
            let ask = |now| {
                (0..)
                    .zip(heard)
                    .filter_map(|(n, ahead)| clocks.manager(node(n), *ahead, now).hand_over)
                    .last()
            };
            assert_eq!(ask(now), expected, "{heard:?}");
            assert_eq!(ask(now + HEARD), None, "{heard:?} again");
            assert_eq!(ask(now + PAUSE), expected, "{heard:?} later");
        };
        check(&[60_000], None);
        check(&[60_000, 60_010], Some(60_000));
        check(&[-60_000, -60_010], Some(-60_000));
        check(&[60_000, 10], None);
        check(&[i64::MIN, i64::MAX], None);
        check(&[29_000, 29_000], None);
        check(&[60_000, 10, 20, 60_000], None);
    }

    #[test]
    fn a_clock_that_was_not_heard_of_lately_does_not_count() {
        let clocks = Clocks::default();
        let ask = |n, at| clocks.manager(node(n), 60_000, Duration::from_secs(at)).hand_over;
        assert_eq!((ask(1, 10), ask(2, 13)), (None, None));
    }

    /// However a minority of the clocks is set, those that are right are judged right, and those that are not are not.
    #[test]
    fn a_step_of_a_minority_of_clocks_misjudges_nobody() {
        const STEPS: [i64; 7] = [i64::MIN, -86_400_000, -60_000, 0, 60_000, 86_400_000, i64::MAX];
        let now = Duration::from_secs(100);
        for managers in [3_usize, 5, 7] {
            for wrong in 1..=(managers - 1) / 2 {
                for step in STEPS {
                    for leader_is_wrong in [false, true] {
                        judge_all(managers, wrong, step, leader_is_wrong, now);
                    }
                }
            }
        }
    }

    /// Clocks 0 up to `wrong` are set `step` ahead, the rest agree; the leader is the first or the last.
    fn judge_all(managers: usize, wrong: usize, step: i64, leader_is_wrong: bool, now: Duration) {
        let leader = if leader_is_wrong { 0 } else { managers - 1 };
        let ahead = |n: usize| if n < wrong { step } else { 0 };
        let clocks = Clocks::default();
        let mut judged = BTreeMap::new();
        for _ in 0..2 {
            for n in (0..managers).filter(|n| *n != leader) {
                let of_leader = ahead(n).saturating_sub(ahead(leader));
                judged.insert(n, clocks.manager(node(n), of_leader, now).asker_ahead_ms);
            }
        }
        for (n, ahead_ms) in &judged {
            let proposed = ahead(*n).saturating_sub(ahead(leader));
            assert_eq!(
                clocks.ahead_of_median_ms(proposed, now),
                *ahead_ms,
                "a proposal of {n}"
            );
        }
        judged.insert(leader, clocks.own_ahead_ms(now));
        for (n, ahead_ms) in judged {
            let is_wrong = n < wrong && is_off(step);
            assert_eq!(
                is_off(ahead_ms),
                is_wrong,
                "{managers} managers, {wrong} at {step}, clock {n}: {ahead_ms}"
            );
        }
    }

    #[test]
    fn readings_are_of_the_median_and_a_late_message_moves_none() {
        let clocks = Clocks::default();
        let now = Duration::from_secs(100);
        clocks.manager(node(1), 5_000, now);
        assert_eq!(
            clocks.readings(node(9), now),
            [(node(1), 5_000), (node(9), 0)].into()
        );
        clocks.manager(node(2), 5_000, now);
        for ahead in [-40, -3_000, -20] {
            clocks.worker(node(7), ahead, now);
        }
        assert_eq!(
            clocks.readings(node(9), now),
            [(node(1), 0), (node(2), 0), (node(7), -20), (node(9), -5_000)].into()
        );
        assert_eq!(clocks.readings(node(9), now + HEARD), BTreeMap::new());
    }

    #[test]
    fn a_wrong_clock_is_complained_of_now_and_then() {
        let clocks = Clocks::default();
        let now = Duration::from_secs(100);
        assert!(clocks.complains(now) && !clocks.complains(now + HEARD) && clocks.complains(now + PAUSE));
    }
}
