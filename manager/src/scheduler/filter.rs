//! The filters: each says why a node cannot take a task, and all are asked, so that the reader sees every obstacle.

use std::fmt;

use bulkhead_proto::wire;

use super::constraint::{Constraint, Guards};
use super::node_info::NodeInfo;

/// What a task of a service asks of a node.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The service's id.
    pub service: &'a [u8],
    /// The spec that the task is made from.
    pub spec: &'a wire::ServiceSpec,
}

impl<'a> Request<'a> {
    /// What a task of this service asks for.
    pub fn new(service: &'a [u8], spec: &'a wire::ServiceSpec) -> Self {
        Self { service, spec }
    }

    /// Reserved processor time.
    pub fn cpu_millis(&self) -> u64 {
        self.spec
            .reservation
            .as_ref()
            .map_or(0, |reservation| reservation.cpu_millis)
    }

    /// Reserved memory.
    pub fn memory_bytes(&self) -> u64 {
        self.spec
            .reservation
            .as_ref()
            .map_or(0, |reservation| reservation.memory_bytes)
    }

    fn guards(&self) -> Guards {
        if self.spec.secrets.is_empty() {
            Guards::Nothing
        } else {
            Guards::Secret
        }
    }
}

/// Why a node cannot take a task.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// The node is not ready.
    NotReady,
    /// An operator paused the node.
    Paused,
    /// An operator drains the node.
    Draining,
    /// Less processor time is free than reserved.
    Cpu {
        /// Asked for.
        wanted_millis: u64,
        /// There.
        free_millis: u64,
    },
    /// Less memory is free than reserved.
    Memory {
        /// Asked for.
        wanted_bytes: u64,
        /// There.
        free_bytes: u64,
    },
    /// A constraint does not hold.
    Constraint(String),
    /// A constraint on what the node says of itself cannot place a secret.
    SelfReported(String),
    /// Another service has the host port.
    HostPort(u32),
}

impl Refusal {
    /// Whether time or other tasks' end may lift the refusal without a change of the spec or of the node's record.
    pub fn is_passing(&self, capacity: &NodeInfo<'_>) -> bool {
        match self {
            Refusal::NotReady | Refusal::Paused | Refusal::Draining | Refusal::HostPort(_) => true,
            Refusal::Cpu { wanted_millis, .. } => *wanted_millis <= capacity.free_cpu_millis,
            Refusal::Memory { wanted_bytes, .. } => *wanted_bytes <= capacity.free_memory_bytes,
            Refusal::Constraint(_) | Refusal::SelfReported(_) => false,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NotReady => f.write_str("not ready"),
            Refusal::Paused => f.write_str("paused"),
            Refusal::Draining => f.write_str("draining"),
            Refusal::Cpu {
                wanted_millis,
                free_millis,
            } => {
                write!(f, "cpu: {wanted_millis}m wanted, {free_millis}m free")
            }
            Refusal::Memory {
                wanted_bytes,
                free_bytes,
            } => {
                // The wish rounds up and the offer down: a refusal never reads as if it fitted.
                write!(
                    f,
                    "memory: {}MiB wanted, {}MiB free",
                    wanted_bytes.div_ceil(1 << 20),
                    free_bytes >> 20
                )
            }
            Refusal::Constraint(text) => write!(f, "{text} does not hold"),
            Refusal::SelfReported(text) => {
                write!(
                    f,
                    "{text} is the node's own word and cannot place a secret; use node.id or node.labels"
                )
            }
            Refusal::HostPort(port) => write!(f, "host port {port} is taken by another service"),
        }
    }
}

/// Every reason why the node cannot take the task; none: it can.
pub(super) fn refusals(info: &NodeInfo<'_>, request: &Request<'_>) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if info.node.status() != wire::NodeStatus::Ready {
        refusals.push(Refusal::NotReady);
    }
    match info.node.availability() {
        wire::Availability::Active => {}
        // A record without a decision is not one that invites tasks.
        wire::Availability::Unspecified | wire::Availability::Pause => refusals.push(Refusal::Paused),
        wire::Availability::Drain => refusals.push(Refusal::Draining),
    }
    let (wanted_millis, free_millis) = (request.cpu_millis(), info.free_cpu_millis);
    if wanted_millis > free_millis {
        refusals.push(Refusal::Cpu {
            wanted_millis,
            free_millis,
        });
    }
    let (wanted_bytes, free_bytes) = (request.memory_bytes(), info.free_memory_bytes);
    if wanted_bytes > free_bytes {
        refusals.push(Refusal::Memory {
            wanted_bytes,
            free_bytes,
        });
    }
    refusals.extend(
        request
            .spec
            .constraints
            .iter()
            .filter_map(|wire| constraint(wire, info.node, request)),
    );
    let taken = request
        .spec
        .ports
        .iter()
        .filter(|port| info.port_taken(port.host, request.service));
    refusals.extend(taken.map(|port| Refusal::HostPort(port.host)));
    refusals
}

/// Whether the node is one that the constraints allow.
pub(crate) fn satisfies_constraints(node: &wire::Node, request: &Request<'_>) -> bool {
    let mut constraints = request.spec.constraints.iter();
    constraints.all(|wire| constraint(wire, node, request).is_none())
}

fn constraint(wire: &wire::Constraint, node: &wire::Node, request: &Request<'_>) -> Option<Refusal> {
    let constraint = match Constraint::try_from(wire) {
        Ok(constraint) => constraint,
        // A constraint that cannot be read holds nowhere: it was meant to keep the task off some node.
        Err(error) => return Some(Refusal::Constraint(error.to_string())),
    };
    if constraint.holds(node, request.guards()) {
        None
    } else if constraint.holds(node, Guards::Nothing) {
        Some(Refusal::SelfReported(constraint.to_string()))
    } else {
        Some(Refusal::Constraint(constraint.to_string()))
    }
}
