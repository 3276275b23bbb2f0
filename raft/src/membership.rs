//! Which step brings the voters towards what is desired. Pure: the replica takes one step and asks again.
//!
//! One voter at a time, additions before removals, a learner first and only once it has caught up; a joint
//! configuration that a crash left behind is flattened before anything else. Standing still is always an answer: a desired
//! voter that is no learner yet, or lags, is waited for by asking again later, never by blocking.

use std::collections::{BTreeMap, BTreeSet};

use crate::Membership;
use crate::planted::{Bug, planted};

/// Entries that a learner may lack when it becomes a voter. Replication closes that many within one round trip.
pub(crate) const CAUGHT_UP: u64 = 64;

/// One step of membership.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Leave a joint configuration for its newer half.
    Flatten,
    /// Make a learner that caught up a voter.
    Promote(u64),
    /// Remove a voter.
    Remove(u64),
}

/// What the next step depends on.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) membership: &'a Membership,
    /// The last entry that each member is known to have, as the leader knows it.
    pub(crate) matched: &'a BTreeMap<u64, Option<u64>>,
    pub(crate) last_log: Option<u64>,
    pub(crate) leader: u64,
}

/// The next step, or none: all is as desired, or must be waited for.
pub(crate) fn next_step(facts: &Facts<'_>, desired: &BTreeSet<u64>) -> Option<Step> {
    let [voters] = facts.membership.get_joint_config().as_slice() else {
        return Some(Step::Flatten);
    };
    let promote = desired
        .difference(voters)
        .find(|id| facts.membership.get_node(id).is_some() && caught_up(facts, **id));
    let surplus = voters.difference(desired).next().is_some();
    if let Some(id) = promote
        && !(surplus && planted(Bug::RemovesBeforeAdding))
    {
        return Some(Step::Promote(*id));
    }
    // While one that should vote does not yet, removing another could leave fewer than both old and new want; and the
    // last voter never goes.
    let staying = voters.intersection(desired).count();
    let waiting = desired.difference(voters).next().is_some();
    let too_few = waiting && staying < voters.len() && voters.len() <= desired.len();
    if staying == 0 || (too_few && !planted(Bug::RemovesBeforeAdding)) {
        return None;
    }
    // The leader goes last: it is the one that takes the steps.
    let gone = || voters.difference(desired).copied();
    gone()
        .find(|id| *id != facts.leader)
        .or_else(|| gone().next())
        .map(Step::Remove)
}

fn caught_up(facts: &Facts<'_>, id: u64) -> bool {
    let matched = facts.matched.get(&id).copied().flatten();
    matched.is_some_and(|matched| matched + CAUGHT_UP >= facts.last_log.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Member;

    fn membership(configs: &[&[u64]], learners: &[u64]) -> Membership {
        let configs: Vec<BTreeSet<u64>> = configs.iter().map(|ids| ids.iter().copied().collect()).collect();
        let ids = configs.iter().flatten().chain(learners);
        let nodes: BTreeMap<u64, Member> = ids
            .map(|id| {
                let node = bulkhead_proto::NodeId::from_bytes([0; 16]);
                let address = format!("m{id}:1");
                (*id, Member { node, address })
            })
            .collect();
        Membership::new(configs, nodes).expect("every voter has a node")
    }

    fn check(configs: &[&[u64]], learners: &[(u64, Option<u64>)], desired: &[u64], expected: Option<Step>) {
        let ids: Vec<u64> = learners.iter().map(|(id, _)| *id).collect();
        let membership = membership(configs, &ids);
        let facts = Facts {
            membership: &membership,
            matched: &learners.iter().copied().collect(),
            last_log: Some(1_000),
            leader: 1,
        };
        let desired_ids = desired.iter().copied().collect();
        assert_eq!(
            next_step(&facts, &desired_ids),
            expected,
            "{configs:?} {learners:?} -> {desired:?}"
        );
    }

    #[test]
    fn one_step_at_a_time_and_never_an_unsafe_one() {
        let level = Some(990);
        check(&[&[1, 2, 3]], &[], &[1, 2, 3], None);
        check(&[&[1], &[1, 2]], &[], &[1], Some(Step::Flatten));
        check(
            &[&[1]],
            &[(2, level), (3, level)],
            &[1, 2, 3],
            Some(Step::Promote(2)),
        );
        check(
            &[&[1]],
            &[(2, Some(5)), (3, level)],
            &[1, 2, 3],
            Some(Step::Promote(3)),
        );
        // A learner that lags, was never heard of, or is not even a member, is waited for.
        check(&[&[1]], &[(2, Some(5))], &[1, 2], None);
        check(&[&[1]], &[(2, None)], &[1, 2], None);
        check(&[&[1]], &[], &[1, 2], None);
        check(&[&[1, 2, 3]], &[], &[1, 2], Some(Step::Remove(3)));
        check(&[&[1, 2, 3]], &[], &[2, 3], Some(Step::Remove(1)));
        check(&[&[1, 2, 3]], &[], &[2], Some(Step::Remove(3)));
        // Replacing 3 by 4: 4 first.
        check(&[&[1, 2, 3]], &[(4, level)], &[1, 2, 4], Some(Step::Promote(4)));
        check(&[&[1, 2, 3]], &[(4, Some(1))], &[1, 2, 4], None);
        check(&[&[1, 2, 3, 4]], &[], &[1, 2, 4], Some(Step::Remove(3)));
        // Nobody desired is there: not a step towards nothing.
        check(&[&[1, 2, 3]], &[], &[], None);
        check(&[&[1]], &[], &[7], None);
    }

    #[test]
    fn every_path_of_steps_ends_at_what_is_desired() {
        for desired in [vec![1], vec![2, 3], vec![1, 2, 3, 4, 5], vec![4], vec![3, 4, 5]] {
            let wanted: BTreeSet<u64> = desired.iter().copied().collect();
            let mut voters = BTreeSet::from([1, 2, 3]);
            for _ in 0..10 {
                let learners: Vec<u64> = (1..=5).filter(|id| !voters.contains(id)).collect();
                let ids: Vec<u64> = voters.iter().copied().collect();
                let membership = membership(&[&ids], &learners);
                let facts = Facts {
                    membership: &membership,
                    matched: &(1..=5).map(|id| (id, Some(1_000))).collect(),
                    last_log: Some(1_000),
                    leader: 1,
                };
                match next_step(&facts, &wanted) {
                    Some(Step::Promote(id)) => assert!(voters.insert(id)),
                    Some(Step::Remove(id)) => assert!(voters.remove(&id)),
                    Some(Step::Flatten) => unreachable!("it is flat"),
                    None => break,
                }
            }
            assert_eq!(voters, wanted);
        }
    }
}
