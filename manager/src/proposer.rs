//! How transactions reach the log: a client's from any manager, whole, through whoever leads; a controller's only from
//! the leader of the term that it planned in.
//!
//! A `Proposer` cannot read the state, as a view cannot write it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_proto::wire::{Change, ForwardResponse, Outcome, Precondition, Transaction};
use bulkhead_proto::{RequestId, limits};
use bulkhead_raft::{self as raft, Replica};
use bytes::Bytes;
use futures::future::BoxFuture;
use prost::Message as _;
use tokio::time::{Instant, sleep, timeout};

/// A client's transaction waits this long for a manager to lead. An election takes a third of a second; longer than
/// this, a caller is better told.
const LEADER_WAIT: Duration = Duration::from_secs(5);
/// Between looks for a leader that nobody announced.
const LEADER_POLL: Duration = Duration::from_millis(20);
/// A forwarded transaction is answered within this time, or its outcome is unknown.
const FORWARD_WAIT: Duration = Duration::from_secs(10);
/// After a commit the local replica is waited for this long, so that the caller reads what it wrote.
const APPLY_WAIT: Duration = Duration::from_secs(2);

/// Takes a transaction to another manager.
pub trait Forward: Send + Sync + 'static {
    /// Hands the bytes to that member, which proposes them if it leads.
    fn forward(
        &self,
        member: u64,
        transaction: Bytes,
    ) -> BoxFuture<'_, Result<ForwardResponse, ForwardError>>;
}

/// Why a transaction was not taken by another manager.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// The connection was never made: nothing was proposed.
    #[error("the manager was not reached")]
    NotSent,
    /// The other manager said why it proposed nothing.
    #[error(transparent)]
    Refused(raft::ProposeError),
    /// It broke after the transaction was sent.
    #[error("the outcome is unknown")]
    Unknown,
}

/// Why a transaction has no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// No manager leads: there is no quorum, or an election takes too long. Nothing was proposed.
    #[error("no manager leads")]
    NoLeader,
    /// This manager does not lead in the term of the plan any more. Nothing was proposed.
    #[error("the term of the plan is over")]
    TermOver,
    /// Too many proposals are under way; nothing was proposed.
    #[error("too many proposals are under way")]
    Busy,
    /// The leader's disk is at its reserve; nothing was proposed.
    #[error("the leader's disk is full")]
    Full,
    /// Larger than any transaction; nothing was proposed.
    #[error("a transaction has at most {limit} bytes, this one has {bytes}", limit = limits::TRANSACTION_BYTES)]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// It may or may not be committed: ask again with the same request id.
    #[error("the outcome is unknown")]
    Unknown,
}

/// A handle that can only write. Clones share everything.
#[derive(Clone)]
pub struct Proposer(Arc<Inner>);

struct Inner {
    replica: Replica,
    forward: Arc<dyn Forward>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    /// The principal of this manager's own controllers.
    controller: String,
}

impl fmt::Debug for Proposer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proposer")
            .field("controller", &self.0.controller)
            .finish_non_exhaustive()
    }
}

impl Proposer {
    /// Proposes to this replica, or through `forward` to another. `controller` is the principal of what this manager
    /// changes by itself: `manager/<node id>`.
    pub fn new(
        replica: Replica,
        forward: Arc<dyn Forward>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        controller: String,
    ) -> Self {
        Proposer(Arc::new(Inner {
            replica,
            forward,
            clock,
            entropy,
            controller,
        }))
    }

    /// Proposes what a client asked for, here or at whoever leads, and returns once this replica shows it. A
    /// transaction that apply refused is an outcome with its rejection.
    ///
    /// # Errors
    /// [`ProposeError`]; after `Unknown` the same `request` may be tried again.
    pub async fn client(
        &self,
        actor: &str,
        request: RequestId,
        preconditions: Vec<Precondition>,
        changes: Vec<Change>,
    ) -> Result<Outcome, ProposeError> {
        let transaction = self.encode(actor, request.to_wire(), 0, preconditions, changes)?;
        let outcome = self.place(transaction).await?;
        let applied = self.0.replica.wait_applied(outcome.index);
        // A replica that lags that far shows an older state; the answer still says which commit it is about.
        let _late = timeout(APPLY_WAIT, applied).await;
        Ok(outcome)
    }

