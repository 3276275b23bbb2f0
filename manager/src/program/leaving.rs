//! How this manager leaves its cluster: the leader lets it go, or says why not.

use std::time::Duration;

use bulkhead_proto::Code;
use bulkhead_proto::wire::{LeaveRaftRequest, ReadIndexRequest};
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use super::member::Member;
use crate::refusal::refuse;
use crate::view;

/// A leader that leaves hands over first, and an election may lie between.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(100);

/// Returns once the cluster does not count on this manager any more: until it is out of Raft, a majority may need it to
/// let it go.
pub(super) async fn leave(member: &Member) -> Result<(), Status> {
    let until = Instant::now() + PATIENCE;
    loop {
        match ask(member).await {
            Ok(()) => return gone(member, until).await,
            // Final: what the leader decided about this manager, not that none could be asked.
            Err(status) if status.code() == tonic::Code::FailedPrecondition => return Err(status),
            Err(status) if Instant::now() >= until => return Err(status),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Waits until another manager refuses this one's key: its record is removed last of all.
async fn gone(member: &Member, until: Instant) -> Result<(), Status> {
    let own = member.replica.member();
    while Instant::now() < until {
        let others: Vec<u64> = member.replica.members().nodes.into_keys().collect();
        for other in others.into_iter().filter(|id| *id != own) {
            let now = member.machine.now_ms();
            let Some(mut client) = member.peers.client(other) else {
                continue;
            };
            let asked = timeout(PAUSE * 5, client.read_index(ReadIndexRequest { now })).await;
            if matches!(asked, Ok(Err(status)) if status.code() == tonic::Code::PermissionDenied) {
                return Ok(());
            }
        }
        sleep(PAUSE).await;
    }
    Err(refuse(
        Code::NotReady,
        tonic::Code::Unavailable,
        "the other managers have not taken it out of the quorum yet",
        "try again in a moment; `bulkhead cluster status` shows who votes",
    ))
}

/// Asks the leader once.
pub(super) async fn ask(member: &Member) -> Result<(), Status> {
    let leader = member.replica.leadership().borrow().leader;
    let no_leader = || {
        refuse(
            Code::NoQuorum,
            tonic::Code::Unavailable,
            "no manager leads",
            "a majority of the managers must run: `bulkhead cluster status`",
        )
    };
    let leader = leader.ok_or_else(no_leader)?;
    if leader == member.replica.member() {
        let state = member.replica.state();
        let node = view::node(&state, member.node()).cloned().ok_or_else(no_leader)?;
        member.gate.leave(&node).await?;
    } else {
        let mut client = member.peers.client(leader).ok_or_else(no_leader)?;
        let member_id = member.replica.member();
        client.leave_raft(LeaveRaftRequest { member_id }).await?;
    }
    Ok(())
}
