//! Who leads, as something to act on: not what consensus calls a leader, but one that applied an entry of its own term,
//! so that its state holds everything committed before, and that heard a quorum lately.

use std::sync::Arc;
use std::time::Duration;

use openraft::ServerState;
use openraft::async_runtime::WatchReceiver as _;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{Disk, Raft};
use crate::TypeConfig;
use crate::planted::{Bug, planted};
use crate::runtime::watch::Sender;
use crate::state_machine::View;

/// How often the disk's free space is asked for.
const DISK_CHECK: Duration = Duration::from_secs(1);
/// A leader without disk space hands over at most this often: where every disk is full, leading must not circle.
const HAND_OVER_PAUSE: Duration = Duration::from_secs(30);

/// Who leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Leadership {
    /// The newest term that this replica knows.
    pub term: u64,
    /// The leader of that term, if known.
    pub leader: Option<u64>,
    /// Some while this replica may act as the leader of this term: it applied an entry of its own in it, and a quorum
    /// answered it lately.
    pub leading: Option<u64>,
}

/// What decides [`Leadership`].
#[derive(Clone, Copy, Debug)]
struct Facts {
    term: u64,
    leader: Option<u64>,
    is_leader: bool,
    /// Term of the last entry applied.
    applied_term: Option<u64>,
    /// Whether a quorum answered lately; the only voter is its own quorum.
    quorum: bool,
}

fn decide(facts: Facts) -> Leadership {
    let applied = facts.applied_term == Some(facts.term) || planted(Bug::LeadsBeforeApplied);
    let leading = facts.is_leader && facts.quorum && applied;
    Leadership {
        term: facts.term,
        leader: facts.leader,
        leading: leading.then_some(facts.term),
    }
}

/// Keeps leadership and free space up to date. Ends when consensus does.
pub(super) struct Watcher {
    pub(super) member: u64,
    pub(super) raft: Raft,
    pub(super) view: Arc<View>,
    pub(super) leadership: Sender<Leadership>,
    pub(super) room: watch::Sender<bool>,
    pub(super) disk: Disk,
    pub(super) lease: Duration,
    pub(super) tick: Duration,
}

impl Watcher {
    pub(super) async fn run(self) {
        let mut metrics = self.raft.metrics();
        let mut applied = self.view.applied();
        // A quorum that fell silent makes no event: the tick finds it.
        let mut tick = interval(self.tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut disk_checked: Option<Instant> = None;
        let mut handed_over: Option<Instant> = None;
        loop {
            // All three are cancel-safe. Biased, so that a simulation's order follows from its seed.
            tokio::select! {
                biased;
                changed = metrics.changed() => {
                    if changed.is_err() {
                        self.leadership.send_replace(Leadership::default());
                        return;
                    }
                }
                changed = applied.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                _ = tick.tick() => {}
            }
            let leadership = decide(self.facts());
            self.leadership.send_if_modified(|old| {
                let changed = *old != leadership;
                *old = leadership;
                changed
            });
            if disk_checked.is_none_or(|at| at.elapsed() >= DISK_CHECK) {
                disk_checked = Some(Instant::now());
                self.room.send_replace(self.disk.has_room());
                let due = handed_over.is_none_or(|at| at.elapsed() >= HAND_OVER_PAUSE);
                if !*self.room.borrow() && leadership.leading.is_some() && due {
                    tracing::error!("the disk is nearly full: no more changes here; handing over");
                    handed_over = Some(Instant::now());
                    hand_over(self.member, &self.raft, None).await;
                }
            }
        }
    }

    fn facts(&self) -> Facts {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let only_voter = metrics.membership_config.voter_ids().eq([self.member]);
        let acked = metrics
            .last_quorum_acked
            .map(|at| openraft::Instant::elapsed(&*at));
        Facts {
            term: metrics.current_term,
            leader: metrics.current_leader,
            is_leader: metrics.running_state.is_ok() && metrics.state == ServerState::Leader,
            applied_term: self.view.last().map(|id| id.committed_leader_id().term),
            quorum: only_voter || acked.is_some_and(|ago| ago <= self.lease),
        }
    }
}

/// Asks a voter to lead: the given one, or the one that has most of the log.
pub(super) async fn hand_over(member: u64, raft: &Raft, to: Option<u64>) {
    let best = || {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let voters: Vec<u64> = metrics.membership_config.voter_ids().collect();
        let matched = metrics.replication.iter().flatten();
        matched
            .filter(|(id, _)| **id != member && voters.contains(id))
            .max_by_key(|(_, matched)| **matched)
            .map(|(id, _)| *id)
    };
    let Some(to) = to.or_else(best) else {
        return; // alone: nobody to hand over to
    };
    if let Err(error) = raft.trigger().transfer_leader(to).await {
        let error: openraft::errors::Fatal<TypeConfig> = error;
        tracing::debug!(%error, "no hand-over: consensus stopped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_leader_with_a_quorum_and_an_own_entry_applied_is_leading() {
        let leads = Facts {
            term: 3,
            leader: Some(1),
            is_leader: true,
            applied_term: Some(3),
            quorum: true,
        };
        let table = [
            (leads, Some(3)),
            (
                Facts {
                    is_leader: false,
                    ..leads
                },
                None,
            ),
            (
                Facts {
                    quorum: false,
                    ..leads
                },
                None,
            ),
            (
                Facts {
                    applied_term: Some(2),
                    ..leads
                },
                None,
            ),
            (
                Facts {
                    applied_term: None,
                    ..leads
                },
                None,
            ),
        ];
        for (facts, leading) in table {
            let decided = decide(facts);
            assert_eq!(
                (decided.leading, decided.term, decided.leader),
                (leading, 3, Some(1)),
                "{facts:?}"
            );
        }
    }
}
