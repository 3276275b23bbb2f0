//! What the leader decides about running things: pure state and plans, without a clock of their own.

pub mod liveness;
