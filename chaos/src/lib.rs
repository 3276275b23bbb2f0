//! Fault injection and checking.
//!
//! [`sim`] is a whole cluster of real replicas, with their real log store, in one thread, where one seed decides every
//! delay, fault and election. [`live`] breaks clusters of real programs, with the same checkers and the same report.

pub mod check;
mod command;
pub mod flood_command;
mod image;
pub mod live;
pub mod live_command;
pub mod partitions_command;
#[cfg(feature = "planted")]
pub mod planted;
pub mod report;
pub mod rules;
mod sandbox;
pub mod sim;
pub mod sim_command;
pub mod wire;
pub mod wire_command;
