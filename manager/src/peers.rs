//! The other managers: one connection to each, over mutual TLS, for everything that managers say to each other.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_identity::DialError;
use bulkhead_identity::Identity;
use bulkhead_identity::tls::{self, Expect};
use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::{ForwardRequest, ForwardResponse};
use bulkhead_proto::{Code, MemberId, limits};
use bulkhead_raft::transport::{self, Dial};
use bulkhead_raft::{Member, ProposeError, Replica};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tonic::transport::Channel;

use crate::proposer::{Forward, ForwardError};
use crate::{refusal, registry};

/// Connections by member. A member whose address changed gets a new one, and everyone does when this node's credentials
/// changed; the exact node id is checked at connect, so an address that another machine took over leads nowhere.
#[derive(Clone)]
pub struct Dialer {
    identity: Identity,
    channels: Arc<Mutex<HashMap<u64, Known>>>,
}

/// The member as it was dialled, with which credentials, and the connection.
type Known = (Member, u64, Channel);

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer(…)")
    }
}

impl Dialer {
    /// Connects as this identity.
    pub fn new(identity: Identity) -> Self {
        Dialer {
            identity,
            channels: Arc::default(),
        }
    }

    /// The connection to a member; made when first used.
    ///
    /// # Errors
    /// [`DialError`] where the address is none.
    pub fn to(&self, id: u64, member: &Member) -> Result<Channel, DialError> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let credentials = *self.identity.changed().borrow();
        if let Some((known, of, channel)) = channels.get(&id)
            && (known, *of) == (member, credentials)
        {
            return Ok(channel.clone());
        }
        let channel = tls::channel(&self.identity, &member.address, Expect::Manager(member.node))?;
        channels.insert(id, (member.clone(), credentials, channel.clone()));
        Ok(channel)
    }
}

impl Dial for Dialer {
    fn channel(&self, id: u64, member: &Member) -> Result<Channel, transport::DialError> {
        self.to(id, member)
            .map_err(|error| transport::DialError(error.to_string()))
    }
}

/// The other members of this manager's cluster.
#[derive(Debug, Clone)]
pub struct Peers {
    replica: Replica,
    dialer: Dialer,
}

impl Peers {
    /// The members that this replica knows.
    pub fn new(replica: Replica, dialer: Dialer) -> Self {
        Peers { replica, dialer }
    }

    /// A client of one member, if it is one.
    pub fn client(&self, member: u64) -> Option<PeerClient<Channel>> {
        let members = self.replica.members();
        let channel = self.dialer.to(member, members.nodes.get(&member)?).ok()?;
        Some(client(channel))
    }
}

impl registry::Peers for Peers {
    fn others(&self) -> Vec<(MemberId, Channel)> {
        let own = self.replica.member();
        let members = self.replica.members();
        let others = members.nodes.iter().filter(|(id, _)| **id != own);
        others
            .filter_map(|(id, member)| Some((MemberId(*id), self.dialer.to(*id, member).ok()?)))
            .collect()
    }
}

/// The service that managers offer each other, with this project's bounds on a message.
pub fn client(channel: Channel) -> PeerClient<Channel> {
    PeerClient::new(channel)
        .max_decoding_message_size(limits::MESSAGE_BYTES)
        .max_encoding_message_size(limits::MESSAGE_BYTES)
}

impl Forward for Peers {
    fn forward(
        &self,
        member: u64,
        transaction: Bytes,
    ) -> BoxFuture<'_, Result<ForwardResponse, ForwardError>> {
        async move {
            let mut client = self.client(member).ok_or(ForwardError::NotSent)?;
            match client.forward(ForwardRequest { transaction }).await {
                Ok(response) => Ok(response.into_inner()),
                Err(status) => Err(forward_error(&status)),
            }
        }
        .boxed()
    }
}

/// What a failed call says about whether the transaction was proposed. In doubt it is unknown.
fn forward_error(status: &tonic::Status) -> ForwardError {
    match refusal::code(status) {
        Some(Code::Busy) => return ForwardError::Refused(ProposeError::Busy),
        Some(Code::StorageFull) => return ForwardError::Refused(ProposeError::Full),
        // Refused before the method ran: the other replica is stale or does not know this manager yet.
        // Or this manager's clock is wrong: nothing of it is taken until it is set.
        Some(Code::NoQuorum | Code::UnknownCaller | Code::ClockSkew) => return ForwardError::NotSent,
        _ => {}
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return ForwardError::NotSent;
        }
        cause = error.source();
    }
    ForwardError::Unknown
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::CODE_KEY;

    use super::*;

    #[test]
    fn only_what_was_certainly_not_proposed_may_be_tried_again() {
        let coded = |code: Code| {
            let mut status = tonic::Status::unavailable("");
            let value = code.as_str().parse().expect("a code is ASCII");
            status.metadata_mut().insert(CODE_KEY, value);
            status
        };
        let check = |status, expected| assert_eq!(forward_error(&status), expected, "{status:?}");
        check(coded(Code::Busy), ForwardError::Refused(ProposeError::Busy));
        check(coded(Code::NoQuorum), ForwardError::NotSent);
        check(coded(Code::ClockSkew), ForwardError::NotSent);
        check(coded(Code::OutcomeUnknown), ForwardError::Unknown);
        check(tonic::Status::unavailable("broken pipe"), ForwardError::Unknown);
        check(tonic::Status::deadline_exceeded(""), ForwardError::Unknown);
        let connect = tonic::ConnectError(std::io::Error::from(std::io::ErrorKind::ConnectionRefused).into());
        check(tonic::Status::from_error(connect.into()), ForwardError::NotSent);
    }
}
