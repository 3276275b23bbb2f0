//! Runs of many seeds, and the rules of the record itself.

use std::sync::Mutex;
use std::time::Duration;

use super::sweep::{coverage, sweep};
use super::{Counts, Plan, Shape, flood, partition, rotation, run};
use crate::report::Covered;

/// Seeds of an ordinary test run; `BULKHEAD_SEEDS=from..to` runs others.
const SEEDS: u64 = 300;

#[expect(
    clippy::disallowed_methods,
    reason = "the one setting of a test run, read by the test alone"
)]
fn seeds() -> std::ops::Range<u64> {
    let asked = std::env::var("BULKHEAD_SEEDS").ok();
    match asked.as_deref().and_then(|range| range.split_once("..")) {
        Some((from, to)) => from.parse().expect("a number")..to.parse().expect("a number"),
        None => 0..SEEDS,
    }
}

#[test]
fn no_seed_breaks_a_rule_and_together_they_try_every_fault() {
    let seeds = seeds();
    let runs = seeds.end - seeds.start;
    let (mut total, mut failures) = (Counts::default(), Vec::new());
    let jobs = std::thread::available_parallelism().map_or(2, usize::from).min(4);
    sweep(
        seeds,
        jobs,
        |seed| run(Plan::of(seed)),
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
    for Covered { what, count, least } in coverage(&total, runs, false) {
        assert!(count >= least, "{what}: {count}, wanted {least}");
    }
}

/// Seeds of an ordinary test run with workers.
const FLEETS: u64 = 16;

#[test]
fn what_was_asked_for_runs_on_the_workers_whatever_breaks() {
    let (mut total, mut failures) = (Counts::default(), Vec::new());
    sweep(
        0..FLEETS,
        std::thread::available_parallelism().map_or(2, usize::from).min(4),
        |seed| run(with_workers(seed)),
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
    assert_eq!(total.settled, FLEETS);
    assert!(total.worker_faults > FLEETS, "{total:?}");
}

/// Each found a bug, which is said in docs/reliability.md.
#[test]
fn seeds_that_found_something_hold() {
    let plan = Plan {
        members: 5,
        workers: 20,
        clients: 8,
        ..Plan::of(246)
    };
    let report = run(plan);
    assert!(report.violations.is_empty(), "{}", report.explain());
}

/// One of eight has as many nodes as a small site.
fn with_workers(seed: u64) -> Plan {
    let (members, workers) = if seed.is_multiple_of(8) { (5, 20) } else { (3, 4) };
    Plan {
        members,
        workers,
        ..Plan::of(seed)
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let every = |plan| Plan {
        every_message: true,
        ..plan
    };
    let plans = [1, 2, 3]
        .map(Plan::of)
        .into_iter()
        .chain([1, 2].map(with_workers));
    for plan in plans {
        let seed = plan.seed;
        let (one, other) = (run(every(plan.clone())), run(every(plan)));
        let differs = one
            .lines
            .iter()
            .zip(&other.lines)
            .position(|(one, other)| one != other);
        assert_eq!(
            (one.digest, differs.map(|at| (&one.lines[at], &other.lines[at]))),
            (other.digest, None),
            "seed {seed}"
        );
    }
    assert_ne!(run(Plan::of(1)).digest, run(Plan::of(2)).digest);
}

#[test]
fn a_cluster_serves_soon_whatever_the_shape_of_its_network_and_keeps_its_leader() {
    for shape in Shape::ALL {
        let course = partition::run(*shape, 1);
        assert!(course.holds(), "{shape:?}: {course:?}");
    }
}

/// The recipe of openraft#2116: sustained writes and frequent snapshots, while applying lags behind. With what production
/// keeps below a snapshot, purging never overtakes it.
#[test]
fn purging_under_load_never_overtakes_applying() {
    for seed in 0..2 {
        let report = run(Plan {
            clients: 20,
            snapshot_every: 60,
            keep: 120,
            flush_micros: 20_000,
            faults: false,
            ..Plan::of(seed)
        });
        assert!(report.violations.is_empty(), "{}", report.explain());
        // Several snapshots, each with a purge.
        assert!(report.counts.accepted > 300, "{:?}", report.counts);
    }
}

/// One hundred rotations in a row, and shorter runs of other seeds.
#[test]
fn the_root_rolls_a_hundred_times_in_a_row_whatever_goes_wrong() {
    let failures = Mutex::new(Vec::new());
    let total = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for runs in [&[(0, 100)][..], &[(1, 20), (2, 20), (3, 20)]] {
            let (failures, total) = (&failures, &total);
            scope.spawn(move || {
                for (seed, rotations) in runs {
                    let (report, tally) = rotation::run(*seed, *rotations);
                    if !report.violations.is_empty() {
                        eprintln!("{}", report.explain());
                        failures.lock().expect("nobody panics").push(*seed);
                    }
                    println!("seed {seed}: {tally:?}");
                    total.lock().expect("nobody panics").push(tally);
                }
            });
        }
    });
    let failures = failures.into_inner().expect("nobody panics");
    assert!(failures.is_empty(), "seeds failed: {failures:?}");
    let total = total.into_inner().expect("nobody panics");
    // A set of runs without its faults proves nothing.
    let sum = |what: fn(&rotation::Tally) -> u64| total.iter().map(what).sum::<u64>();
    for (what, count, least) in [
        ("rotations", sum(|it| it.rotations), 160),
        ("ended without somebody", sum(|it| it.without_somebody), 10),
        ("and without it again", sum(|it| it.missed_again), 3),
        ("ended by their deadline", sum(|it| it.by_deadline), 10),
        ("handshakes", sum(|it| it.handshakes), 1_000),
        ("refused handshakes", sum(|it| it.refused), 10),
        ("returns", sum(|it| it.returns), 20),
        (
            "leaders killed after a step",
            sum(|it| it.killed_after_a_step),
            40,
        ),
        ("stopped programs", sum(|it| it.stopped), 40),
        ("stalls", sum(|it| it.stalls), 40),
    ] {
        assert!(count >= least, "{what}: {count}, wanted {least}");
    }
}

#[test]
fn a_run_of_rotations_repeats_although_its_keys_are_drawn_anew() {
    let (one, other) = (rotation::run(7, 2).0, rotation::run(7, 2).0);
    let differs = one
        .lines
        .iter()
        .zip(&other.lines)
        .position(|(one, other)| one != other);
    assert_eq!(
        (one.digest, differs.map(|at| (&one.lines[at], &other.lines[at]))),
        (other.digest, None)
    );
}

#[test]
fn a_cluster_stands_a_flood_of_writes_with_snapshots_and_purges() {
    let course = flood::run(Duration::from_secs(2), 100);
    assert_eq!(course.violations, Vec::<String>::new());
    assert!(!course.latencies.is_empty(), "no write was acknowledged");
    assert!(course.snapshots > 3, "{} snapshots", course.snapshots);
}
