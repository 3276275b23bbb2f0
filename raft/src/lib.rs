//! The replicated store.
//!
//! What stands so far is the file-system seam under everything durable, with a simulated disk that loses power.

pub mod file_system;
