//! `bulkhead-chaos partitions`: how soon a cluster serves again whose network is in parts, and how calm it stays.

use std::io::Write;
use std::time::Duration;

use crate::report::{Verdict, rank};
use crate::sim::Shape;
use crate::sim::partition::{self, Course};
use crate::sim::sweep::sweep;

/// Runs so many seeds of each shape and prints a table.
///
/// # Errors
/// Where `out` cannot be written.
pub fn run(seeds: u64, jobs: Option<usize>, out: &mut impl Write) -> anyhow::Result<Verdict> {
    let jobs = jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    writeln!(
        out,
        "{:<12} {:>9} {:>9} {:>9} {:>9}  {seeds} seeds each; ms to the next acknowledged write",
        "shape", "p50", "p99", "max", "changes"
    )?;
    let mut verdict = Verdict::Pass;
    for shape in Shape::ALL {
        let mut courses: Vec<(u64, Course)> = Vec::new();
        sweep(
            0..seeds,
            jobs,
            |seed| (seed, partition::run(*shape, seed)),
            |course| {
                courses.push(course);
                true
            },
        );
        courses.sort_by_key(|(_, course)| course.first_write.unwrap_or(Duration::MAX));
        let changes = courses.iter().map(|(_, it)| it.leader_changes).max();
        writeln!(
            out,
            "{:<12} {:>9} {:>9} {:>9} {:>9}",
            format!("{shape:?}"),
            at(&courses, 50),
            at(&courses, 99),
            at(&courses, 100),
            changes.unwrap_or_default()
        )?;
        for (seed, course) in courses.iter().filter(|(_, course)| !course.holds()) {
            verdict = Verdict::Violation;
            writeln!(out, "  seed {seed}: {course:?}")?;
        }
    }
    Ok(verdict)
}

/// The time that so many in a hundred do not exceed, in milliseconds.
fn at(sorted: &[(u64, Course)], percent: usize) -> String {
    match sorted
        .get(rank(sorted.len(), percent))
        .and_then(|(_, course)| course.first_write)
    {
        Some(time) => time.as_millis().to_string(),
        None => "never".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_the_smallest_time_that_so_many_do_not_exceed() {
        let course = |ms| Course {
            first_write: ms,
            leader_changes: 0,
            violated: false,
        };
        let mut sorted: Vec<_> = (1..=10_u64)
            .map(|ms| (ms, course(Some(Duration::from_millis(ms)))))
            .collect();
        assert_eq!(
            [50, 99, 100].map(|percent| at(&sorted, percent)),
            ["5", "10", "10"]
        );
        sorted.push((11, course(None)));
        assert_eq!(at(&sorted, 100), "never");
    }
}