    /// Proposes what a controller of this manager planned in `term`, which it must still lead.
    ///
    /// # Errors
    /// [`ProposeError`]; plan again from the state of then.
    pub async fn controller(
        &self,
        term: u64,
        preconditions: Vec<Precondition>,
        changes: Vec<Change>,
    ) -> Result<Outcome, ProposeError> {
        if self.0.replica.leadership().borrow().leading != Some(term) {
            return Err(ProposeError::TermOver);
        }
        let mut request = [0; 16];
        self.0
            .entropy
            .fill(&mut request)
            .map_err(|_| ProposeError::Busy)?; // no randomness now: plan again later
        let transaction = self.encode(&self.0.controller, request.to_vec(), term, preconditions, changes)?;
        match self.0.replica.propose(transaction).await {
            Err(raft::ProposeError::NotLeader { .. }) => Err(ProposeError::TermOver),
            other => other.map_err(refused),
        }
    }

    /// Proposes another manager's forwarded transaction here, or says who leads.
    ///
    /// # Errors
    /// As [`Replica::propose`].
    pub async fn forwarded(&self, transaction: Bytes) -> Result<Outcome, raft::ProposeError> {
        self.0.replica.propose(transaction).await
    }

    fn encode(
        &self,
        actor: &str,
        request_id: Vec<u8>,
        term: u64,
        preconditions: Vec<Precondition>,
        changes: Vec<Change>,
    ) -> Result<Bytes, ProposeError> {
        let transaction = Transaction {
            level: raft::state::LEVEL,
            request_id,
            actor: actor.to_owned(),
            at: i64::try_from(self.0.clock.wall_millis()).unwrap_or(i64::MAX),
            proposer: self.0.replica.member(),
            preconditions,
            changes,
            term,
        };
        let bytes = transaction.encoded_len();
        if bytes > limits::TRANSACTION_BYTES {
            return Err(ProposeError::TooLarge { bytes });
        }
        Ok(transaction.encode_to_vec().into())
    }

    /// Tries whoever leads until the transaction was taken once. Only what was certainly not proposed is tried again
    /// here: whether to repeat the rest is for the client, which knows what it asked for.
    async fn place(&self, transaction: Bytes) -> Result<Outcome, ProposeError> {
        let own = self.0.replica.member();
        let until = Instant::now() + LEADER_WAIT;
        let mut hint = None;
        loop {
            let leader = hint.take().or(self.0.replica.leadership().borrow().leader);
            match leader {
                Some(leader) if leader == own => match self.0.replica.propose(transaction.clone()).await {
                    Err(raft::ProposeError::NotLeader { leader }) => {
                        hint = leader.filter(|leader| *leader != own)
                    }
                    other => return other.map_err(refused),
                },
                Some(leader) => {
                    let forward = self.0.forward.forward(leader, transaction.clone());
                    match timeout(FORWARD_WAIT, forward).await {
                        Ok(Ok(ForwardResponse {
                            outcome: Some(outcome),
                            ..
                        })) => return Ok(outcome),
                        Ok(Ok(ForwardResponse {
                            outcome: None,
                            leader: other,
                        })) => {
                            hint = Some(other).filter(|other| *other != 0 && *other != leader);
                        }
                        Ok(Err(ForwardError::NotSent)) => {}
                        Ok(Err(ForwardError::Refused(error))) => return Err(refused(error)),
                        Ok(Err(ForwardError::Unknown)) | Err(_) => return Err(ProposeError::Unknown),
                    }
                }
                None => {}
            }
            if Instant::now() >= until {
                return Err(ProposeError::NoLeader);
            }
            if hint.is_none() {
                sleep(LEADER_POLL).await;
            }
        }
    }
}

fn refused(error: raft::ProposeError) -> ProposeError {
    match error {
        raft::ProposeError::NotLeader { .. } => ProposeError::NoLeader,
        raft::ProposeError::Busy => ProposeError::Busy,
        raft::ProposeError::Full => ProposeError::Full,
        raft::ProposeError::TooLarge { bytes } => ProposeError::TooLarge { bytes },
        raft::ProposeError::Unknown | raft::ProposeError::Stopped => ProposeError::Unknown,
    }
}
