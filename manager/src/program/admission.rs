//! The way of a manager with a certificate to a manager that votes: its envelope key, the log, the proof that it opens
//! the key ring. Each step is done again after a crash, and none twice.

use std::time::Duration;

use bulkhead_identity::tls::{self, Expect};
use bulkhead_proto::wire::{
    self, Availability, JoinRaftRequest, Kind, ObjectRef, Precondition, RegisterEnvelopeKeyRequest,
    VersionIs, change, object, peer_client::PeerClient, precondition,
};
use bulkhead_proto::{NodeId, RequestId};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::member::Member;
use crate::{peers, view};

/// Between two looks at how far it came.
const POLL: Duration = Duration::from_millis(50);
/// After nobody could help.
const PAUSE: Duration = Duration::from_millis(300);
/// One call to another manager; catching up with the log may take 10 s of it.
const CALL: Duration = Duration::from_secs(12);

/// Runs until this manager votes.
pub(super) async fn become_voter(member: &Member, stop: &CancellationToken) {
    let walk = async {
        loop {
            match next(member) {
                Step::Done => return,
                Step::Wait => sleep(POLL).await,
                Step::Ask => {
                    if !ask(member).await {
                        sleep(PAUSE).await;
                    }
                }
                Step::Prove { node, epoch } => prove(member, *node, epoch).await,
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = member.left.cancelled() => {}
        () = member.demoted.cancelled() => {}
        () = walk => tracing::info!(raft.member = member.replica.member(), "this manager votes"),
    }
}

enum Step {
    Done,
    /// The others, or the log, are on their way.
    Wait,
    /// Another manager must act: envelopes, or a place in Raft.
    Ask,
    /// The key ring opens here: say so in the log.
    Prove {
        node: Box<wire::Node>,
        epoch: u32,
    },
}

fn next(member: &Member) -> Step {
    let state = member.replica.state();
    let members = member.replica.members();
    let own = member.replica.member();
    let known = members.voters.contains(&own) || members.learners.contains(&own);
    let (Some(cluster), Some(node)) = (view::cluster(&state), view::node(&state, member.node())) else {
        return if known { Step::Wait } else { Step::Ask };
    };
    // On its way out it asks for nothing, whatever it was about when it was told to go.
    if node.availability() == Availability::Drain {
        return Step::Wait;
    }
    if !known || node.envelope_key != member.key_ring.public() {
        return Step::Ask;
    }
    match member.key_ring.newest(cluster) {
        Ok(epoch) if node.opened_epoch < epoch => Step::Prove {
            node: Box::new(node.clone()),
            epoch,
        },
        Ok(_) if members.voters.contains(&own) => Step::Done,
        Ok(_) => Step::Wait,
        Err(error) => {
            tracing::debug!(%error, "the key ring does not open yet");
            Step::Ask
        }
    }
}

/// Asks the managers in turn for envelopes and for a place in Raft; whether one of them gave it.
async fn ask(member: &Member) -> bool {
    for mut client in managers(member) {
        let register = RegisterEnvelopeKeyRequest {
            public_key: member.key_ring.public().to_vec(),
            request_id: random(member),
        };
        let join = JoinRaftRequest {
            member_id: member.replica.member(),
            address: member.advertise.clone(),
        };
        let asked = async {
            client.register_envelope_key(register).await?;
            client.join_raft(join).await
        };
        match timeout(CALL, asked).await {
            Ok(Ok(_)) => return true,
            Ok(Err(status)) => tracing::debug!(%status, "a manager does not let this one in yet"),
            Err(_) => tracing::debug!("a manager takes too long to let this one in"),
        }
    }
    false
}

/// Everyone who may lead: the managers of the key file, and those that the log tells of.
fn managers(member: &Member) -> Vec<PeerClient<Channel>> {
    let members = member.replica.members();
    let own = member.replica.member();
    let from_log = members.nodes.iter().filter(|(id, _)| **id != own);
    let mut addresses: Vec<(NodeId, String)> = from_log
        .map(|(_, known)| (known.node, known.address.clone()))
        .collect();
    let listed = member.keys(|keys| keys.managers.clone());
    for manager in listed {
        if let Ok(node) = NodeId::try_from(manager.node_id.as_slice())
            && node != member.node()
            && !addresses.iter().any(|(known, _)| *known == node)
        {
            addresses.push((node, manager.address));
        }
    }
    addresses
        .into_iter()
        .filter_map(|(node, address)| tls::channel(&member.identity, &address, Expect::Manager(node)).ok())
        .map(peers::client)
        .collect()
}

async fn prove(member: &Member, mut node: wire::Node, epoch: u32) {
    let read = VersionIs {
        object: Some(ObjectRef {
            kind: Kind::Node.into(),
            id: node.id.clone(),
        }),
        version: node.meta.as_ref().map_or(0, |meta| meta.version),
    };
    let precondition = Precondition {
        precondition: Some(precondition::Precondition::VersionIs(read)),
    };
    node.opened_epoch = epoch;
    let object = wire::Object {
        object: Some(object::Object::Node(node)),
    };
    let change = wire::Change {
        change: Some(change::Change::Replace(object)),
    };
    let Ok(request) = RequestId::try_from(random(member).as_slice()) else {
        return;
    };
    let actor = format!("manager/{}", member.node());
    let proposed = member
        .proposer
        .client(&actor, request, vec![precondition], vec![change])
        .await;
    if let Err(error) = proposed {
        tracing::debug!(%error, "the proof of the key ring is tried again");
        sleep(PAUSE).await;
    }
}

/// A request id; an empty one, which is refused, where the system gives no random bytes.
fn random(member: &Member) -> Vec<u8> {
    let mut bytes = [0; 16];
    match member.machine.entropy.fill(&mut bytes) {
        Ok(()) => bytes.to_vec(),
        Err(_) => Vec::new(),
    }
}
