//! Who waits with a ticket that asks for approval: shown, and judged.

use bulkhead_identity::csr;
use bulkhead_proto::Code;
use bulkhead_proto::wire::{
    Cluster, JudgeWaiting, Node, RemoveRequest, Ticket, Waiting, WaitingNode, change::Change as Step,
};
use bulkhead_raft::state::State;
use data_encoding::HEXLOWER;
use tonic::Status;

use super::change::{Decision, Plan};
use super::object::{NODES, TICKETS, id_text};
use crate::ca::{Ca, Validity, admission, signing_refused};
use crate::refusal::{internal, refuse};

/// All who wait now. Those whose ticket ended wait no more.
pub(super) fn all(state: &State, now_ms: i64) -> Vec<WaitingNode> {
    waiting(state)
        .filter(|(ticket, _)| ticket.expires_at > now_ms)
        .map(|(ticket, who)| WaitingNode {
            who: Some(who.clone()),
            role: ticket.role,
            ticket_id: ticket.id.clone(),
            until: ticket.expires_at,
        })
        .collect()
}

/// Makes a node of who waits.
pub(super) async fn approve(
    state: &State,
    cluster: &Cluster,
    request: &RemoveRequest,
    ca: &Ca,
    now_ms: i64,
) -> Result<Decision, Status> {
    let (ticket, who) = match find(state, &request.selector)? {
        Found::Waits(ticket, who) => (ticket, who),
        Found::Node(node) => return Ok(Decision::done(node)),
    };
    let new = admission::approve(state, ticket, who, now_ms).map_err(|it| {
        refuse(
            it.code(),
            tonic::Code::FailedPrecondition,
            it.to_string(),
            it.hint(),
        )
    })?;
    let key =
        csr::public_key(&who.csr).map_err(|error| internal("holds a bad certificate request", &error))?;
    let validity = Validity::of_role(new.role, cluster, now_ms);
    let signed = ca
        .issue(cluster, new.node, new.role, &key, validity)
        .await
        .map_err(|error| signing_refused("cannot sign certificates", &error))?;
    // No certificate of a root is committed after that root was dropped.
    let mut plan = Plan::about(&who.node_id)
        .unless_changed(ticket)
        .unless_changed(cluster);
    plan.changes = new.changes(signed, now_ms);
    Ok(plan.into())
}

/// Ends the wait; the key never joins with this ticket.
pub(super) fn reject(state: &State, request: &RemoveRequest) -> Result<Decision, Status> {
    let (ticket, who) = match find(state, &request.selector)? {
        Found::Waits(ticket, who) => (ticket, who),
        Found::Node(node) => {
            return Err(refuse(
                Code::Invalid,
                tonic::Code::FailedPrecondition,
                format!("{} is a node already", node.name),
                format!("`bulkhead node rm {}` removes it", node.name),
            ));
        }
    };
    let judgement = Step::JudgeWaiting(JudgeWaiting {
        ticket_id: ticket.id.clone(),
        key_id: who.key_id.clone(),
        admit: false,
    });
    Ok(Plan::about(&who.node_id).with(judgement).into())
}

enum Found<'a> {
    Waits(&'a Ticket, &'a Waiting),
    /// Nobody waits under this name, and a node has it: it was approved before.
    Node(&'a Node),
}

/// The one who is meant: by name, by the start of the id, or by the start of the key's fingerprint.
fn find<'a>(state: &'a State, selector: &str) -> Result<Found<'a>, Status> {
    let by_name = |who: &Waiting| who.name == selector;
    let by_start = |who: &Waiting| {
        let starts = |text: String| !selector.is_empty() && text.starts_with(selector);
        starts(id_text(&who.node_id)) || starts(HEXLOWER.encode(&who.key_id))
    };
    let mut found: Vec<(&Ticket, &Waiting)> = waiting(state).filter(|(_, who)| by_name(who)).collect();
    if found.is_empty() {
        found = waiting(state).filter(|(_, who)| by_start(who)).collect();
    }
    match found[..] {
        [(ticket, who)] => Ok(Found::Waits(ticket, who)),
        [] => match NODES.find(state, selector) {
            Ok(node) => Ok(Found::Node(node)),
            Err(_) => Err(refuse(
                Code::NotFound,
                tonic::Code::NotFound,
                format!("nobody waits for approval as '{selector}'"),
                "`bulkhead node ls --filter state=waiting` shows who does",
            )),
        },
        [..] => Err(refuse(
            Code::Ambiguous,
            tonic::Code::FailedPrecondition,
            format!("{} wait under '{selector}'", found.len()),
            "give the start of the id or of the key's fingerprint: `bulkhead node ls --filter state=waiting`",
        )),
    }
}

fn waiting(state: &State) -> impl Iterator<Item = (&Ticket, &Waiting)> {
    TICKETS
        .all(state)
        .flat_map(|ticket| ticket.waiting.iter().map(move |who| (ticket, who)))
}
