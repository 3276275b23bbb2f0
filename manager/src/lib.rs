//! The manager: what decides about nodes, services and secrets from the replicated state.

pub mod audit;
pub mod authz;
pub mod backup;
pub mod ca;
pub mod control_api;
pub mod dispatcher;
pub mod freshness;
pub mod key_ring;
pub mod leader;
pub mod lock;
pub mod loss;
pub mod membership;
pub mod orchestrator;
pub mod peer;
pub mod peers;
pub mod program;
pub mod proposer;
pub mod refusal;
pub mod registry;
pub mod scheduler;
#[cfg(test)]
mod testing;
pub mod validate;
pub mod view;

pub use freshness::{Fresh, Freshness};
pub use peers::Peers;
pub use proposer::Proposer;
