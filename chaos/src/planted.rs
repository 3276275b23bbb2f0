//! `bulkhead-chaos planted`: switches one bug on after the other, and counts the seeds that it takes to find it.

use std::io::Write;

use bulkhead_raft::planted::{Bug, plant};

use crate::report::Verdict;
use crate::sim::sweep::sweep;
use crate::sim::{Plan, rotation, run as simulate};
use crate::sim_command::shortest;

/// Workers, where there are any.
const WORKERS: u64 = 4;
/// Rotations of a seed.
const ROTATIONS: u64 = 4;

/// Where tasks are planned wrongly there have to be some.
fn plan(bug: Bug, seed: u64) -> Plan {
    Plan {
        workers: if bug.is_of_tasks() { WORKERS } else { 0 },
        ..Plan::of(seed)
    }
}

/// Looks for each bug with at most so many seeds; of a single one it shows the shortest run that finds it.
///
/// # Errors
/// Where `out` cannot be written.
pub fn run(bugs: &[Bug], seeds: u64, jobs: usize, out: &mut impl Write) -> anyhow::Result<Verdict> {
    // What panics is looked for; each would else print a backtrace.
    std::panic::set_hook(Box::new(|_| {}));
    let mut taken = Vec::new();
    let mut missed = 0;
    for bug in bugs {
        plant(Some(*bug));
        let (mut first, mut rule) = (None, None);
        let course = |seed| match bug.is_of_rotation() {
            true => rotation::run(seed, ROTATIONS).0,
            false => simulate(plan(*bug, seed)),
        };
        sweep(0..seeds, jobs, course, |report| {
            let found = report.violations.first();
            if let Some(violation) = found
                && first.is_none_or(|seed| report.seed < seed)
            {
                (first, rule) = (Some(report.seed), Some(violation.rule));
            }
            found.is_none()
        });
        if let (Some(seed), [_], false) = (first, bugs, bug.is_of_rotation()) {
            shortest(plan(*bug, seed), out)?;
        }
        plant(None);
        match (first, rule) {
            (Some(seed), Some(rule)) => {
                taken.push(seed + 1);
                writeln!(
                    out,
                    "{:<28} found by seed {seed}: {}",
                    format!("{bug:?}"),
                    rule.says()
                )?;
            }
            _ => {
                missed += 1;
                writeln!(out, "{:<28} NOT FOUND by {seeds} seeds", format!("{bug:?}"))?;
            }
        }
    }
    taken.sort_unstable();
    if let (Some(median), Some(most)) = (taken.get(taken.len() / 2), taken.last()) {
        writeln!(
            out,
            "{} of {} found; seeds it took: median {median}, most {most}",
            taken.len(),
            bugs.len()
        )?;
    }
    Ok(if missed == 0 {
        Verdict::Pass
    } else {
        Verdict::Violation
    })
}
