//! What a manager knows of the other nodes' clocks, from what they say of them: one whose own clock is far off the median of
//! all managers must not decide when tickets and certificates end.
//!
//! A clock is off only if more than half of all managers say so, each heard lately, and all of them to the same side. A
//! manager that is not heard counts as one that agrees with whichever clock is judged. So a minority convicts nobody,
//! however many of the others are silent, and whoever of them is heard first.
//!
//! The leader hears every manager with its questions, each manager its own workers on their streams. What was measured
//! is kept in the node's record, for people: no decision reads it there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
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
    /// Every manager there is, this one included: more than half of them decide.
    all: BTreeSet<NodeId>,
    managers: BTreeMap<NodeId, Heard>,
    /// Since when there has always been a manager that was heard.
    listening_since: Duration,
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
    /// How far the asker's clock is ahead of the median; none while that cannot be known yet.
    pub asker_ahead_ms: Option<i64>,
    /// This manager's own clock is too far off the median, which is so far ahead, and that was not said lately: it should
    /// not lead.
    pub hand_over: Option<i64>,
}

/// Whether a clock that is so far ahead of the median is too far off it to decide by.
pub fn is_off(ahead_ms: i64) -> bool {
    u128::from(ahead_ms.unsigned_abs()) > limits::CLOCK_SKEW.as_millis()
}

impl Clocks {
    /// A manager asked, and its clock was so far ahead of this one. `all` are the managers there are, this one included.
    pub fn manager(&self, node: NodeId, ahead_ms: i64, all: BTreeSet<NodeId>, now: Duration) -> Judgement {
        let mut inner = self.lock();
        inner.forget(now);
        if inner.managers.is_empty() {
            inner.listening_since = now;
        }
        inner.all = all;
        inner.managers.entry(node).or_default().add(ahead_ms, now);
        let median = inner.median_from(0);
        let lately = inner.handed_over.is_some_and(|at| now.saturating_sub(at) < PAUSE);
        let hand_over = (is_off(median) && !lately).then_some(median);
        if hand_over.is_some() {
            inner.handed_over = Some(now);
        }
        Judgement {
            asker_ahead_ms: inner.judge(ahead_ms, now),
            hand_over,
        }
    }

    /// A worker whose stream ends here said what its clock says: so far ahead of this one.
    pub fn worker(&self, node: NodeId, ahead_ms: i64, now: Duration) {
        self.lock().workers.entry(node).or_default().add(ahead_ms, now);
    }

    /// How far this manager's own clock is ahead of the median, as it knows while it leads; 0 where it cannot say.
    pub fn own_ahead_ms(&self, now: Duration) -> i64 {
        let mut inner = self.lock();
        inner.forget(now);
        inner.median_from(0).saturating_neg()
    }

