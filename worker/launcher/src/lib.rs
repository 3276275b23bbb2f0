//! The launcher: the only part of a worker node that is root.
//!
//! It unpacks layers, builds sandboxes and starts tasks for a worker that has no privilege.
//! It speaks no network protocol, has no async runtime, and names everything by id
//! ([`message`]).

pub mod connection;
pub mod message;
