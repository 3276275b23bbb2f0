//! Fault injection and checking.
//!
//! [`sim`] is the first of three levels: a whole cluster of real replicas, with their real log store, in one thread, where
//! one seed decides every delay, fault and election. The live levels come beside it.

pub mod check;
#[cfg(feature = "planted")]
pub mod planted;
pub mod report;
pub mod rules;
pub mod sim;
pub mod sim_command;
