//! Clusters of real programs: in network namespaces of this machine, in containers, or made by somebody else.
//!
//! The same faults, clients, rules and report for all of them. What is done to a cluster is drawn from a seed
//! ([`Plan`]) or written in a scenario; when exactly it happens is the machine's.

mod campaign;
mod cluster;
mod compose;
mod dev;
mod driver;
mod fault;
mod journal;
mod judge;
mod links;
mod load;
mod plan;
mod proxy;
mod record;
mod report;
mod scenario;
mod watch;

pub use campaign::{Campaign, Clients, Image, Service, run};
pub use cluster::Ground;
pub use fault::{Fault, Strike, Target, must_be_there};
pub use journal::{FOLDER, clean_up};
pub use plan::Plan;
pub use scenario::{Expect, Scenario, ScenarioError};

fn micros(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
