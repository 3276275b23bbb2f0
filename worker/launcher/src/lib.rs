//! The launcher: the only part of a worker node that is root.
//!
//! It unpacks layers, builds sandboxes and starts tasks for a worker that has no privilege.
//! It speaks no network protocol, has no async runtime, and names everything by id
//! ([`message`]). The worker uses [`message`], [`connection`] and [`log_file`]; the rest is
//! the program's.

pub mod connection;
pub mod log_file;
pub mod message;

#[doc(hidden)]
pub mod forget;
#[doc(hidden)]
pub mod launcher;
#[doc(hidden)]
pub mod supervisor;
#[doc(hidden)]
pub mod unpack;
#[doc(hidden)]
pub mod worker_process;

mod clock;
mod id_range;
mod layers;
mod node;
mod profile;
mod reconcile;
mod sandbox;
mod server;
mod spec;
mod tasks;

#[doc(hidden)]
pub use sandbox::sys::take_channel;
