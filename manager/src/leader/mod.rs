//! What runs while this manager leads: one loop that wakes, looks at the newest state and commits what the plans want.
//!
//! A wake-up carries no data, so a restart, a new leader and the normal case take one path. What a plan wants is
//! committed only in the term it was planned in; whatever is refused or unknown is planned again from the state of
//! then. All judgement is in [`crate::orchestrator`] and [`crate::scheduler`].

mod batch;
mod signs;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_proto::wire::{NodeStatus, RejectionCode, Role, event, object::Object as Any};
use bulkhead_proto::{NodeId, limits};
use bulkhead_raft::Replica;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

pub use batch::{Batch, pack};
pub use signs::Signs;

use crate::freshness::Fresh;
use crate::orchestrator::liveness::{Liveness, Verdict};
use crate::orchestrator::{self, Plan};
use crate::proposer::{ProposeError, Proposer};
use crate::scheduler::{self, View};

/// Workers are judged this often; it adds to the time until a lost one's tasks run elsewhere.
const JUDGE_EVERY: Duration = Duration::from_millis(100);
/// Finds what a missed wake-up left behind.
const RESYNC: Duration = Duration::from_secs(5);
/// From the end of a pass to the next: what changes meanwhile is planned together.
const SPACING: Duration = Duration::from_millis(5);
/// After a refused or failed proposal the next pass waits so long, doubled each time up to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Runs until `stop`; acts only while this manager leads.
pub async fn run(
    replica: Replica,
    proposer: Proposer,
    signs: Signs,
    clock: Arc<dyn Clock>,
    fresh: Fresh,
    stop: CancellationToken,
) {
    let mut leadership = replica.leadership();
    loop {
        let leading = leadership.borrow_and_update().leading;
        let lead = async {
            match leading {
                Some(term) => {
                    tracing::info!(raft.term = term, "planning as leader");
                    let leader = Leader {
                        replica: &replica,
                        proposer: &proposer,
                        signs: &signs,
                        clock: &*clock,
                        fresh: &fresh,
                        term,
                    };
                    leader.run().await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            // Dropping `lead` leaves at most one proposal without its answer; the next leader plans from its effect.
            changed = leadership.wait_for(|now| now.leading != leading) => if changed.is_err() { return },
            () = lead => return,
        }
    }
}

struct Leader<'a> {
    replica: &'a Replica,
    proposer: &'a Proposer,
    signs: &'a Signs,
    clock: &'a dyn Clock,
    fresh: &'a Fresh,
    term: u64,
}

/// Something was refused or not proposed: plan again a little later.
struct Again;

impl Leader<'_> {
    /// Ends only if the replica does.
    async fn run(&self) {
        let mut applied = self.replica.applied();
        let mut seen = self.replica.index();
        // Streams end so long after a manager went stale: a longer silence means that no worker has a session.
        let served = self.fresh.silence() <= limits::STREAM_GRACE;
        let mut liveness = Liveness::of_new_leader(self.ready_workers(), self.clock.monotonic(), served);
        let mut frozen = false;
        let mut judge = interval(JUDGE_EVERY);
        judge.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut due = Instant::now();
        let mut retry = RETRY.0;
        loop {
            tokio::select! {
                biased;
                _ = judge.tick() => self.judge(&mut liveness, &mut frozen).await,
                () = sleep_until(due) => {
                    seen = self.replica.index();
                    due = Instant::now() + match self.pass().await {
                        Ok(wait) => {
                            retry = RETRY.0;
                            wait
                        }
                        Err(Again) => {
                            let wait = retry;
                            retry = (retry * 2).min(RETRY.1);
                            wait
                        }
                    };
                    // What the pass itself committed concerns the plans, too.
                    if self.concerns_plans(&mut seen) {
                        due = due.min(Instant::now() + SPACING);
                    }
                }
                // Last: under load there is always another one.
                changed = applied.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if self.concerns_plans(&mut seen) {
                        due = due.min(Instant::now() + SPACING);
                    }
                }
            }
        }
    }

    fn ready_workers(&self) -> Vec<NodeId> {
        let state = self.replica.state();
        let view = View::nodes_of(&state);
        let ready = view
            .nodes
            .values()
            .filter(|node| matches!(node.role(), Role::Worker | Role::Standby))
            .filter(|node| node.status() == NodeStatus::Ready);
        ready
            .filter_map(|node| NodeId::try_from(&node.id[..]).ok())
            .collect()
    }

    /// Whether what was committed since `seen` may change a plan: most writes under load are none of its business.
    fn concerns_plans(&self, seen: &mut u64) -> bool {
        let Ok(events) = self.replica.events_since(*seen) else {
            *seen = self.replica.index();
            return true;
        };
        *seen = events.last().map_or(*seen, |event| event.index);
        events.iter().any(|event| match &event.change {
            Some(event::Change::Put(object)) => matches!(
                object.object,
                Some(Any::Cluster(_) | Any::Node(_) | Any::Service(_) | Any::Task(_))
            ),
            Some(event::Change::Deleted(_)) => true,
            None => false,
        })
    }

    /// Everything but liveness: first what tasks there should be, then where they run. How long nothing is due.
    async fn pass(&self) -> Result<Duration, Again> {
        let wake_at_ms = self.commit(orchestrator::plan).await?;
        self.commit(scheduler::plan).await?;
        let Some(at) = wake_at_ms else { return Ok(RESYNC) };
        let wait = u64::try_from(at.saturating_sub(self.now_ms())).unwrap_or(0);
        Ok(Duration::from_millis(wait).clamp(SPACING, RESYNC))
    }

    /// One plan from the newest state, committed.
    async fn commit(&self, plan: fn(&View<'_>, i64) -> Plan) -> Result<Option<i64>, Again> {
        let plan = {
            let state = self.replica.state();
            plan(&View::of(&state), self.now_ms())
        };
        self.propose(plan).await
    }

    async fn propose(&self, plan: Plan) -> Result<Option<i64>, Again> {
        for batch in pack(plan.steps) {
            let changes = batch.changes.len();
            let proposed = self
                .proposer
                .controller(self.term, batch.preconditions, batch.changes);
            match proposed.await {
                Ok(outcome) => {
                    self.replica.wait_applied(outcome.index).await;
                    if let Some(rejection) = outcome.rejection {
                        refused(&rejection.detail, rejection.code());
                        return Err(Again);
                    }
                    tracing::debug!(changes, index = outcome.index, "plan committed");
                }
                Err(error) => {
                    not_proposed(&error);
                    return Err(Again);
                }
            }
        }
        Ok(plan.wake_at_ms)
    }

    /// Writes which workers are ready or down.
    async fn judge(&self, liveness: &mut Liveness, frozen: &mut bool) {
        let now = self.clock.monotonic();
        self.signs.feed(liveness, now);
        let alive = self.signs.alive(now);
        let plan = {
            let state = self.replica.state();
            let view = View::nodes_of(&state);
            liveness.retain(|node| {
                let record = view.nodes.get(&node.as_bytes()[..]);
                // A manager that was a standby is judged by Raft.
                let judged = record.is_some_and(|it| it.role() != Role::Manager);
                let down = record.is_some_and(|it| it.status() == NodeStatus::Down);
                judged && (!down || alive.contains(&node))
            });
            let verdict = liveness.verdict(now);
            note_freeze(&verdict, frozen);
            orchestrator::node_status(&view, &alive, &verdict, self.now_ms())
        };
        // What was not committed is found again at the next tick.
        let _again = self.propose(plan).await;
    }

    fn now_ms(&self) -> i64 {
        i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX)
    }
}

