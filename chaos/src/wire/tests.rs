//! Runs of many seeds.

use super::{Plan, run};
use crate::sim::Counts;
use crate::sim::sweep::sweep;

/// Seeds of an ordinary test run; `BULKHEAD_WIRE_SEEDS=from..to` runs others.
const SEEDS: u64 = 40;

#[expect(
    clippy::disallowed_methods,
    reason = "the one setting of a test run, read by the test alone"
)]
fn seeds() -> std::ops::Range<u64> {
    let asked = std::env::var("BULKHEAD_WIRE_SEEDS").ok();
    match asked.as_deref().and_then(|range| range.split_once("..")) {
        Some((from, to)) => from.parse().expect("a number")..to.parse().expect("a number"),
        None => 0..SEEDS,
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let runs = [run(Plan::small(7)), run(Plan::small(7))];
    let [one, other] = runs.each_ref().map(|report| &report.digest);
    assert_eq!(one, other);
    assert_ne!(one, &run(Plan::small(8)).digest);
}

#[test]
fn no_seed_of_whole_programs_breaks_a_rule() {
    let seeds = seeds();
    let runs = seeds.end - seeds.start;
    let (mut total, mut failures) = (Counts::default(), Vec::new());
    let jobs = std::thread::available_parallelism().map_or(2, usize::from).min(4);
    sweep(
        seeds,
        jobs,
        |seed| run(Plan::small(seed)),
        |report| {
            total.add(&report.counts);
            if !report.violations.is_empty() {
                eprintln!("{}", report.explain());
                failures.push(report.seed);
            }
            true
        },
    );
    assert!(failures.is_empty(), "seeds failed: {failures:?}");
    println!("{total:?}");
    for (what, count, least) in [
        ("acknowledged writes", total.accepted, 5 * runs),
        ("reads", total.reads, 5 * runs),
        ("conditional writes", total.swaps, runs),
        ("operations in an order that fits", total.checked, 5 * runs),
        ("kills", total.kills, runs / 2),
        ("power losses", total.power_losses, runs / 2),
        ("partitions", total.partitions, runs),
        ("terms", total.terms, runs),
        ("rotations of the root", total.rotations, runs / 4),
    ] {
        assert!(count >= least, "{what}: {count}, wanted {least}");
    }
}

/// 3021: a leader went on with a stream of entries that it had purged. 3034: a manager that missed a rotation led with its old
/// certificate. 3816: a worker's session was opened with the certificate before the one that came meanwhile, and stayed so.
#[test]
fn seeds_that_found_something_hold() {
    for seed in [3_021, 3_034, 3_816] {
        let report = run(Plan::of(seed));
        assert_eq!(report.violations, [], "{}", report.explain());
    }
}
