//! End-to-end tests with real programs. None stands here yet; `tests/probe` is the workload that they will run, and
//! `worker/launcher/tests` already runs it through the real launcher.
