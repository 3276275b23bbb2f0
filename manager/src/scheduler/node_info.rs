//! What a node still has to give, counted from the tasks that hold something on it.

use std::collections::BTreeMap;

use bulkhead_proto::wire;

use super::{Request, View, holds_resources, state};

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
    /// Recent ends of each service's tasks that were none of the cluster's asking.
    failures: BTreeMap<&'a [u8], usize>,
}

/// So many recent failures of a service on a node make every other node that fits the better one: it may be the
/// node. Fewer are more likely the program's own.
const FAILURES: usize = 3;
/// Failures older than this say nothing any more, in milliseconds.
const RECENT_MS: i64 = 300_000;

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
            failures: BTreeMap::new(),
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

    /// Counts what failed lately on which worker.
    pub fn note_failures(infos: &mut BTreeMap<&'a [u8], Self>, view: &View<'a>, now_ms: i64) {
        for &task in &view.tasks {
            let failed = [wire::TaskState::Failed, wire::TaskState::Rejected]
                .iter()
                .any(|failed| state(task) == *failed as i32);
            let at = task.meta.as_ref().map_or(0, |meta| meta.updated_at);
            if failed
                && now_ms.saturating_sub(at) < RECENT_MS
                && let Some(info) = infos.get_mut(&task.node_id[..])
            {
                *info.failures.entry(&task.service_id).or_default() += 1;
            }
        }
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

    /// Less is better: a node where the service keeps failing comes last; then its replicas are spread, then the
    /// load, then a tie that every leader breaks alike.
    pub fn rank(&self, service: &[u8]) -> (bool, usize, usize, &'a [u8]) {
        (
            self.failures.get(service).is_some_and(|count| *count >= FAILURES),
            self.per_service.get(service).copied().unwrap_or(0),
            self.tasks,
            &self.node.id,
        )
    }
}
