//! What a leader knows of the other managers' clocks, from the questions that they ask: one whose own clock is far off
//! the median must not decide when tickets and certificates end.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bulkhead_proto::{NodeId, limits};

/// A clock that was not heard of for so long does not count. Questions come each 150 ms.
const HEARD: Duration = Duration::from_secs(2);
/// A leader with a wrong clock hands over at most this often: where all others are gone or wrong too, leading must not
/// circle.
const PAUSE: Duration = Duration::from_secs(30);

/// The clocks of the managers that asked lately. Times are readings of this manager's monotonic clock.
#[derive(Debug, Default)]
pub struct Clocks(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    ahead_ms: BTreeMap<NodeId, (i64, Duration)>,
    judged: Option<Duration>,
}

impl Clocks {
    /// A manager asked, and its clock was so far ahead of this one. Gives how far the median of all clocks is ahead,
    /// where that is more than [`limits::CLOCK_SKEW`] either way and was not said lately: then this manager should not
    /// lead.
    pub fn heard(&self, node: NodeId, ahead_ms: i64, now: Duration) -> Option<i64> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.ahead_ms.insert(node, (ahead_ms, now));
        inner
            .ahead_ms
            .retain(|_, (_, heard)| now.saturating_sub(*heard) < HEARD);
        let median = median(inner.ahead_ms.values().map(|(ahead, _)| *ahead));
        let wrong = u128::from(median.unsigned_abs()) > limits::CLOCK_SKEW.as_millis();
        let lately = inner.judged.is_some_and(|at| now.saturating_sub(at) < PAUSE);
        if !wrong || lately {
            return None;
        }
        inner.judged = Some(now);
        Some(median)
    }
}

/// The median of the others' clocks and this one; 0 where fewer than three are known, since of two nobody can say which
/// is wrong.
fn median(others: impl Iterator<Item = i64>) -> i64 {
    let mut ahead: Vec<i64> = others.chain([0]).collect();
    ahead.sort_unstable();
    match ahead.len() {
        0..3 => 0,
        count => ahead[count / 2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_clock_is_found_on_its_own_manager_only_and_said_once() {
        let now = Duration::from_secs(100);
        let check = |heard: &[i64], expected: Option<i64>| {
            let clocks = Clocks::default();
            let ask = |now| {
                let node = |n: usize| NodeId::from_bytes([u8::try_from(n).expect("few"); 16]);
                (0..)
                    .zip(heard)
                    .filter_map(|(n, ahead)| clocks.heard(node(n), *ahead, now))
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
        let node = |n| NodeId::from_bytes([n; 16]);
        assert_eq!(clocks.heard(node(1), 60_000, Duration::from_secs(10)), None);
        assert_eq!(clocks.heard(node(2), 60_000, Duration::from_secs(13)), None);
    }
}
