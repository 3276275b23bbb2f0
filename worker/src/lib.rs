//! The worker: takes the tasks that managers assign to this node, has the launcher run them, and reports.
//!
//! It speaks to the network and has no privilege; whatever needs root is a request to `bulkhead-launcher`
//! ([`bulkhead_launcher::message`]). What decides is pure ([`agent::plan`], [`task`]); the rest carries it out.

pub mod agent;
pub mod config;
pub mod description;
pub mod image;
pub mod keep;
pub mod local;
pub mod logs;
pub mod member;
pub mod program;
pub mod proxy;
pub mod records;
pub mod renewal;
pub mod runtime;
pub mod secrets;
pub mod session;
pub mod task;
mod trust;
