//! What the leader decides about running things: pure state and plans, without a clock of their own.
//!
//! One slot of a service has a chain of attempts, each a task. At most the newest is wanted running, and it is made
//! only when nothing of the one before can be running: it ended, its node is down, or no node ever had it.

mod enforcer;
pub mod liveness;
mod lost;
mod node_status;
mod plan;
pub mod removal;
mod replicated;
mod restart;
pub mod revision;
mod task;
mod update;

#[cfg(test)]
mod tests;

pub use node_status::plan as node_status;
pub use plan::{Plan, Step, Stored};

use crate::scheduler::View;

/// Everything but placement and the nodes' status, as of `now_ms` (milliseconds since 1970).
pub fn plan(view: &View<'_>, now_ms: i64) -> Plan {
    let mut plan = lost::plan(view, now_ms);
    plan.append(replicated::plan(view, now_ms));
    plan
}
