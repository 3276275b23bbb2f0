//! Fault injection and checking. Nothing stands here yet; the simulated disk that it will build on is
//! `bulkhead_raft::file_system::SimFileSystem`.
