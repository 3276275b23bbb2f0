//! The cluster from this manager alone, when the quorum of its managers is lost for good.
//!
//! First it is only said what that means. Then the member ends, and a new one begins over a store of the next epoch that is
//! made of all that the old store holds: also of what this manager never heard to be committed, since it may have been,
//! and acknowledged. The key file is the turning point: until it is replaced nothing has changed, and afterwards nothing
//! goes back.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_identity::store::KeyFile;
use bulkhead_identity::{UnlockKey, Unswapped};
use bulkhead_proto::wire::{Node, Raised};
use bulkhead_proto::{Code, NodeId};
use bulkhead_raft::log_store::OpenError;
use bulkhead_raft::offline::{Held, OfflineError, Store};
use bulkhead_raft::runtime::Blocking;
use bulkhead_raft::state::State;
use tokio::time::{Instant, sleep};
use tonic::Status;

use super::Program;
use super::init::random;
use super::member::{LOCKED, Machine, Member, UNLOCKED};
use super::offline;
use crate::key_ring::{EnvelopeKey, KeyRing};
use crate::loss::{self, LossError};
use crate::refusal::refuse;
use crate::view;

/// A leader with a quorum that is there is heard within two seconds, elections included.
const SILENCE: Duration = Duration::from_secs(5);

/// What is to be done.
#[derive(Debug)]
pub(super) struct Order {
    /// Nodes and operators that must not come back.
    pub(super) forget: Vec<String>,
    /// Who asked.
    pub(super) actor: String,
}

/// What a recovery would mean, from the state as it is known to be committed.
pub(super) fn preview(member: &Member, order: &Order) -> Result<Raised, Status> {
    // Whom it takes for the leader says nothing: one that lost its quorum goes on naming itself for a while.
    if member.fresh.stale_for() < SILENCE {
        return Err(refuse(
            Code::Unsafe,
            tonic::Code::FailedPrecondition,
            "this manager heard a leader with a quorum a moment ago: nothing is lost",
            "a manager that is gone is replaced: `bulkhead node rm --force` it, and let another one join",
        ));
    }
    let state = member.replica.state();
    let raised = raise(&member.machine, member.node(), &member.key_ring, &state, order);
    raised
        .map(|raised| raised.report)
        .map_err(|error| refused(&error))
}

/// Why nothing is raised, to whoever asked.
pub(super) fn refused(error: &anyhow::Error) -> Status {
    let (code, hint) = match error.downcast_ref::<LossError>() {
        Some(LossError::Unknown(_) | LossError::Kept(_)) => (
            Code::UnknownReference,
            "name nodes and operators as they were listed, or their whole ids",
        ),
        _ => (Code::Internal, "see this manager's log"),
    };
    tracing::error!(error = format!("{error:#}"), "the epoch was not raised");
    refuse(code, tonic::Code::FailedPrecondition, format!("{error:#}"), hint)
}

fn raise(
    machine: &Machine,
    node: NodeId,
    ring: &KeyRing,
    state: &State,
    order: &Order,
) -> anyhow::Result<loss::Raised> {
    let cluster = view::cluster(state).context("this manager has no state of the cluster yet")?;
    let own = view::node(state, node).context("the cluster does not list this manager any more")?;
    anyhow::ensure!(own.quarantined_at == 0, "this manager is in quarantine");
    let newest = ring
        .newest(cluster)
        .context("this manager does not open the key ring: secrets and the root's key would be lost")?;
    let own = Node {
        meta: None,
        envelope_key: ring.public().to_vec(),
        opened_epoch: newest,
        ..own.clone()
    };
    let order = loss::Order {
        keep: Some(node),
        forget: &order.forget,
        key_ring: cluster.key_ring.clone(),
        roots: None,
        now_ms: machine.now_ms(),
        actor: &order.actor,
    };
    loss::raise(state, order, |_| Ok::<_, anyhow::Error>(vec![own]))
}

/// Goes on as a new member, or as the old one where that fails. The old one has ended.
pub(super) async fn carry_out(program: &Arc<Program>, order: Order, lock: Option<&UnlockKey>) {
    if let Err(error) = rebuild(&program.machine, &order, lock).await {
        tracing::error!(
            error = format!("{error:#}"),
            "not recovered; this manager is what it was"
        );
    }
    let resumed = match KeyFile::open(&program.machine.keys(), lock) {
        Ok(keys) => super::go_on_as(program.clone(), keys).await,
        Err(error) => Err(error.into()),
    };
    if let Err(error) = resumed {
        let _ending = program.failed.try_send(error); // a full queue has a reason to end already
    }
}

async fn rebuild(machine: &Machine, order: &Order, lock: Option<&UnlockKey>) -> anyhow::Result<()> {
    let mut keys = KeyFile::open(&machine.keys(), lock)?;
    let node = keys.subject().node;
    let part = keys.manager.as_mut().context("the key file is not a manager's")?;
    let held = read(offline::store(machine, part), machine.blocking).await?;
    let ring = KeyRing::new(
        node,
        EnvelopeKey::from_bytes(part.envelope_key.clone()),
        machine.entropy.clone(),
    );
    let raised = raise(machine, node, &ring, &held.state, order)?;
    let before = part.epoch;
    part.member = raised.member;
    part.epoch = raised.report.epoch;
    part.store = random(&*machine.entropy)?;
    part.data_key = Unswapped::filled(|key| machine.entropy.fill(key))?;
    part.former_data_key = None;
    part.made = true;
    offline::plant(machine, part, node, raised.state).await?;
    keys.managers.clear(); // none of those that it knew is of this epoch
    keys.save(&machine.keys())?;
    tracing::warn!(
        target: "audit",
        actor = order.actor,
        epoch = raised.report.epoch,
        from_index = raised.report.from_index,
        committed = held.committed,
        managers = ?raised.report.managers,
        "the cluster goes on from this manager alone"
    );
    if let Err(error) = machine.remove_store(before) {
        // Its key is gone with the old key file, so nobody reads it.
        tracing::warn!(%error, "the store of the former epoch was not removed");
    }
    Ok(())
}

/// Reads the store of a member that has just ended: readers of its log may hold it for a moment longer.
async fn read(store: Store, blocking: Blocking) -> anyhow::Result<Held> {
    let until = Instant::now() + UNLOCKED;
    loop {
        let store = store.clone();
        match blocking.run(move || Ok(store.read())).await? {
            Err(OfflineError::Open(OpenError::Locked { .. })) if Instant::now() < until => {
                sleep(LOCKED).await;
            }
            read => return Ok(read?),
        }
    }
}