    /// How far a clock is ahead of the median that is so far ahead of this one; none while that cannot be known yet.
    pub fn ahead_of_median_ms(&self, ahead_ms: i64, now: Duration) -> Option<i64> {
        let mut inner = self.lock();
        inner.forget(now);
        inner.judge(ahead_ms, now)
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
        inner.forget(now);
        let median = inner.median_from(0);
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
    fn forget(&mut self, now: Duration) {
        self.managers
            .retain(|_, heard| now.saturating_sub(heard.at) < HEARD);
    }

    /// How far each manager's clock that is known is ahead of one that is itself so far ahead of this manager's.
    fn known_from(&self, ahead_ms: i64) -> Vec<i64> {
        let heard = self.managers.iter().filter(|(node, _)| self.all.contains(node));
        let heard = heard.map(|(_, heard)| heard.newest());
        heard.chain([0]).map(|it| it.saturating_sub(ahead_ms)).collect()
    }

    /// How far the median is ahead of that clock, with which every manager agrees that is not heard. Of an even number the
    /// one of the two in the middle that is nearer to the clock: half of the managers are no majority.
    fn median_from(&self, ahead_ms: i64) -> i64 {
        let mut all = self.known_from(ahead_ms);
        all.resize(self.all.len().max(all.len()), 0);
        all.sort_unstable();
        0_i64.clamp(all[(all.len() - 1) / 2], all[all.len() / 2])
    }

    /// How far the clock is ahead of the median. Where neither a majority agrees with it nor a majority says that it is off,
    /// those that are missing could tell: that is waited for as long as it takes to be sure that they are silent. This
    /// manager's own time is taken at once, since by it this manager decides anyway.
    fn judge(&self, ahead_ms: i64, now: Duration) -> Option<i64> {
        let off = self.median_from(ahead_ms).saturating_neg();
        let known = self.known_from(ahead_ms);
        let agree = known.iter().filter(|apart| !is_off(**apart)).count();
        let complete = known.len() >= self.all.len() && !self.managers.is_empty();
        let waited = !self.managers.is_empty() && now.saturating_sub(self.listening_since) >= HEARD;
        let majority = agree > self.all.len() / 2 || is_off(off);
        let settled = !self.all.is_empty() && majority;
        (settled || !is_off(ahead_ms) || complete || waited).then_some(off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: usize) -> NodeId {
        NodeId::from_bytes([u8::try_from(n).expect("few"); 16])
    }

    fn nodes(count: usize) -> BTreeSet<NodeId> {
        (0..count).map(node).collect()
    }

    #[test]
    fn a_wrong_clock_is_found_on_its_own_manager_only_and_said_once() {
        let now = Duration::from_secs(100);
        let check = |managers: usize, heard: &[i64], expected: Option<i64>| {
            let clocks = Clocks::default();
            let ask = |now| {
                (0..)
                    .zip(heard)
                    .filter_map(|(n, ahead)| clocks.manager(node(n), *ahead, nodes(managers), now).hand_over)
                    .last()
            };
            assert_eq!(ask(now), expected, "{heard:?} of {managers}");
            assert_eq!(ask(now + HEARD), None, "{heard:?} of {managers} again");
            assert_eq!(ask(now + PAUSE), expected, "{heard:?} of {managers} later");
        };
        check(2, &[60_000], None);
        check(3, &[60_000], None);
        check(3, &[60_000, 60_010], Some(60_000));
        check(3, &[-60_000, -60_010], Some(-60_000));
        check(3, &[60_000, 10], None);
        check(3, &[i64::MIN, i64::MAX], None);
        check(3, &[29_000, 29_000], None);
        check(4, &[60_000, 60_000], None);
        check(4, &[60_000, 60_000, 50_000], Some(50_000));
        check(4, &[-60_000, -60_000, -50_000], Some(-50_000));
        check(5, &[60_000, 60_000], None);
        check(5, &[60_000, 60_000, 10], None);
        check(5, &[60_000, 10, 20, 60_000], None);
        // Who is no manager has no say.
        check(1, &[10, 60_000, 60_000], None);
    }

    #[test]
    fn a_clock_that_was_not_heard_of_lately_does_not_count() {
        let clocks = Clocks::default();
        let ask = |n, at| {
            clocks
                .manager(node(n), 60_000, nodes(3), Duration::from_secs(at))
                .hand_over
        };
        assert_eq!((ask(1, 10), ask(2, 13)), (None, None));
        assert_eq!(ask(1, 14), Some(60_000));
    }

    /// However a minority of the clocks is set, whoever of the others is silent and in whatever order they are heard: a
    /// clock that is right is judged right, and one that is not is judged wrong as soon as a majority that is right is heard.
    #[test]
    fn a_step_of_a_minority_of_clocks_misjudges_nobody() {
        const STEPS: [i64; 7] = [i64::MIN, -86_400_000, -60_000, 0, 60_000, 86_400_000, i64::MAX];
        let mut convicted = 0;
        for managers in [2, 3, 4, 5, 6, 7] {
            for wrong in 1..=(managers - 1) / 2 {
                for leader in [0, managers - 1] {
                    let others: Vec<usize> = (0..managers).filter(|n| *n != leader).collect();
                    let right = others.iter().filter(|n| **n >= wrong).count();
                    for (step, silent) in STEPS.iter().flat_map(|it| (0..=right).map(move |n| (*it, n))) {
                        // Those of one kind are alike: which of them is silent, and their own order, makes no difference.
                        let askers = &others[..others.len() - silent];
                        for order in orders(askers, wrong) {
                            let cluster = Cluster {
                                managers,
                                wrong,
                                step,
                                leader,
                            };
                            convicted += cluster.judge_all(&order);
                        }
                    }
                }
            }
        }
        assert!(convicted > 1_000, "{convicted}");
    }

    /// Every way to mix those that are wrong among the others.
    fn orders(askers: &[usize], wrong: usize) -> Vec<Vec<usize>> {
        let (bad, good): (Vec<usize>, Vec<usize>) = askers.iter().partition(|n| **n < wrong);
        (0..1_u32 << askers.len())
            .filter(|places| usize::try_from(places.count_ones()) == Ok(bad.len()))
            .map(|places| {
                let (mut bad, mut good) = (bad.iter(), good.iter());
                (0..askers.len())
                    .filter_map(|n| match (places >> n) & 1 {
                        1 => bad.next(),
                        _ => good.next(),
                    })
                    .copied()
                    .collect()
            })
            .collect()
    }

    /// Clocks 0 up to `wrong` are set `step` ahead, the rest agree.
    #[derive(Debug)]
    struct Cluster {
        managers: usize,
        wrong: usize,
        step: i64,
        leader: usize,
    }

    impl Cluster {
        /// Lets them ask in this order, again and again, and checks each judgement. Returns how many were judged wrong.
        fn judge_all(&self, order: &[usize]) -> usize {
            let ahead = |n: usize| if n < self.wrong { self.step } else { 0 };
            let is_wrong = |n: usize| n < self.wrong && is_off(self.step);
            let clocks = Clocks::default();
            let mut heard = BTreeSet::from([self.leader]);
            let (mut handed_over, mut convicted) = (false, 0);
            for second in 0..4 {
                let now = Duration::from_secs(100 + second);
                for n in order {
                    heard.insert(*n);
                    let of_leader = ahead(*n).saturating_sub(ahead(self.leader));
                    let judgement = clocks.manager(node(*n), of_leader, nodes(self.managers), now);
                    let alike = |n: usize| heard.iter().filter(|it| is_wrong(**it) == is_wrong(n)).count();
                    let majority = self.managers / 2 + 1;
                    let right = heard.iter().filter(|n| !is_wrong(**n)).count();
                    let off = |n: usize| is_wrong(n) && right >= majority;
                    let unsettled = second < 2
                        && heard.len() < self.managers
                        && is_wrong(*n) != is_wrong(self.leader)
                        && alike(*n) < majority
                        && !off(*n);
                    let expected = (!unsettled).then_some(off(*n));
                    let context = || format!("{self:?}, {order:?}: clock {n} after {heard:?}");
                    assert_eq!(judgement.asker_ahead_ms.map(is_off), expected, "{}", context());
                    assert_eq!(
                        clocks.ahead_of_median_ms(of_leader, now),
                        judgement.asker_ahead_ms,
                        "{}: a proposal",
                        context()
                    );
                    let hands_over = off(self.leader) && !handed_over;
                    assert_eq!(judgement.hand_over.is_some(), hands_over, "{}", context());
                    assert_eq!(
                        is_off(clocks.own_ahead_ms(now)),
                        off(self.leader),
                        "{}",
                        context()
                    );
                    handed_over |= hands_over;
                    convicted += usize::from(off(*n));
                }
            }
            convicted
        }
    }

    #[test]
    fn before_anybody_was_heard_only_this_managers_time_is_taken() {
        let clocks = Clocks::default();
        let now = Duration::from_secs(100);
        assert_eq!(clocks.ahead_of_median_ms(60_000, now), None);
        assert_eq!(clocks.ahead_of_median_ms(20, now).map(is_off), Some(false));
    }

    #[test]
    fn readings_are_of_the_median_and_a_late_message_moves_none() {
        let clocks = Clocks::default();
        let now = Duration::from_secs(100);
        let managers = || [1, 2, 9].map(node).into();
        clocks.manager(node(1), 5_000, managers(), now);
        assert_eq!(
            clocks.readings(node(9), now),
            [(node(1), 5_000), (node(9), 0)].into()
        );
        clocks.manager(node(2), 5_000, managers(), now);
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
