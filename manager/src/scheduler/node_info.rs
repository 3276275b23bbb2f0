//! What a node still has to give, counted from the tasks that hold something on it.

use std::collections::BTreeMap;

use bulkhead_proto::wire;

use super::{Request, View, holds_resources};

/// A node and what its tasks left of it.
#[derive(Debug, Clone)]
pub struct NodeInfo<'a> {
    /// The node.
    pub node: &'a wire::Node,
    /// Unreserved processor time.
    pub free_cpu_millis: u64,
    /// Unreserved memory.
    pub free_memory_bytes: u64,
    ports: BTreeMap<u32, BTreeMap<&'a [u8], usize>>,
    per_service: BTreeMap<&'a [u8], usize>,
    tasks: usize,
}

impl<'a> NodeInfo<'a> {
    /// The node with nothing on it.
    pub fn empty(node: &'a wire::Node) -> Self {
        let said = node.description.as_ref();
        Self {
            node,
            free_cpu_millis: said.map_or(0, |said| said.cpu_millis),
            free_memory_bytes: said.map_or(0, |said| said.memory_bytes),
            ports: BTreeMap::new(),
            per_service: BTreeMap::new(),
            tasks: 0,
        }
    }

    /// Every worker of the view with what its tasks hold, by id. Managers run no tasks.
    pub fn of_workers(view: &View<'a>) -> BTreeMap<&'a [u8], Self> {
        let mut infos: BTreeMap<&[u8], Self> = view
            .nodes
            .values()
            .filter(|node| node.role() == wire::Role::Worker)
            .map(|node| (&node.id[..], Self::empty(node)))
            .collect();
        for &task in view.tasks.iter().filter(|task| holds_resources(task)) {
            if let Some(info) = infos.get_mut(&task.node_id[..])
                && let Some(spec) = view.spec_of(task)
            {
                info.add(&Request::new(&task.service_id, spec));
            }
        }
        infos
    }

    /// Counts one task more. A node that shrank below what it gave has nothing free, not less than nothing.
    pub fn add(&mut self, request: &Request<'a>) {
        self.free_cpu_millis = self.free_cpu_millis.saturating_sub(request.cpu_millis());
        self.free_memory_bytes = self.free_memory_bytes.saturating_sub(request.memory_bytes());
        for port in &request.spec.ports {
            *self
                .ports
                .entry(port.host)
                .or_default()
                .entry(request.service)
                .or_default() += 1;
        }
        *self.per_service.entry(request.service).or_default() += 1;
        self.tasks += 1;
    }

    /// Whether another service than this one has the host port.
    pub fn port_taken(&self, port: u32, service: &[u8]) -> bool {
        self.ports
            .get(&port)
            .is_some_and(|holders| holders.keys().any(|holder| *holder != service))
    }

    /// Less is better: first spread a service's own replicas, then the load, then a tie that every leader breaks alike.
    pub fn rank(&self, service: &[u8]) -> (usize, usize, &'a [u8]) {
        (
            self.per_service.get(service).copied().unwrap_or(0),
            self.tasks,
            &self.node.id,
        )
    }
}
