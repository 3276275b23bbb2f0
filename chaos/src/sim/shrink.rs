//! The shortest run that still fails: strikes are left out, halves first, then ever smaller pieces (Zeller and Hildebrandt,
//! "Simplifying and Isolating Failure-Inducing Input", 2002), then clients and time.

use std::collections::BTreeSet;
use std::time::Duration;

use super::Plan;

/// A smaller plan that `fails` as well, and how many runs it took to find. At most `limit` runs are tried.
pub fn shrink(plan: Plan, strikes: u32, limit: usize, fails: impl FnMut(&Plan) -> bool) -> (Plan, usize) {
    let mut search = Search {
        best: plan,
        runs: 0,
        limit,
        fails,
    };
    search.strikes(strikes);
    for clients in 1..search.best.clients {
        if search.accepts(|plan| plan.clients = clients) {
            break;
        }
    }
    while search.best.trouble > Duration::from_millis(500)
        && search.accepts(|plan| plan.trouble = plan.trouble * 2 / 3)
    {}
    (search.best, search.runs)
}

struct Search<F> {
    best: Plan,
    runs: usize,
    limit: usize,
    fails: F,
}

impl<F: FnMut(&Plan) -> bool> Search<F> {
    /// Takes the change where the plan still fails with it.
    fn accepts(&mut self, change: impl FnOnce(&mut Plan)) -> bool {
        if self.runs == self.limit {
            return false;
        }
        self.runs += 1;
        let mut smaller = self.best.clone();
        change(&mut smaller);
        let fails = (self.fails)(&smaller);
        if fails {
            self.best = smaller;
        }
        fails
    }

    fn strikes(&mut self, strikes: u32) {
        let mut left: Vec<u32> = (1..=strikes)
            .filter(|number| !self.best.without.contains(number))
            .collect();
        let mut piece = left.len();
        while piece > 0 {
            let mut at = 0;
            while at < left.len() {
                let end = (at + piece).min(left.len());
                let out: BTreeSet<u32> = left[at..end].iter().copied().collect();
                if self.accepts(|plan| plan.without.extend(&out)) {
                    left.drain(at..end);
                } else {
                    at = end;
                }
            }
            piece /= 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A failure that needs some strikes, and nothing else, shrinks to exactly those.
        #[test]
        fn what_is_left_is_what_is_needed(
            strikes in 1..40_u32,
            needed in prop::collection::btree_set(1..40_u32, 0..4),
        ) {
            let needed: BTreeSet<u32> = needed.into_iter().filter(|number| *number <= strikes).collect();
            let (smallest, _) = shrink(Plan::of(1), strikes, 10_000, |plan| needed.is_disjoint(&plan.without));
            let left: BTreeSet<u32> = (1..=strikes).filter(|number| !smallest.without.contains(number)).collect();
            prop_assert_eq!(left, needed);
            prop_assert_eq!(smallest.clients, 1);
        }
    }

    #[test]
    fn the_search_ends_at_its_limit() {
        let mut runs = 0;
        let (_, said) = shrink(Plan::of(1), 1_000, 10, |_| {
            runs += 1;
            false
        });
        assert_eq!((runs, said), (10, 10));
    }
}
