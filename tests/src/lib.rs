//! End-to-end tests with real programs: see `tests/`; `probe` is the workload that they run.
