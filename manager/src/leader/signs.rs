//! Signs of life of the workers, as this manager's dispatcher hears them and as other managers report them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_proto::{NodeId, limits};

use crate::orchestrator::liveness::Liveness;

/// A manager that reported nothing for this long is lost as a reporter: twice what managers take between reports.
const REPORTER_SILENT: Duration = Duration::from_secs(1);
/// Signs older than this say nothing any more.
const FORGET: Duration = Duration::from_secs(30);

/// Where signs of life are collected. Clones share everything; times are this manager's monotonic clock.
#[derive(Clone, Debug, Default)]
pub struct Signs(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    own: BTreeMap<NodeId, Duration>,
    reports: BTreeMap<u64, Report>,
    graces: BTreeMap<NodeId, (Duration, Duration)>,
}

#[derive(Debug)]
struct Report {
    at: Duration,
    heard: BTreeMap<NodeId, Duration>,
}

impl Signs {
    /// The worker spoke on a stream that ends here.
    pub fn heard(&self, node: NodeId, now: Duration) {
        self.inner().own.insert(node, now);
    }

    /// The worker said that it will be silent for so long at most; the caller bounds it.
    pub fn grace(&self, node: NodeId, grace: Duration, now: Duration) {
        self.inner().graces.insert(node, (grace, now));
    }

    /// Another manager's whole report: how long ago it heard from each worker whose stream it serves.
    pub fn reported(&self, member: u64, ages: impl IntoIterator<Item = (NodeId, Duration)>, now: Duration) {
        let heard = ages
            .into_iter()
            .map(|(node, age)| (node, now.saturating_sub(age)))
            .collect();
        self.inner().reports.insert(member, Report { at: now, heard });
    }

    /// What this manager itself heard and when, for its report to the leader.
    pub fn ages(&self, now: Duration) -> Vec<(NodeId, Duration)> {
        let mut inner = self.inner();
        inner.own.retain(|_, heard| *heard + FORGET > now);
        let age = |(node, heard): (&NodeId, &Duration)| (*node, now.saturating_sub(*heard));
        inner.own.iter().map(age).collect()
    }

    /// Workers that somebody heard within their time.
    pub fn alive(&self, now: Duration) -> BTreeSet<NodeId> {
        let inner = self.inner();
        let reported = inner.reports.values().flat_map(|report| &report.heard);
        let recent = inner.own.iter().chain(reported);
        recent
            .filter(|(_, heard)| **heard + limits::WORKER_LIVENESS > now)
            .map(|(node, _)| *node)
            .collect()
    }

    /// Tells the leader's judgement all that is known.
    pub fn feed(&self, liveness: &mut Liveness, now: Duration) {
        let mut inner = self.inner();
        inner.own.retain(|_, heard| *heard + FORGET > now);
        let reported = inner.reports.values().flat_map(|report| &report.heard);
        for (node, heard) in inner.own.iter().chain(reported) {
            liveness.heard(*node, now.saturating_sub(*heard), now);
        }
        for (node, (grace, at)) in std::mem::take(&mut inner.graces) {
            liveness.grace_announced(node, grace, at);
        }
        let silent = inner
            .reports
            .extract_if(.., |_, report| report.at + REPORTER_SILENT <= now);
        for (_, report) in silent {
            liveness.reporter_lost(report.heard.into_keys(), now);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestrator::liveness::Verdict;

    fn id(number: u8) -> NodeId {
        NodeId::from_bytes([number; 16])
    }

    fn at(ms: u64) -> Duration {
        Duration::from_secs(100) + Duration::from_millis(ms)
    }

    fn down(signs: &Signs, liveness: &mut Liveness, ms: u64) -> Vec<NodeId> {
        signs.feed(liveness, at(ms));
        match liveness.verdict(at(ms)) {
            Verdict::Down(down) => down.into_iter().collect(),
            frozen => panic!("{frozen:?}"),
        }
    }

    #[test]
    fn own_signs_and_reports_count_alike() {
        let signs = Signs::default();
        let mut liveness = Liveness::of_new_leader([], at(0), true);
        signs.heard(id(1), at(0));
        signs.reported(7, [(id(2), Duration::from_millis(500))], at(500));
        assert_eq!(signs.alive(at(2_499)), [id(1), id(2)].into());
        assert_eq!(signs.alive(at(2_500)), [].into());
        assert_eq!(signs.ages(at(400)), [(id(1), Duration::from_millis(400))]);
        signs.feed(&mut liveness, at(500));
        signs.reported(7, [], at(1_400));
        assert_eq!(down(&signs, &mut liveness, 2_300), []);
        assert_eq!(down(&signs, &mut liveness, 2_500), [id(1), id(2)]);
    }

    #[test]
    fn the_workers_of_a_silent_reporter_get_time_once() {
        let signs = Signs::default();
        let mut liveness = Liveness::of_new_leader([], at(0), true);
        signs.reported(7, [(id(2), Duration::ZERO)], at(0));
        assert_eq!(down(&signs, &mut liveness, 999), []);
        assert_eq!(down(&signs, &mut liveness, 1_000), []); // extended to 3,000
        assert_eq!(down(&signs, &mut liveness, 2_999), []);
        assert_eq!(down(&signs, &mut liveness, 3_000), [id(2)]);
    }

    #[test]
    fn an_announced_silence_is_waited_for() {
        let signs = Signs::default();
        let mut liveness = Liveness::of_new_leader([], at(0), true);
        signs.heard(id(1), at(0));
        signs.grace(id(1), Duration::from_secs(10), at(0));
        assert_eq!(down(&signs, &mut liveness, 0), []);
        assert_eq!(down(&signs, &mut liveness, 12_499), []);
        assert_eq!(down(&signs, &mut liveness, 12_500), [id(1)]);
    }
}
