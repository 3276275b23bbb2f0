//! Which manager to try next, and when. Pure but for its own random source.

use bulkhead_proto::limits;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

/// The longest first wait: a worker whose manager died is back at another one long before it counts as down.
const FIRST: Duration = Duration::from_millis(150);
/// The longest wait, between two rounds.
const LONGEST: Duration = limits::WORKER_RETRY;
/// From dialling to a manager's first word. In the first round less: one that is cut off answers nothing at all, and this
/// node must be back at another one before it counts as down.
const OPEN: Duration = Duration::from_secs(5);
const OPEN_AT_FIRST: Duration = Duration::from_millis(600);

/// Takes the managers in turn, and waits longer with each vain round.
#[derive(Debug)]
pub(super) struct Retry {
    random: SmallRng,
    turn: usize,
    failures: usize,
}

impl Retry {
    /// Begins anywhere in the list, so that workers spread over the managers.
    pub(super) fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        Retry {
            turn: random.random_range(0..1 << 16),
            random,
            failures: 0,
        }
    }

    /// The manager to try now.
    pub(super) fn next<'a>(&mut self, managers: &'a [String]) -> Option<&'a str> {
        self.turn += 1;
        let at = self.turn.checked_rem(managers.len())?;
        managers.get(at).map(String::as_str)
    }

    /// The last one has the next turn, too: it was just heard.
    pub(super) fn stay(&mut self) {
        self.turn -= 1;
    }

    /// How long it may take to open a session with a manager of so many.
    pub(super) fn open(&self, managers: usize) -> Duration {
        match self.failures < managers {
            true => OPEN_AT_FIRST,
            false => OPEN,
        }
    }

    /// How long to wait after a session ended, or after one could not begin. It grows only between rounds: a manager that is
    /// back is found in the next one, however many others are gone.
    pub(super) fn wait(&mut self, worked: bool, managers: usize) -> Duration {
        self.failures = if worked { 0 } else { self.failures + 1 };
        let managers = managers.max(1);
        let longest = match self.failures % managers {
            0 => {
                let rounds = u32::try_from(self.failures / managers).unwrap_or(u32::MAX);
                FIRST.saturating_mul(2u32.saturating_pow(rounds)).min(LONGEST)
            }
            _ => FIRST,
        };
        longest.mul_f64(self.random.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_manager_has_its_turn() {
        let managers: Vec<String> = ["a", "b", "c"].map(String::from).into();
        let mut retry = Retry::new(7);
        let mut tried: Vec<_> = (0..3).filter_map(|_| retry.next(&managers)).collect();
        tried.sort_unstable();
        assert_eq!(tried, ["a", "b", "c"]);
        assert_eq!(retry.next(&[]), None);
    }

    #[test]
    fn the_last_one_has_the_next_turn_where_it_was_heard() {
        let managers: Vec<String> = ["a", "b", "c"].map(String::from).into();
        for seed in 0..9 {
            let mut retry = Retry::new(seed);
            let first = retry.next(&managers);
            retry.stay();
            assert_eq!(retry.next(&managers), first);
            assert_ne!(retry.next(&managers), first);
        }
    }

    #[test]
    fn a_node_is_back_before_it_counts_as_down_though_one_manager_is_cut_off() {
        let mut retry = Retry::new(1);
        let took = bulkhead_proto::limits::SESSION_SILENCE + retry.wait(true, 3) + retry.open(3);
        assert!(took < limits::WORKER_LIVENESS, "{took:?}");
        for _ in 0..3 {
            retry.wait(false, 3);
        }
        assert_eq!(retry.open(3), OPEN, "in the end each has its time");
    }

    #[test]
    fn waits_grow_by_rounds_and_begin_anew_after_a_session() {
        for seed in 0..50 {
            let mut retry = Retry::new(seed);
            let first: Vec<_> = (0..2).map(|_| retry.wait(false, 3)).collect();
            assert!(first.iter().all(|wait| *wait <= FIRST), "{first:?}");
            let many: Vec<_> = (0..61).map(|_| retry.wait(false, 3)).collect();
            assert!(many.iter().all(|wait| *wait <= LONGEST), "{many:?}");
            // From the wait that ends a round on: a long one, then the others at once.
            assert!(many[60] >= LONGEST / 2, "{many:?}");
            assert!(many[58..60].iter().all(|wait| *wait <= FIRST), "{many:?}");
            assert!(retry.wait(true, 3) <= FIRST);
        }
    }
}
