//! Which node a task runs on: a pure decision over one snapshot of the state.
//!
//! Every filter that refuses a node says why, and the reasons stay with the task, so "pending" is never a riddle.
//! Nothing here reads a clock, draws a random number or keeps state between passes.

pub mod constraint;
pub mod explain;
mod filter;
mod node_info;
mod placement;
mod view;

pub use explain::{Explanation, explain};
pub use filter::{Refusal, Request};
pub use node_info::NodeInfo;
pub use placement::{PLACEMENTS_PER_PASS, plan};
pub use view::View;

pub(crate) use filter::satisfies_constraints;

use bulkhead_proto::wire;

/// Whether the task still holds what it reserved. Being asked to stop frees nothing: the process is still there.
fn holds_resources(task: &wire::Task) -> bool {
    state(task) < wire::TaskState::Complete as i32
}

/// A task without a status is as new as can be.
fn state(task: &wire::Task) -> i32 {
    task.status
        .as_ref()
        .map_or(wire::TaskState::Pending as i32, |status| status.state)
}

#[cfg(test)]
mod tests;
