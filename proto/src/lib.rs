//! Wire types, ids, limits and the caller table: the words that every program of the cluster shares.
//!
//! Nothing here opens a socket, reads a clock or spawns a task, so each crate may depend on it.

pub mod audit;
pub mod code;
mod digest_of_state;
pub mod ids;
pub mod limits;
pub mod method;
pub mod wire;

pub use code::{CODE_KEY, Code, Exit, HINT_KEY};
pub use digest_of_state::StateDigest;
pub use ids::{
    ClusterId, Digest, ImageId, KeyId, MemberId, NodeId, RequestId, Role, SecretId, ServiceId, Slot,
    SpecVersion, TaskId, TicketId, Version,
};
pub use method::{Caller, Method, Standing};
