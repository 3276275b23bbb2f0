//! Who may call what: the decision ([`decide`](decide())), and the layer that asks it before any service sees a request.

mod decide;
mod guard;
mod layer;
mod listing;
mod right;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;

use bulkhead_identity::{Certificate, Peer, Subject};
use bulkhead_proto::{Caller, Code, KeyId, Role};
use tonic::Status;

pub use decide::{Decision, KeyState, ReplicaAge, decide};
pub use layer::AuthzLayer;
pub use listing::Listing;

use crate::refusal::refuse;

/// Who calls, as a service finds it in the extensions of a request that the layer let through.
#[derive(Debug, Clone)]
pub struct Principal {
    /// Its class.
    pub caller: Caller,
    /// The certificate's subject; none for local and anonymous callers.
    pub subject: Option<Subject>,
    /// The key that it proved.
    pub key_id: Option<KeyId>,
    /// The certificate that it proved it with.
    pub certificate: Option<Arc<Certificate>>,
    /// As the log writes it: `operator/<id>`, `worker/<id>`, `manager/<id>`, `local/<uid>`, `anonymous`.
    pub actor: String,
    /// Where it connected from; none on the local socket.
    pub address: Option<SocketAddr>,
    /// When it connected, milliseconds since 1970 by this manager's clock.
    pub opened_ms: i64,
}

impl Principal {
    fn new(peer: &Peer, address: Option<SocketAddr>, opened_ms: i64) -> Self {
        let (caller, subject, key_id, actor) = match peer {
            Peer::Anonymous => (Caller::Anonymous, None, None, "anonymous".to_owned()),
            Peer::Local { uid } => (Caller::Local, None, None, format!("local/{uid}")),
            Peer::Node(certificate) => {
                let subject = certificate.subject();
                let caller = match subject.role {
                    Role::Manager => Caller::Manager,
                    Role::Worker => Caller::Worker,
                    Role::Operator => Caller::Operator,
                    Role::Standby => Caller::Standby,
                };
                let actor = format!("{}/{}", subject.role, subject.node);
                (caller, Some(subject), Some(certificate.key_id()), actor)
            }
        };
        let certificate = match peer {
            Peer::Node(certificate) => Some(certificate.clone()),
            Peer::Anonymous | Peer::Local { .. } => None,
        };
        Self {
            caller,
            subject,
            key_id,
            certificate,
            actor,
            address,
            opened_ms,
        }
    }

    /// The principal of a request.
    ///
    /// # Errors
    /// Where no layer put one there: then nobody decided about this call, and it must not be served.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        let found = request.extensions().get::<Self>().cloned();
        found.ok_or_else(|| {
            tracing::error!("a request came past the authorisation layer");
            refuse(
                Code::Internal,
                tonic::Code::Internal,
                "this call was not authorised",
                "see this manager's log",
            )
        })
    }

    /// The node that calls and the key that it proved.
    ///
    /// # Errors
    /// Where the caller has no certificate.
    pub fn node_and_key(&self) -> Result<(Subject, KeyId), Status> {
        match (self.subject, self.key_id) {
            (Some(subject), Some(key)) => Ok((subject, key)),
            _ => Err(denied(self.caller)),
        }
    }
}

/// The caller's certificate is of a root that was rotated away: its holder has a newer one, or gets it.
pub(crate) fn rotated() -> Status {
    refuse(
        Code::NotReady,
        tonic::Code::Unavailable,
        "the root of this connection's certificate was rotated away",
        "connect again with the newest certificate",
    )
}

/// This replica could decide when the call began and cannot now: what it changed is not known to its caller.
pub(crate) fn lost_touch() -> Status {
    refuse(
        Code::OutcomeUnknown,
        tonic::Code::Unavailable,
        "this manager lost touch with the cluster while it served this call",
        "try another manager; `bulkhead cluster status` shows who is up",
    )
}

/// The caller's right ended while it was served, and what it is told no more may have been done.
pub(crate) fn withheld(reason: &Status) -> Status {
    refuse(
        Code::OutcomeUnknown,
        tonic::Code::Unavailable,
        reason.message(),
        "connect again, and ask with the same request id or look whether it was made",
    )
}

/// This replica cannot decide now; nothing was done. Another may, and callers try again.
pub(crate) fn stale() -> Status {
    refuse(
        Code::NoQuorum,
        tonic::Code::Unavailable,
        "this manager cannot tell now what the cluster has decided: it hears no leader with a quorum",
        "try another manager, or `bulkhead cluster status`",
    )
}

pub(crate) fn denied(caller: Caller) -> Status {
    refuse(
        Code::Denied,
        tonic::Code::PermissionDenied,
        format!("{caller} callers may not call this method"),
        "use a context of an operator; see `bulkhead context ls`",
    )
}

/// No list of the cluster has the caller's key: it was removed or put into quarantine, or is of a cluster before a restore.
pub(crate) fn unlisted(caller: Caller) -> Status {
    refuse(
        Code::UnknownCaller,
        tonic::Code::PermissionDenied,
        format!("the cluster does not list this {caller}'s key: it was removed, or has never joined"),
        "use a context whose certificate the cluster lists (`bulkhead context ls`); a node joins again with a ticket",
    )
}
