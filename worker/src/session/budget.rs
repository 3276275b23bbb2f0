//! The byte budget of a node's log streams together: logs must not crowd out signs of life and assignments.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Bytes in one second. A task that writes more is followed late, and loses what its files overwrite meanwhile.
const BYTES_PER_SECOND: u64 = 8 << 20;
/// What may go at once after a quiet time.
const BURST: Duration = Duration::from_millis(250);

/// Shared by the log streams of one session.
#[derive(Debug)]
pub(super) struct Budget(Mutex<Instant>);

impl Budget {
    /// Nothing used.
    pub(super) fn new() -> Self {
        Budget(Mutex::new(Instant::now()))
    }

    /// Waits until these bytes may go.
    pub(super) async fn take(&self, bytes: usize) {
        let at = {
            let mut paid_until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (at, next) = take(Instant::now(), *paid_until, bytes as u64);
            *paid_until = next;
            at
        };
        tokio::time::sleep_until(at).await;
    }
}

/// When these bytes may go, and until when the budget is used then.
fn take(now: Instant, paid_until: Instant, bytes: u64) -> (Instant, Instant) {
    let earliest = now.checked_sub(BURST).unwrap_or(now);
    let at = paid_until.max(earliest);
    let cost = Duration::from_micros(bytes.saturating_mul(1_000_000) / BYTES_PER_SECOND);
    (at, at + cost)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When each of these may go, in milliseconds, all asked for at one time after a long quiet.
    fn waits(parts: &[u64]) -> Vec<u128> {
        let now = Instant::now() + Duration::from_secs(60);
        let mut paid_until = now - Duration::from_secs(60);
        let waits = parts.iter().map(|bytes| {
            let (at, next) = take(now, paid_until, *bytes);
            paid_until = next;
            at.saturating_duration_since(now).as_millis()
        });
        waits.collect()
    }

    #[test]
    fn a_quiet_time_saves_up_one_burst_and_more_than_the_budget_waits() {
        let quarter = BYTES_PER_SECOND / 4;
        assert_eq!(waits(&[quarter; 5]), [0, 0, 250, 500, 750]);
        assert_eq!(waits(&[4 * quarter, 1]), [0, 750]);
    }
}
