//! The replicated store.
//!
//! What stands so far is the state machine, and storage from below: the file-system seam under everything durable with
//! a simulated disk that loses power, the encryption of records at rest, the log and the snapshot file.

pub mod encryption;
pub mod file_system;
pub mod log_store;
mod membership;
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
    Core, Disk, Fatal, Leadership, Members, MembershipError, ProposeError, Raft, ReadError, Reconciled,
    Replica, StartError, Timing,
};
pub use state_machine::{Builder, Snapshot, SnapshotMeta, Snapshots, StateMachine};
pub use type_config::{
    Answer, Command, Entry, LogId, Member, Membership, StoredMembership, TypeConfig, Vote, log_id,
};
