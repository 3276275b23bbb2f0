//! The replicated store.
//!
//! From above: [`Replica`], the one handle by which a manager reads the state and proposes changes; [`transport`], which
//! carries consensus between managers; [`state`], the pure state machine. From below: the log and the snapshot file,
//! sealed records, and the file-system seam under everything durable, with a simulated disk that loses power.

pub mod encryption;
pub mod file_system;
pub mod log_store;
mod membership;
pub mod offline;
pub mod planted;
mod replica;
pub mod runtime;
pub use bulkhead_identity::seam;
pub mod snapshot;
pub mod state;
mod state_machine;
#[cfg(test)]
mod testing;
pub mod transport;
mod type_config;

pub use replica::{
    Core, Disk, Fatal, Leadership, Members, MembershipError, Parts, ProposeError, Raft, ReadError,
    Reconciled, Replica, ResealError, StartError, Timing,
};
pub use state_machine::{Builder, Snapshot, SnapshotMeta, Snapshots, StateMachine};
pub use type_config::{
    Answer, Command, Entry, LogId, Member, Membership, StoredMembership, TypeConfig, Vote, log_id,
};
