//! The types that consensus is instantiated with. A log entry is opaque bytes here: relays and the log store never
//! look inside, so an entry's encoding is the proposer's, on every replica.

use std::fmt;

use bulkhead_proto::wire::Outcome;
use bytes::Bytes;
use openraft::impls::leader_id_std;

use crate::runtime::Runtime;

openraft::declare_raft_types!(
    /// Consensus as this cluster runs it: one leader in a term, entries as bytes, our own runtime.
    pub TypeConfig:
        D = Command,
        R = Answer,
        NodeId = u64,
        Node = Member,
        Term = u64,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
        AsyncRuntime = Runtime,
);

/// A vote: term, member, and whether a quorum granted it.
pub type Vote = openraft::Vote<leader_id_std::LeaderId<u64, u64>>;
/// Term and index of an entry.
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
/// One entry of the log.
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
/// Voters and learners.
pub type Membership = openraft::Membership<u64, Member>;
/// A membership and the entry that set it.
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;

/// The id of an entry.
pub fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(term.into(), index)
}

/// The encoded bytes of one `wire::Transaction`. They may hold sealed secrets, so they do not print.
#[derive(Clone, PartialEq, Eq)]
pub struct Command(pub Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Command({} bytes)", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What applying an entry answered. An entry without a transaction answers its index and no rejection.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer(pub Outcome);

/// How a Raft member is reached: its node (whose certificate it must show) and its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The manager node, as 16 id bytes.
    pub node: bulkhead_proto::NodeId,
    /// `host:port` of its listener.
    pub address: String,
}
