//! End-to-end tests with real programs: see `tests/`; `probe` is the workload that they run.
//!
//! What is here is what those tests share: a cluster of their own, waiting for a condition, looking for what is left.

#![allow(
    clippy::disallowed_methods,
    reason = "tests drive real programs: no simulation reads their clock or environment"
)]

mod answer;
mod follow;
mod lab;
mod left;
mod place;
mod spawned;
mod wait;

pub use answer::Answer;
pub use bulkhead_lab::scan::{Finding, Needles, files_below, memory_of};
pub use follow::Follow;
pub use lab::{Lab, get, programs, text};
pub use place::{Place, installed, may_run};
pub use spawned::Spawned;
pub use wait::{PATIENCE, eventually, within};
