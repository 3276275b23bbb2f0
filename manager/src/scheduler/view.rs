//! One snapshot of the state as the deciding code reads it.

use std::collections::BTreeMap;

use bulkhead_proto::{limits, wire};
use bulkhead_raft::state::State;

/// Nodes, services and tasks of one commit index, borrowed. Every decision of a pass sees this one world.
#[derive(Clone, Default)]
pub struct View<'a> {
    /// Every node, by id.
    pub nodes: BTreeMap<&'a [u8], &'a wire::Node>,
    /// Every service, by id.
    pub services: BTreeMap<&'a [u8], &'a wire::Service>,
    /// Every task, by id.
    pub tasks: Vec<&'a wire::Task>,
    /// The commit index.
    pub index: u64,
    /// Ended tasks to keep for each slot.
    pub history: usize,
}

impl<'a> View<'a> {
    /// The view of a state.
    pub fn of(state: &'a State) -> Self {
        let mut view = Self {
            index: state.index(),
            history: limits::TASK_HISTORY,
            ..Self::default()
        };
        let kinds = [
            wire::Kind::Cluster,
            wire::Kind::Node,
            wire::Kind::Service,
            wire::Kind::Task,
        ];
        for object in kinds.into_iter().flat_map(|kind| state.list(kind)) {
            match &object.object {
                Some(wire::object::Object::Cluster(cluster)) => {
                    let asked = cluster.settings.as_ref().map_or(0, |it| it.task_history);
                    if asked > 0 {
                        view.history = usize::try_from(asked).unwrap_or(usize::MAX);
                    }
                }
                Some(wire::object::Object::Node(node)) => {
                    view.nodes.insert(&node.id, node);
                }
                Some(wire::object::Object::Service(service)) => {
                    view.services.insert(&service.id, service);
                }
                Some(wire::object::Object::Task(task)) => view.tasks.push(task),
                _ => {}
            }
        }
        view
    }

    /// The nodes only, where nothing else is looked at.
    pub fn nodes_of(state: &'a State) -> Self {
        let mut view = Self {
            index: state.index(),
            ..Self::default()
        };
        for object in state.list(wire::Kind::Node) {
            if let Some(wire::object::Object::Node(node)) = &object.object {
                view.nodes.insert(&node.id, node);
            }
        }
        view
    }

    /// The spec that a task was made from; none if that version is gone.
    pub fn spec_of(&self, task: &wire::Task) -> Option<&'a wire::ServiceSpec> {
        let service = self.services.get(&task.service_id[..])?;
        let version = service
            .versions
            .iter()
            .find(|version| version.number == task.spec_version)?;
        version.spec.as_ref()
    }
}

impl std::fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("View")
            .field("index", &self.index)
            .field("nodes", &self.nodes.len())
            .field("services", &self.services.len())
            .field("tasks", &self.tasks.len())
            .finish()
    }
}
