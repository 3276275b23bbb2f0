//! The `bulkhead` command: what an operator types, and what it answers.
//!
//! Results go to stdout, everything else to stderr; the exit code says how it ended ([`Exit`]) and each refusal
//! carries a stable code ([`Code`]). What decides is pure and tested without a cluster.

pub mod command;
pub mod image;

mod field;
mod quantity;
mod refusal;

pub use field::{constraint, environment_entry, environment_file, label, object_name, published_port, tmpfs};
pub use quantity::{cpus, duration, size};
pub use refusal::{Code, Exit, Refusal};
