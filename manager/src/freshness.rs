//! Whether this manager's replica may still be trusted to decide: pure state, fed by the loop that asks the leader.
//!
//! A replica that is cut off keeps answering from what it last knew, so a revoked key would stay good there for ever.
//! It is fresh only for a short time after a question that the leader answered and that it has applied past.
//! The time counts from when the question was *sent*: the answer says nothing about what was committed later. And a manager
//! whose clock is far off the others' is never fresh: it would judge by its clock what is expired and what is not.

mod clocks;
mod follow;
mod keep;

pub use clocks::{Clocks, Judgement, is_off};
pub use follow::Fresh;
pub use keep::keep;

use std::{collections::VecDeque, time::Duration};

/// How long one answered question keeps a replica fresh. Doubling it doubles how long a removed key works on a manager
/// that is cut off; halving it makes one lost answer in a row of three visible to callers.
pub const FRESH_FOR: Duration = bulkhead_proto::limits::FRESHNESS;

/// A gap in freshness is looked back at for so long: an election takes less.
const LOOK_BACK: Duration = Duration::from_secs(5);

/// Answers waiting to be applied. Questions go out each 150 ms, so no more than four can still count; the rest is slack.
const WAITING_MAX: usize = 8;

/// What this replica knows about its own age. Times are readings of one monotonic clock.
#[derive(Debug, Default)]
pub struct Freshness {
    applied: u64,
    confirmed_sent_at: Option<Duration>,
    waiting: VecDeque<Answer>,
    /// The last time without freshness: when it was over, and how long it lasted.
    gap: Option<(Duration, Duration)>,
}

#[derive(Debug, Clone, Copy)]
struct Answer {
    sent_at: Duration,
    read_index: u64,
}

impl Freshness {
    /// The leader answered the question sent at `sent_at` with this read index.
    pub fn answered(&mut self, sent_at: Duration, read_index: u64) {
        // Older answers stay: under steady writes the newest is never applied yet when the next one arrives.
        if self.waiting.len() == WAITING_MAX {
            self.waiting.pop_front();
        }
        self.waiting.push_back(Answer { sent_at, read_index });
        self.confirm();
    }

    /// The state machine has applied every entry up to `index`.
    pub fn applied(&mut self, index: u64) {
        self.applied = self.applied.max(index);
        self.confirm();
    }

    /// Until when the replica is fresh; nothing before the first confirmed answer.
    pub fn fresh_until(&self) -> Option<Duration> {
        self.confirmed_sent_at.map(|sent_at| sent_at + FRESH_FOR)
    }

    /// Whether the replica may decide at `now`.
    pub fn is_fresh(&self, now: Duration) -> bool {
        self.fresh_until().is_some_and(|until| now < until)
    }

    /// How long the replica has not been fresh, or was not until a moment ago. It is for ever before it first was: what the
    /// others did meanwhile is not known.
    pub fn silence(&self, now: Duration) -> Duration {
        match (self.fresh_until(), self.gap) {
            (None, _) => Duration::MAX,
            (Some(until), _) if until <= now => now - until,
            (Some(_), Some((over, lasted))) if now.saturating_sub(over) <= LOOK_BACK => lasted,
            (Some(_), _) => Duration::ZERO,
        }
    }

    fn confirm(&mut self) {
        let applied = self.applied;
        let reached = self.waiting.iter().filter(|answer| answer.read_index <= applied);
        let Some(sent_at) = reached.map(|answer| answer.sent_at).max() else {
            return;
        };
        match self.fresh_until() {
            None => self.gap = Some((sent_at, Duration::MAX)),
            Some(until) if until < sent_at => self.gap = Some((sent_at, sent_at - until)),
            Some(_) => {}
        }
        // `max`: answers may arrive out of order, and an older one must not take time away.
        self.confirmed_sent_at = self.confirmed_sent_at.max(Some(sent_at));
        self.waiting.retain(|answer| answer.read_index > applied);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_new_replica_is_stale() {
        assert!(!Freshness::default().is_fresh(ms(0)));
    }

    #[test]
    fn an_answer_counts_from_its_question_and_ends_on_time() {
        let mut freshness = Freshness::default();
        freshness.applied(7);
        freshness.answered(ms(100), 7);
        assert!(freshness.is_fresh(ms(599)));
        assert!(!freshness.is_fresh(ms(600)));
    }

    #[test]
    fn an_answer_counts_only_once_applied() {
        let mut freshness = Freshness::default();
        freshness.answered(ms(100), 9);
        freshness.applied(8);
        assert!(!freshness.is_fresh(ms(200)));
        freshness.applied(9);
        assert!(freshness.is_fresh(ms(200)));
    }

    #[test]
    fn a_replica_that_lags_under_steady_writes_still_gets_fresh() {
        let mut freshness = Freshness::default();
        freshness.answered(ms(100), 10);
        freshness.answered(ms(250), 20);
        freshness.applied(10);
        assert_eq!(freshness.fresh_until(), Some(ms(600)));
    }

    #[test]
    fn a_late_answer_to_an_old_question_takes_no_time_away() {
        let mut freshness = Freshness::default();
        freshness.answered(ms(250), 0);
        freshness.answered(ms(100), 0);
        assert_eq!(freshness.fresh_until(), Some(ms(750)));
    }

    #[test]
    fn a_silence_is_remembered_for_a_moment_after_it_was_over() {
        let mut freshness = Freshness::default();
        assert_eq!(freshness.silence(ms(10)), Duration::MAX);
        freshness.answered(ms(100), 0);
        assert_eq!(
            freshness.silence(ms(200)),
            Duration::MAX,
            "what was before it began"
        );
        assert_eq!(
            freshness.silence(ms(100) + LOOK_BACK + ms(1)),
            LOOK_BACK - FRESH_FOR + ms(1)
        );
        freshness.answered(ms(500), 0);
        freshness.answered(ms(9_000), 0);
        freshness.answered(ms(9_150), 0);
        assert_eq!(
            freshness.silence(ms(9_200)),
            ms(8_000),
            "from 1,000 on nobody answered"
        );
        for n in 1..40 {
            freshness.answered(ms(9_150 + n * 150), 0);
        }
        assert_eq!(freshness.silence(ms(15_100)), Duration::ZERO);
    }

    #[test]
    fn unapplied_answers_are_bounded() {
        let mut freshness = Freshness::default();
        for n in 0..1000 {
            freshness.answered(ms(n), 1);
        }
        assert_eq!(freshness.waiting.len(), WAITING_MAX);
        freshness.applied(1);
        assert_eq!(freshness.fresh_until(), Some(ms(999) + FRESH_FOR));
    }
}
