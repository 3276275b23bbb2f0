//! Which members the cluster is to have, and who brings it there: as the manager that leads does.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_raft::planted::{Bug, planted};
use bulkhead_raft::{Reconciled, Replica};
use tokio::time::sleep;

use super::cluster::{Live, member};
use super::record::Record;
use crate::rules::Rule;

/// The wanted members. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Wanted(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    members: BTreeSet<u64>,
    /// Ids are never used again.
    next: u64,
}

impl Wanted {
    pub(super) fn new(members: impl IntoIterator<Item = u64>) -> Self {
        let members: BTreeSet<u64> = members.into_iter().collect();
        let next = members.last().map_or(1, |last| last + 1);
        Self(Arc::new(Mutex::new(Inner { members, next })))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn members(&self) -> BTreeSet<u64> {
        self.with(|inner| inner.members.clone())
    }

    /// Another one in the place of this one; its id.
    pub(super) fn replace(&self, lost: u64) -> u64 {
        self.with(|inner| {
            let new = match planted(Bug::ReusesMemberId) {
                true => lost,
                false => inner.next,
            };
            inner.next += 1;
            inner.members.remove(&lost);
            inner.members.insert(new);
            new
        })
    }

    /// Whether the leader knows that exactly these vote.
    pub(super) fn all_vote(&self, live: &Live) -> bool {
        let wanted = self.members();
        live.leader()
            .is_some_and(|(_, leader)| are_voters(&leader, &wanted))
    }
}

fn are_voters(leader: &Replica, wanted: &BTreeSet<u64>) -> bool {
    let members = leader.members();
    let caught_up = |id: &u64| members.matched.get(id).is_some_and(Option::is_some);
    members.voters == *wanted
        && members.learners.is_empty()
        && !members.joint
        && wanted.iter().all(|id| *id == leader.member() || caught_up(id))
}

/// Brings the cluster to the wanted members, under any leader, for ever.
pub(super) async fn keep(live: Live, wanted: Wanted, record: Record) {
    loop {
        sleep(Duration::from_millis(100)).await;
        let wanted = wanted.members();
        let Some((_, leader)) = live.leader() else {
            continue;
        };
        if are_voters(&leader, &wanted) {
            continue;
        }
        let known = leader.members();
        if known.voters.len() < wanted.len() {
            record.violation(
                Rule::VotersStay,
                format_args!("only {:?} vote while {wanted:?} are to", known.voters),
            );
        }
        let fresh = wanted.iter().find(|id| !known.nodes.contains_key(*id));
        // Whatever fails here is tried again under whoever leads then.
        let _tried_again = match fresh {
            Some(id) => leader
                .add_learner(*id, member(*id))
                .await
                .map(|()| Reconciled::Moved),
            None => leader.reconcile_voters(&wanted).await,
        };
    }
}
