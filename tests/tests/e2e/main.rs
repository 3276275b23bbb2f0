//! End-to-end tests: each sees a thing happen with the real programs, in a cluster of `bulkhead dev`.
//!
//! One program, so that it links once and its clusters take turns.

#![allow(
    clippy::disallowed_methods,
    reason = "tests drive real programs: no simulation reads their clock or environment"
)]

mod audit;
mod canary;
mod chaos;
mod clone;
mod crash;
mod damage;
mod documents;
mod external_signer;
mod foreign_image;
mod lock;
mod loss;
mod openssl;
mod operations;
mod refusals;
mod roles;
mod rotation;
mod tickets;
mod wire;
