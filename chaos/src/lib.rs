//! Fault injection and checking.
//!
//! [`sim`] is the first of three levels: a whole cluster of real replicas, with their real log store, in one thread, where
//! one seed decides every delay, fault and election. The live levels come beside it.

pub mod sim;
