//! The loop that keeps a replica fresh, and the handle by which the rest of a manager asks.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_proto::wire::ReadIndexRequest;
use bulkhead_proto::{Code, limits};
use bulkhead_raft::Replica;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::clocks::is_off;
use super::{Clocks, Freshness};
use crate::peers::Peers;
use crate::refusal;

/// An answer that takes longer keeps nothing fresh: it counts from when the question was sent.
const ANSWER_WAIT: Duration = super::FRESH_FOR;

/// Between two questions while nobody leads.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// Whether this manager's replica may decide now. Clones ask the same replica.
#[derive(Debug, Clone)]
pub struct Fresh {
    state: Arc<Mutex<Freshness>>,
    replica: Replica,
    clock: Arc<dyn Clock>,
    clocks: Arc<Clocks>,
    dropped: Arc<Notify>,
}

impl Fresh {
    /// A replica that is stale until [`Fresh::follow`] heard from a leader.
    pub fn new(replica: Replica, clock: Arc<dyn Clock>) -> Self {
        Fresh {
            state: Arc::default(),
            replica,
            clock,
            clocks: Arc::default(),
            dropped: Arc::default(),
        }
    }

    /// Resolves once the leader answered that the root of this manager's certificate was rotated away. Of one waiter.
    pub async fn root_dropped(&self) {
        self.dropped.notified().await;
    }

    /// Whether the replica may decide now.
    pub fn is_fresh(&self) -> bool {
        let now = self.clock.monotonic();
        let mut state = self.lock();
        state.applied(self.replica.index());
        state.is_fresh(now)
    }

    /// For how long freshness has been over; zero while it lasts, and the age of the program before it ever began.
    pub fn stale_for(&self) -> Duration {
        let now = self.clock.monotonic();
        let mut state = self.lock();
        state.applied(self.replica.index());
        now.saturating_sub(state.fresh_until().unwrap_or_default())
    }

    /// How long the cluster decided nothing that this manager heard of, before a moment ago or until now; for ever where it
    /// has just begun to hear.
    pub fn silence(&self) -> Duration {
        let now = self.clock.monotonic();
        let mut state = self.lock();
        state.applied(self.replica.index());
        state.silence(now)
    }

    /// Whether this manager leads with a clock that is off the others': then it judges no expiry while it hands over.
    pub fn clock_is_off(&self) -> bool {
        is_off(self.clocks.own_ahead_ms(self.clock.monotonic()))
    }

    /// What is known of the nodes' clocks.
    pub fn clocks(&self) -> &Clocks {
        &self.clocks
    }

    /// Asks for one read index now and waits until it is applied: afterwards the replica shows whatever was committed
    /// before the call. `false` where nobody could say in time.
    pub async fn catch_up(&self, peers: &Peers) -> bool {
        let asked = async {
            let (index, _) = self.read_index(peers).await?;
            self.replica.wait_applied(index).await;
            Some(())
        };
        matches!(timeout(ANSWER_WAIT, asked).await, Ok(Some(())))
    }

    /// As [`Fresh::catch_up`], and asks again where nobody leads for a moment: an election takes less than the wait.
    pub async fn see_latest(&self, peers: &Peers) -> bool {
        let end = Instant::now() + ANSWER_WAIT;
        while !self.catch_up(peers).await {
            if Instant::now() + ASK_AGAIN >= end {
                return false;
            }
            sleep(ASK_AGAIN).await;
        }
        true
    }

    /// Asks whoever leads, again and again, until stopped.
    pub async fn follow(self, peers: Peers, stop: CancellationToken) {
        let mut ticks = interval(limits::FRESHNESS_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        // Questions overlap: one slow answer must not hold up the next question.
        let mut questions = JoinSet::new();
        loop {
            // Cancel-safe: a tick or an ended question that is not taken now is taken next time.
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(_) = questions.join_next() => {}
                _ = ticks.tick() => {
                    let (fresh, peers) = (self.clone(), peers.clone());
                    questions.spawn(async move { fresh.ask(&peers).await });
                }
            }
        }
    }

    async fn ask(&self, peers: &Peers) {
        let sent_at = self.clock.monotonic();
        if let Ok(Some((index, ahead_ms))) = timeout(ANSWER_WAIT, self.read_index(peers)).await {
            if is_off(ahead_ms) {
                // It decides nothing until its clock is right: what is expired would be good here, or the other way round.
                if self.clocks.complains(sent_at) {
                    tracing::error!(
                        ahead_ms,
                        "this manager's clock is off the others': it serves nobody; set its clock"
                    );
                }
                return;
            }
            self.answered(sent_at, index);
        }
    }

    /// The leader answered a question that was sent at this time, by this manager's monotonic clock, with this read index.
    pub fn answered(&self, sent_at: Duration, index: u64) {
        let mut state = self.lock();
        state.answered(sent_at, index);
        state.applied(self.replica.index());
    }

    /// The index that a read must have applied, and how far a follower's clock is ahead of the managers' median. A leader
    /// hands over, and answers the others until one of them leads: a cluster that stops would help nobody.
    async fn read_index(&self, peers: &Peers) -> Option<(u64, i64)> {
        let leader = self.replica.leadership().borrow().leader?;
        if leader == self.replica.member() {
            let index = self.replica.read_index().await.ok()?;
            return Some((index, 0));
        }
        let now = i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX);
        match peers.client(leader)?.read_index(ReadIndexRequest { now }).await {
            Ok(answer) => Some((answer.get_ref().index, answer.get_ref().ahead_ms)),
            Err(status) => {
                if refusal::code(&status) == Some(Code::NotReady) {
                    self.dropped.notify_one();
                }
                None
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Freshness> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
