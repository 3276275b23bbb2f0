//! Which node a task runs on: a pure decision over one snapshot of the state.
//!
//! Every filter that refuses a node says why, and the reasons stay with the task, so "pending" is never a riddle.
//! Nothing here reads a clock, draws a random number or keeps state between passes.

pub mod constraint;
pub mod explain;
mod filter;
mod node_info;
mod placement;

pub use explain::{Explanation, explain};
pub use filter::{Refusal, Request};
pub use node_info::NodeInfo;
pub use placement::{PLACEMENTS_PER_PASS, Plan, plan};

use bulkhead_proto::wire;

/// What the scheduler sees of one snapshot. Every slice must come from the same commit index.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Every node.
    pub nodes: &'a [wire::Node],
    /// Every service.
    pub services: &'a [wire::Service],
    /// Every task.
    pub tasks: &'a [wire::Task],
}

impl std::fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View")
            .field("nodes", &self.nodes.len())
            .field("services", &self.services.len())
            .field("tasks", &self.tasks.len())
            .finish()
    }
}

/// The spec that a task was made from; none if its service or that version is gone.
fn spec_of<'a>(services: &'a [wire::Service], task: &wire::Task) -> Option<&'a wire::ServiceSpec> {
    let service = services.iter().find(|service| service.id == task.service_id)?;
    let version = service
        .versions
        .iter()
        .find(|version| version.number == task.spec_version)?;
    version.spec.as_ref()
}

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
