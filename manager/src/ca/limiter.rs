//! How often one source may be wrong: a bucket of tokens for each, refilled with time.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Sources remembered; beyond it those that are full again are forgotten, and a new one shares the last bucket.
const SOURCES: usize = 4_096;

/// A bounded number of tries for each source. Times are readings of one monotonic clock.
#[derive(Debug)]
pub(crate) struct Limiter<S> {
    burst: u32,
    refill: Duration,
    spent: Mutex<BTreeMap<Option<S>, Bucket>>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    spent: u32,
    since: Duration,
}

impl<S: Ord + Copy> Limiter<S> {
    /// `burst` tries at once, then one each `refill`.
    pub(crate) fn new(burst: u32, refill: Duration) -> Self {
        Self {
            burst,
            refill,
            spent: Mutex::default(),
        }
    }

    /// Whether this source has a try left; spends none.
    pub(crate) fn allows(&self, source: S, now: Duration) -> bool {
        let spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        let key = if spent.contains_key(&Some(source)) || spent.len() < SOURCES {
            Some(source)
        } else {
            None
        };
        spent
            .get(&key)
            .is_none_or(|bucket| self.left(*bucket, now).spent < self.burst)
    }

    /// Takes a try away.
    pub(crate) fn spend(&self, source: S, now: Duration) {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if spent.len() >= SOURCES && !spent.contains_key(&Some(source)) {
            spent.retain(|_, bucket| self.left(*bucket, now).spent > 0);
        }
        let key = if spent.contains_key(&Some(source)) || spent.len() < SOURCES {
            Some(source)
        } else {
            None
        };
        let bucket = spent.entry(key).or_insert(Bucket { spent: 0, since: now });
        *bucket = self.left(*bucket, now);
        bucket.spent = self.burst.min(bucket.spent + 1);
    }

    fn left(&self, bucket: Bucket, now: Duration) -> Bucket {
        let elapsed = now.saturating_sub(bucket.since);
        let refilled = u32::try_from(elapsed.as_nanos() / self.refill.as_nanos().max(1)).unwrap_or(u32::MAX);
        if refilled == 0 {
            return bucket;
        }
        Bucket {
            spent: bucket.spent.saturating_sub(refilled),
            since: now,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_burst_is_spent_and_comes_back() {
        let limiter = Limiter::new(2, SECOND);
        limiter.spend(1, SECOND);
        assert!(limiter.allows(1, SECOND));
        limiter.spend(1, SECOND);
        assert!(!limiter.allows(1, SECOND) && limiter.allows(2, SECOND));
        assert!(limiter.allows(1, SECOND * 2));
    }

    #[test]
    fn sources_are_bounded_and_the_rest_share_one_bucket() {
        let limiter = Limiter::new(1, SECOND);
        (0..SOURCES).for_each(|source| limiter.spend(source, Duration::ZERO));
        limiter.spend(usize::MAX, Duration::ZERO);
        assert!(!limiter.allows(usize::MAX - 1, Duration::ZERO));
        assert!(limiter.spent.lock().expect("not poisoned").len() <= SOURCES + 1);
        limiter.spend(usize::MAX - 2, SECOND);
        assert!(limiter.spent.lock().expect("not poisoned").len() <= 2);
    }
}
