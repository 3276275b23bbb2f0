//! Operators' certificates, issued by an operator to another.

use std::time::Duration;

use bulkhead_identity::csr::{self, PublicKey};
use bulkhead_proto::wire::{Cluster, EnrolResponse, IssueOperatorRequest, Node};
use bulkhead_proto::{Code, NodeId, Role, limits};
use bulkhead_raft::state::State;
use tonic::Status;

use super::change::{Decision, Plan, new_id};
use super::check;
use super::object::{Kept, get};
use crate::ca::{self, Ca, Validity, genesis};
use crate::refusal::refuse;

/// The key that a certificate is asked for.
pub(super) fn key(request: &IssueOperatorRequest) -> Result<PublicKey, Status> {
    csr::public_key(&request.csr).map_err(|error| {
        refuse(
            Code::BadCertificateRequest,
            tonic::Code::InvalidArgument,
            format!("the certificate request is refused: {error}"),
            "send a PKCS#10 request with a P-256 key and nothing else",
        )
    })
}

/// The record of a new operator with its certificate.
pub(super) async fn issue(
    state: &State,
    request: &IssueOperatorRequest,
    key: &PublicKey,
    cluster: &Cluster,
    ca: &Ca,
    now_ms: i64,
) -> Result<Decision, Status> {
    let id = new_id(&request.node_id)?;
    if let Some(made) = get::<Node>(state, &id).filter(|it| it.was_made_by(&request.request_id)) {
        return Ok(Decision::done(made));
    }
    check::name(&request.name)?;
    let longest = limits::NODE_CERTIFICATE_VALIDITY;
    let validity = match request.validity_ms {
        0 => limits::OPERATOR_CERTIFICATE_VALIDITY,
        asked => Duration::from_millis(asked),
    };
    if validity > longest {
        let days = longest.as_secs() / 86_400;
        return Err(check::over(
            "validity",
            &format!("a certificate is valid for at most {days} days"),
        ));
    }
    let node = NodeId::from_bytes(id);
    let signed = ca
        .issue(
            cluster,
            node,
            Role::Operator,
            key,
            Validity::from_now(now_ms, validity),
        )
        .await
        .map_err(|error| ca::signing_refused("cannot sign certificates", &error))?;
    let record = genesis::record(node, Role::Operator, request.name.clone(), signed, now_ms);
    // No certificate of a root is committed after that root was dropped.
    Ok(Plan::about(&id).unless_changed(cluster).create(record).into())
}

/// The certificate as it was committed, which is the only one that counts.
pub(super) fn hand_out(state: &State, id: &[u8], key: &PublicKey) -> Result<EnrolResponse, Status> {
    let cluster = crate::view::cluster(state);
    let node = get::<Node>(state, id);
    let signed = node.and_then(|node| node.keys.iter().find(|it| it.key_id == key.key_id().as_bytes()));
    let (Some(cluster), Some(node), Some(signed)) = (cluster, node, signed) else {
        return Err(refuse(
            Code::Conflict,
            tonic::Code::Aborted,
            "the operator's record is another's, or not yet known to this manager",
            "send the request again; if it stays so, issue a certificate under a new id",
        ));
    };
    Ok(EnrolResponse {
        certificate: signed.certificate.clone(),
        roots: ca::roots(cluster),
        chain: ca::trust::chain(cluster),
        cluster_id: cluster.id.clone(),
        node_id: node.id.clone(),
        role: node.role,
        managers: ca::manager_addresses(state),
        epoch: cluster.epoch,
        index: state.index(),
        name: node.name().to_owned(),
        ..Default::default()
    })
}
