//! The shortest run that still fails: strikes are left out, halves first, then ever smaller pieces (Zeller and Hildebrandt,
//! "Simplifying and Isolating Failure-Inducing Input", 2002), then clients and time.

use std::collections::BTreeSet;
use std::time::Duration;

/// What a plan has that can be less.
#[derive(Debug)]
pub struct Parts<'a> {
    /// Strikes that are left out, by their numbers.
    pub without: &'a mut BTreeSet<u32>,
    /// Clients.
    pub clients: &'a mut u64,
    /// How long things go wrong.
    pub trouble: &'a mut Duration,
}

/// A plan that can be made smaller.
pub trait Shrinks: Clone {
    /// What can be less.
    fn parts(&mut self) -> Parts<'_>;
}

impl Shrinks for super::Plan {
    fn parts(&mut self) -> Parts<'_> {
        Parts {
            without: &mut self.without,
            clients: &mut self.clients,
            trouble: &mut self.trouble,
        }
    }
}

/// A smaller plan that `fails` as well, and how many runs it took to find. At most `limit` runs are tried.
pub fn shrink<P: Shrinks>(plan: P, strikes: u32, limit: usize, fails: impl FnMut(&P) -> bool) -> (P, usize) {
    let mut search = Search {
        best: plan,
        runs: 0,
        limit,
        fails,
    };
    search.strikes(strikes);
    for clients in 1..*search.best.parts().clients {
        if search.accepts(|parts| *parts.clients = clients) {
            break;
        }
    }
    while *search.best.parts().trouble > Duration::from_millis(500)
        && search.accepts(|parts| *parts.trouble = *parts.trouble * 2 / 3)
    {}
    (search.best, search.runs)
}

struct Search<P, F> {
    best: P,
    runs: usize,
    limit: usize,
    fails: F,
}

impl<P: Shrinks, F: FnMut(&P) -> bool> Search<P, F> {
    /// Takes the change where the plan still fails with it.
    fn accepts(&mut self, change: impl FnOnce(Parts<'_>)) -> bool {
        if self.runs == self.limit {
            return false;
        }
        self.runs += 1;
        let mut smaller = self.best.clone();
        change(smaller.parts());
        let fails = (self.fails)(&smaller);
        if fails {
            self.best = smaller;
        }
        fails
    }

    fn strikes(&mut self, strikes: u32) {
        let mut left: Vec<u32> = (1..=strikes)
            .filter(|number| !self.best.parts().without.contains(number))
            .collect();
        let mut piece = left.len();
        while piece > 0 {
            let mut at = 0;
            while at < left.len() {
                let end = (at + piece).min(left.len());
                let out: BTreeSet<u32> = left[at..end].iter().copied().collect();
                if self.accepts(|parts| parts.without.extend(&out)) {
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
    use crate::sim::Plan;

    proptest! {
        /// A failure that needs some strikes, and nothing else, shrinks to exactly those.
        #[test]
        fn what_is_left_is_what_is_needed(
            strikes in 1..40_u32,
            needed in prop::collection::btree_set(1..40_u32, 0..4),
        ) {
            let needed: BTreeSet<u32> = needed.into_iter().filter(|number| *number <= strikes).collect();
            let (smallest, _) = shrink(Plan::of(1), strikes, 10_000, |plan: &Plan| needed.is_disjoint(&plan.without));
            let left: BTreeSet<u32> = (1..=strikes).filter(|number| !smallest.without.contains(number)).collect();
            prop_assert_eq!(left, needed);
            prop_assert_eq!(smallest.clients, 1);
        }
    }

    #[test]
    fn the_search_ends_at_its_limit() {
        let mut runs = 0;
        let (_, said) = shrink(Plan::of(1), 1_000, 10, |_: &Plan| {
            runs += 1;
            false
        });
        assert_eq!((runs, said), (10, 10));
    }
}