fn note_freeze(verdict: &Verdict, frozen: &mut bool) {
    let freezes = matches!(verdict, Verdict::Frozen { .. });
    if freezes && !*frozen {
        let silent: BTreeSet<NodeId> = match verdict {
            Verdict::Frozen { silent, .. } => silent.clone(),
            Verdict::Down(_) => BTreeSet::new(),
        };
        tracing::warn!(
            ?silent,
            "many workers fell silent together; none is called down until they are fewer"
        );
    }
    *frozen = freezes;
}

fn refused(detail: &str, code: RejectionCode) {
    match code {
        // The state moved on between plan and commit, which is what preconditions are for.
        RejectionCode::Stale | RejectionCode::Exists | RejectionCode::NotFound | RejectionCode::Term => {
            tracing::debug!(detail, "a plan was out of date");
        }
        other => tracing::warn!(detail, code = ?other, "a plan was refused"),
    }
}

fn not_proposed(error: &ProposeError) {
    match error {
        ProposeError::Full | ProposeError::TooLarge { .. } => {
            tracing::warn!(%error, "a plan was not proposed")
        }
        ProposeError::NoLeader | ProposeError::TermOver | ProposeError::Busy | ProposeError::Unknown => {
            tracing::debug!(%error, "a plan was not proposed");
        }
    }
}

#[cfg(test)]
mod tests;
