//! The Raft log on disk. What stands so far is its frame.

pub mod frame;
