//! Many seeds, on all processors, and how much they have to try between them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Counts;
use crate::report::Covered;

/// Runs each seed and hands on what came of it, in no fixed order; stops early once `seen` says no more.
pub fn sweep<R>(
    seeds: std::ops::Range<u64>,
    jobs: usize,
    run: impl Fn(u64) -> R + Sync,
    seen: impl FnMut(R) -> bool + Send,
) {
    let (next, over, seen) = (
        AtomicU64::new(seeds.start),
        AtomicBool::new(false),
        Mutex::new(seen),
    );
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let report = run(seed);
                    // One that panicked in there takes the sweep down with it: its threads are joined.
                    let mut seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    if !seen(report) {
                        over.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

/// What a set of so many runs must have tried: without its faults it proves nothing.
pub fn coverage(counts: &Counts, runs: u64, workers: bool) -> Vec<Covered> {
    let Counts {
        accepted,
        refused,
        unknown,
        reads,
        swaps,
        repeats,
        checked,
        unclear: _,
        kills,
        power_losses,
        power_losses_of_all,
        pauses,
        stalls,
        replacements,
        disk_failures,
        partitions,
        snapshots_sent,
        late,
        hand_overs,
        terms,
        rotations: _, // they have a simulation of their own
        told,
        compacted,
        worker_faults,
        settled,
    } = *counts;
    // Clusters with workers have no replaced machines, and the others no workers.
    let [alone, with_workers] = if workers { [0, runs] } else { [runs, 0] };
    let all = [
        ("acknowledged writes", accepted, 20 * runs),
        ("refused writes", refused, runs / 2),
        ("unknown writes", unknown, runs / 4),
        ("reads", reads, runs / 2),
        ("conditional writes", swaps, 2 * runs),
        ("repeated writes", repeats, runs / 2),
        ("operations in an order that fits", checked, 10 * runs),
        ("kills", kills, runs / 2),
        ("power losses", power_losses, runs / 2),
        ("power losses of all at once", power_losses_of_all, 2 * runs / 5),
        ("stopped programs", pauses, runs / 4),
        ("stalled disks", stalls, runs / 10),
        ("replaced machines", replacements, alone / 50),
        ("disk failures", disk_failures, runs / 20),
        ("partitions", partitions, runs / 2),
        ("snapshots sent", snapshots_sent, runs / 20),
        ("messages that came late", late, runs / 20),
        ("hand-overs", hand_overs, runs / 10),
        ("terms", terms, 2 * runs),
        ("changes that watches were told", told, 20 * runs),
        ("watches that had to list again", compacted, runs / 2),
        ("faults of workers", worker_faults, with_workers),
        (
            "runs whose tasks were looked at in the end",
            settled,
            with_workers,
        ),
    ];
    let covered = |(what, count, least)| Covered { what, count, least };
    all.into_iter().map(covered).collect()
}
