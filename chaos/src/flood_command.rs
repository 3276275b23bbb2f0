//! `bulkhead-chaos flood`: whether a cluster stands as many writes as the processors can do.

use std::io::Write;
use std::time::Duration;

use crate::report::{Verdict, rank};
use crate::sim::flood;

/// Floods a cluster and prints what came of it.
///
/// # Errors
/// Where `out` cannot be written.
pub fn run(minutes: f64, snapshot_every: u64, out: &mut impl Write) -> anyhow::Result<Verdict> {
    let course = flood::run(Duration::from_secs_f64(minutes * 60.0), snapshot_every);
    let seconds = course.took.as_secs_f64();
    writeln!(
        out,
        "{} writes of 1 KiB acknowledged in {seconds:.0} s, {:.0}/s; {} not",
        course.latencies.len(),
        course.latencies.len() as f64 / seconds,
        course.failed
    )?;
    let [p50, p99, most] = [50, 99, 100].map(|percent| {
        let time = course.latencies.get(rank(course.latencies.len(), percent));
        Duration::from_micros(time.copied().unwrap_or_default().into())
    });
    writeln!(out, "p50 {p50:.0?}, p99 {p99:.0?}, most {most:.0?}")?;
    writeln!(
        out,
        "{} snapshots, {} leader changes",
        course.snapshots, course.leader_changes
    )?;
    for violation in &course.violations {
        writeln!(out, "VIOLATION {violation}")?;
    }
    let calm = course.violations.is_empty() && course.leader_changes == 0;
    Ok(match (calm, course.latencies.is_empty()) {
        (false, _) => Verdict::Violation,
        (true, true) => Verdict::Coverage,
        (true, false) => Verdict::Pass,
    })
}
