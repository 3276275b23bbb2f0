//! `bulkhead-chaos sim --level wire`: whole programs on many seeds, or on one again.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use crate::command::{ENOUGH, broken, failed, jobs, leave, left_out, now, say_too_few, seconds, shortest};
use crate::report::{Covered, Document, Program, Seeds, Shown, Verdict};
use crate::rules::Violation;
use crate::sim::sweep::sweep;
use crate::sim::{Counts, Plan as CorePlan, Report};
use crate::wire::{Plan, run as simulate};

/// Runs that the search for the shortest failing one may take: one that waits in vain for what should come takes seconds.
const SHRINK_RUNS: usize = 100;
/// A line of progress each so many seeds.
const PROGRESS: u64 = 20;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Simulation {
    /// How many seeds.
    pub seeds: u64,
    /// The first.
    pub from: u64,
    /// Runs at once.
    pub jobs: Option<usize>,
    /// One seed alone.
    pub replay: Option<u64>,
    /// Of it, strikes that are left out.
    pub without: BTreeSet<u32>,
    /// And so much trouble, in simulated milliseconds.
    pub trouble_ms: Option<u64>,
    /// Managers and workers, instead of those of the seed.
    pub nodes: Option<(u8, u8)>,
    /// Clients, instead of those of the seed.
    pub clients: Option<u64>,
    /// Where the report goes.
    pub report: PathBuf,
}

impl Simulation {
    fn plan(&self, seed: u64) -> Plan {
        let mut plan = Plan::of(seed);
        if let Some((managers, workers)) = self.nodes {
            (plan.managers, plan.workers) = (managers.into(), workers.into());
        }
        if let Some(clients) = self.clients {
            plan.clients = clients;
        }
        plan
    }
}

/// Runs it, says how it goes on `out`, and leaves the report.
///
/// # Errors
/// Where something could not be written; what a cluster does wrong is a verdict.
pub fn run(asked: &Simulation, out: &mut impl Write) -> anyhow::Result<Verdict> {
    let document = match asked.replay {
        Some(seed) => replay(asked, seed, out)?,
        None => seeds(asked, out)?,
    };
    leave(&document, &asked.report, out)
}

fn replay(asked: &Simulation, seed: u64, out: &mut impl Write) -> anyhow::Result<Document> {
    let mut plan = asked.plan(seed);
    plan.without.clone_from(&asked.without);
    if let Some(trouble) = asked.trouble_ms {
        plan.trouble = Duration::from_millis(trouble);
    }
    let start = now();
    let report = simulate(plan.clone());
    for line in &report.lines {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "digest {}", report.digest)?;
    let broken = broken(&report);
    say(&broken, out)?;
    let seeds = Seeds {
        from: seed,
        count: 1,
        failed: failed(&broken),
        simulated_s: seconds(report.elapsed_us),
        took_s: start.elapsed().as_secs_f64(),
    };
    // One run is asked for to be looked at, not to prove anything.
    Ok(Document::of_wire(
        Program::this()?,
        seeds,
        report.counts,
        Vec::new(),
        &broken,
        shown(plan, report),
    ))
}

fn seeds(asked: &Simulation, out: &mut impl Write) -> anyhow::Result<Document> {
    let jobs = jobs(asked.jobs);
    let end = asked.from.saturating_add(asked.seeds);
    let start = now();
    let (mut counts, mut done, mut elapsed_us) = (Counts::default(), 0_u64, 0_u64);
    let mut all_broken = Vec::new();
    sweep(
        asked.from..end,
        jobs,
        |seed| simulate(asked.plan(seed)),
        |report| {
            counts.add(&report.counts);
            done += 1;
            elapsed_us += report.elapsed_us;
            all_broken.extend(broken(&report));
            if done.is_multiple_of(PROGRESS) {
                let failed = failed(&all_broken).len();
                eprintln!("{done} of {} seeds, {failed} failed", asked.seeds);
            }
            failed(&all_broken).len() < ENOUGH
        },
    );
    all_broken.sort_by_key(|(seed, violation)| (*seed, violation.at_us));
    say(&all_broken, out)?;
    let took_s = start.elapsed().as_secs_f64();
    let failed = failed(&all_broken);
    let (plan, report) = match failed.first() {
        Some(seed) => shortest(asked.plan(*seed), SHRINK_RUNS, simulate, command, out)?,
        None => {
            let plan = asked.plan(end - 1);
            (plan.clone(), simulate(plan))
        }
    };
    let seeds = Seeds {
        from: asked.from,
        count: done,
        failed,
        simulated_s: seconds(elapsed_us),
        took_s,
    };
    writeln!(
        out,
        "{done} seeds, {} failed; {:.0} s of simulated time in {:.1} s; {} writes acknowledged, {} kills, {} power losses, {} partitions",
        seeds.failed.len(),
        seeds.simulated_s,
        seeds.took_s,
        counts.accepted,
        counts.kills,
        counts.power_losses,
        counts.partitions
    )?;
    let covered = coverage(&counts, done);
    say_too_few(&covered, out)?;
    Ok(Document::of_wire(
        Program::this()?,
        seeds,
        counts,
        covered,
        &all_broken,
        shown(plan, report),
    ))
}

/// What a set of so many runs must have tried: without its faults it proves nothing.
pub(crate) fn coverage(counts: &Counts, runs: u64) -> Vec<Covered> {
    let all = [
        ("acknowledged writes", counts.accepted, 3 * runs),
        ("reads", counts.reads, 3 * runs),
        ("conditional writes", counts.swaps, runs),
        ("operations in an order that fits", counts.checked, 5 * runs),
        ("kills", counts.kills, runs / 2),
        ("power losses", counts.power_losses, runs / 2),
        ("partitions", counts.partitions, runs),
        ("disk failures", counts.disk_failures, runs / 20),
        ("terms", counts.terms, runs),
        ("rotations of the root", counts.rotations, runs / 3),
    ];
    let covered = |(what, count, least)| Covered { what, count, least };
    all.into_iter().map(covered).collect()
}

/// A report shows a run of whole programs as one of replicas: a lane for each manager.
fn shown(plan: Plan, report: Report) -> Shown {
    let command = command(&plan);
    let core = CorePlan {
        members: plan.managers,
        clients: plan.clients,
        trouble: plan.trouble,
        snapshot_every: plan.snapshot_every,
        keep: plan.keep,
        flush_micros: plan.flush_micros,
        without: plan.without,
        ..CorePlan::of(plan.seed)
    };
    Shown::new(core, report, command)
}

/// What runs the same again.
fn command(plan: &Plan) -> String {
    let (seed, usual) = (plan.seed, Plan::of(plan.seed));
    let without = left_out(&plan.without);
    let mut command = format!("bulkhead-chaos sim --level wire --replay {seed}{without}");
    // Writing to a string never fails.
    if (plan.managers, plan.workers) != (usual.managers, usual.workers) {
        let _written = write!(command, " --nodes {}+{}", plan.managers, plan.workers);
    }
    if plan.clients != usual.clients {
        let _written = write!(command, " --clients {}", plan.clients);
    }
    if plan.trouble != usual.trouble {
        let _written = write!(command, " --trouble {}", plan.trouble.as_millis());
    }
    command
}

fn say(broken: &[(u64, Violation)], out: &mut impl Write) -> anyhow::Result<()> {
    for (seed, violation) in broken {
        writeln!(out, "seed {seed}: VIOLATION {violation}")?;
    }
    Ok(())
}
