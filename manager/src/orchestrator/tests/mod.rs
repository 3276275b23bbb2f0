//! The plans against the real state machine: what they commit is applied, and every rule of `apply` holds for it.

mod cases;
mod converge;
mod world;
