//! The `bulkhead` command: what an operator types, and what it answers.
//!
//! Results go to stdout, everything else to stderr; the exit code says how it ended ([`Exit`]) and each refusal
//! carries a stable code ([`Code`]). What decides is pure and tested without a cluster.

pub mod command;
pub mod environment;
pub mod image;
#[doc(hidden)]
pub mod quantity;
pub mod scrub;

mod app;
mod audit;
mod cluster;
mod connection;
mod context;
mod context_verb;
mod dev;
mod events;
mod explain;
mod field;
mod follow;
mod health;
mod key;
mod new_file;
mod node;
mod operator;
mod output;
mod refusal;
mod secret;
mod service;
mod task;
mod wait;

pub use refusal::{Code, Exit, Refusal};
