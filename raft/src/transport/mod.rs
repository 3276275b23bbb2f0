//! Consensus over gRPC: what the other members are asked ([`Network`]) and answered ([`RaftService`]).
//!
//! Each message names cluster, epoch, sender and receiver; the receiver refuses what is not its own, and a sender that
//! the caller's certificate does not speak for. A leader or candidate named inside must be the sender, too.

mod in_flight;
mod message;
mod network;
mod service;
#[cfg(test)]
mod tests;
pub mod votes;
mod witness;

use std::time::Duration;

use bulkhead_proto::ClusterId;
use bulkhead_proto::wire::RaftMessage;
use openraft::raft::AppendEntriesRequest;

use crate::TypeConfig;

pub use in_flight::InFlight;
pub use network::{Dial, DialError, Network};
pub use service::{BindPeer, RaftService};
pub use witness::{RolledBack, Witness};

#[doc(hidden)]
pub use message::{read_every_message, some_of_each_message};

/// An append without an answer for this long ends its stream. Several disk flushes; longer only hides a dead peer.
const APPEND_WAIT: Duration = Duration::from_secs(2);
/// A snapshot whose next chunk does not come, or is not taken, for this long is given up.
const CHUNK_WAIT: Duration = Duration::from_secs(10);
/// Bytes of a snapshot in all: what a manager may have to hold decoded.
const SNAPSHOT_BYTES: usize = 1 << 30;

/// Whether the entries of an append follow each other, from the one that it names as theirs before.
///
/// Consensus trusts its leader in that. It must not: openraft 0.10.0-alpha.37 may go on with a stream of entries that it had given
/// up for a snapshot, and what was purged meanwhile is missing in it. What refuses such an append fails the stream, and
/// the leader decides anew what to send; a replica that takes it has a hole in its log.
pub fn is_gapless(append: &AppendEntriesRequest<TypeConfig>) -> bool {
    // It comes from outside: no index is followed by one that there is not.
    let after = |last: u64| last.checked_add(1);
    let mut next = append.prev_log_id.map_or(Some(0), |prev| after(prev.index));
    append.entries.iter().all(|entry| {
        let index = entry.log_id.index;
        let expected = std::mem::replace(&mut next, after(index));
        expected == Some(index)
    })
}

/// Whose messages these are. The same on every message of one connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Binding {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its epoch: raised by restore and recover, so that replicas of before are not listened to.
    pub epoch: u64,
    /// This member.
    pub member: u64,
}

impl Binding {
    fn seal(&self, to: u64, payload: Vec<u8>, witness: &Witness) -> RaftMessage {
        let mut message = RaftMessage {
            payload: payload.into(),
            cluster_id: self.cluster.to_wire(),
            epoch: self.epoch,
            from: self.member,
            to,
            ..RaftMessage::default()
        };
        witness.tell(&mut message);
        message
    }

    /// Whether a message is of this cluster and epoch, and to this member.
    fn accepts(&self, message: &RaftMessage) -> bool {
        message.cluster_id == self.cluster.as_bytes()
            && message.epoch == self.epoch
            && message.to == self.member
    }
}
