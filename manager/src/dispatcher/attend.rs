//! A standby's sign of life. It is told what is public between nodes, and what its node is to become; nothing of the
//! state is for it.

use bulkhead_identity::bundle::ROOTS;
use bulkhead_proto::KeyId;
use bulkhead_proto::wire::{
    AttendRequest, AttendResponse, Change, Node, Role, change::Change as Step, object::Object as Any,
};
use tonic::Status;

use super::Desk;
use crate::authz::{Principal, stale};
use crate::ca::renewal::unchanged;
use crate::ca::{clone, manager_addresses, trust};
use crate::view;

/// Answers a standby, and keeps what it says of its roots.
pub(super) fn attend(
    desk: &Desk,
    caller: &Principal,
    request: AttendRequest,
) -> Result<AttendResponse, Status> {
    let (subject, key) = caller.node_and_key()?;
    let state = desk.replica.state();
    let (Some(node), Some(cluster)) = (view::node(&state, subject.node), view::cluster(&state)) else {
        return Err(stale());
    };
    // A manager on its way asks what it is by now: it stands by once its store is gone, and then says what it trusts.
    let stands_by = node.role() == Role::Standby && !request.trusts.is_empty();
    if stands_by {
        desk.signs.heard(subject.node, desk.clock.monotonic());
    }
    let mut trusts = request.trusts;
    trusts.retain(|id| KeyId::try_from(id.as_slice()).is_ok());
    trusts.truncate(ROOTS);
    let used = caller.certificate.as_ref();
    let mut new = Node {
        trusts,
        issuer: used.map_or_else(Vec::new, |it| trust::used(cluster, it)),
        ..node.clone()
    };
    clone::seen(&mut new, key, desk.now_ms());
    // A manager that is to be demoted speaks for its roots itself.
    if stands_by && new != *node {
        keep(desk, caller, node, new);
    }
    Ok(AttendResponse {
        role: node.role,
        wanted_role: node.wanted_role,
        managers: manager_addresses(&state),
        roots: trust::roots(cluster),
        issuer: trust::key_id(trust::issuer(cluster).root).map_or_else(|_| Vec::new(), KeyId::to_wire),
        index: state.index(),
    })
}

/// Beside the answer, which does not depend on it; what fails is tried again with the next sign of life.
fn keep(desk: &Desk, caller: &Principal, old: &Node, new: Node) {
    let Some(request) = desk.request_id() else {
        return;
    };
    let conditions = vec![unchanged(old)];
    let change = Change {
        change: Some(Step::Replace(view::object(Any::Node(new)))),
    };
    let (proposer, actor) = (desk.proposer.clone(), caller.actor.clone());
    tokio::spawn(async move {
        if let Err(error) = proposer.client(&actor, request, conditions, vec![change]).await {
            tracing::debug!(%error, "what a standby trusts is not kept yet");
        }
    });
}
