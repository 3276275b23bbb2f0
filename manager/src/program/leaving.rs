//! How this manager leaves its cluster: the leader lets it go, or says why not.

use std::time::Duration;

use bulkhead_proto::Code;
use bulkhead_proto::wire::LeaveRaftRequest;
use tokio::time::{Instant, sleep};
use tonic::Status;

use super::member::Member;
use crate::refusal::refuse;
use crate::view;

/// A leader that leaves hands over first, and an election may lie between.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(200);

/// Returns once the cluster does not count on this manager any more.
pub(super) async fn leave(member: &Member) -> Result<(), Status> {
    let until = Instant::now() + PATIENCE;
    loop {
        match ask(member).await {
            Ok(()) => return Ok(()),
            // Final: what the leader decided about this manager, not that none could be asked.
            Err(status) if status.code() == tonic::Code::FailedPrecondition => return Err(status),
            Err(status) if Instant::now() >= until => return Err(status),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

async fn ask(member: &Member) -> Result<(), Status> {
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
