//! `bulkhead-chaos sim`: many seeds, or one again.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use crate::command::{ENOUGH, broken, failed, jobs, leave, left_out, now, say_too_few, seconds};
use crate::report::{Document, Program, Seeds, Shown, Verdict};
use crate::sim::sweep::{coverage, sweep};
use crate::sim::{Counts, Plan, Report, run as simulate};

/// Runs that the search for the shortest failing one may take.
const SHRINK_RUNS: usize = 400;
/// A line of progress each so many seeds.
const PROGRESS: u64 = 100;

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
    /// And so many clients.
    pub clients: Option<u64>,
    /// Managers and workers, instead of the managers of the seed alone.
    pub nodes: Option<(u16, u16)>,
    /// And so much trouble, in simulated milliseconds.
    pub trouble_ms: Option<u64>,
    /// Whether its messages are shown.
    pub every_message: bool,
    /// Where the report goes.
    pub report: PathBuf,
}

impl Simulation {
    fn plan(&self, seed: u64) -> Plan {
        let mut plan = Plan::of(seed);
        if let Some((managers, workers)) = self.nodes {
            (plan.members, plan.workers) = (managers.into(), workers.into());
        }
        plan.clients = self.clients.unwrap_or(plan.clients);
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
    plan.every_message = asked.every_message;
    if let Some(trouble) = asked.trouble_ms {
        plan.trouble = Duration::from_millis(trouble);
    }
    let start = now();
    let report = simulate(plan.clone());
    for line in &report.lines {
        writeln!(out, "{line}")?;
    }
    writeln!(out, "digest {}", report.digest)?;
    say(&report, out)?;
    let broken = broken(&report);
    let seeds = Seeds {
        from: seed,
        count: 1,
        failed: failed(&broken),
        simulated_s: seconds(report.elapsed_us),
        took_s: start.elapsed().as_secs_f64(),
    };
    let (counts, command) = (report.counts, command(&plan));
    // One run is asked for to be looked at, not to prove anything.
    Ok(Document::new(
        Program::this()?,
        seeds,
        counts,
        Vec::new(),
        &broken,
        Shown::new(plan, report, command),
    ))
}

fn seeds(asked: &Simulation, out: &mut impl Write) -> anyhow::Result<Document> {
    let jobs = jobs(asked.jobs);
    let end = asked.from.saturating_add(asked.seeds);
    let start = now();
    let (mut counts, mut done, mut elapsed_us) = (Counts::default(), 0_u64, 0_u64);
    let (mut all_broken, mut failures) = (Vec::new(), BTreeSet::new());
    let mut said = String::new();
    sweep(
        asked.from..end,
        jobs,
        |seed| simulate(asked.plan(seed)),
        |report| {
            counts.add(&report.counts);
            done += 1;
            elapsed_us += report.elapsed_us;
            if !report.violations.is_empty() {
                // Writing to a string never fails.
                let _written = writeln!(
                    said,
                    "seed {} broke a rule: {}",
                    report.seed, report.violations[0]
                );
                failures.insert(report.seed);
                all_broken.extend(broken(&report));
            }
            if done.is_multiple_of(PROGRESS) {
                eprintln!("{done} of {} seeds, {} failed", asked.seeds, failures.len());
            }
            failures.len() < ENOUGH
        },
    );
    out.write_all(said.as_bytes())?;
    let took_s = start.elapsed().as_secs_f64();
    let (plan, report) = match failures.first() {
        Some(seed) => shortest(asked.plan(*seed), out)?,
        None => {
            let plan = asked.plan(end - 1);
            (plan.clone(), simulate(plan))
        }
    };
    all_broken.sort_by_key(|(seed, violation)| (*seed, violation.at_us));
    let seeds = Seeds {
        from: asked.from,
        count: done,
        failed: failures.into_iter().collect(),
        simulated_s: seconds(elapsed_us),
        took_s,
    };
    writeln!(
        out,
        "{done} seeds, {} failed; {:.0} s of simulated time in {took_s:.1} s; {} writes acknowledged, {} kills, {} power losses, {} of all machines at once, {} partitions",
        seeds.failed.len(),
        seeds.simulated_s,
        counts.accepted,
        counts.kills,
        counts.power_losses,
        counts.power_losses_of_all,
        counts.partitions
    )?;
    let covered = coverage(&counts, done, plan.workers > 0);
    say_too_few(&covered, out)?;
    let command = command(&plan);
    Ok(Document::new(
        Program::this()?,
        seeds,
        counts,
        covered,
        &all_broken,
        Shown::new(plan, report, command),
    ))
}

/// The shortest run of a failing seed that breaks one of the same rules.
pub(crate) fn shortest(plan: Plan, out: &mut impl Write) -> anyhow::Result<(Plan, Report)> {
    crate::command::shortest(plan, SHRINK_RUNS, simulate, command, out)
}

fn say(report: &Report, out: &mut impl Write) -> anyhow::Result<()> {
    for violation in &report.violations {
        writeln!(out, "VIOLATION {violation}")?;
    }
    Ok(())
}

/// What runs exactly this again.
fn command(plan: &Plan) -> String {
    let usual = Plan::of(plan.seed);
    let without = left_out(&plan.without);
    let mut command = format!("bulkhead-chaos sim --replay {}{without}", plan.seed);
    // Writing to a string never fails.
    if (plan.members, plan.workers) != (usual.members, usual.workers) {
        let _written = write!(command, " --nodes {}+{}", plan.members, plan.workers);
    }
    if plan.clients != usual.clients {
        let _written = write!(command, " --clients {}", plan.clients);
    }
    if plan.trouble != usual.trouble {
        let _written = write!(command, " --trouble {}", plan.trouble.as_millis());
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_says_all_that_differs_from_the_seed_alone() {
        let plan = Plan::of(7);
        assert_eq!(command(&plan), "bulkhead-chaos sim --replay 7");
        let plan = Plan {
            without: [1, 4].into(),
            clients: 1,
            trouble: Duration::from_millis(900),
            members: 5,
            workers: 20,
            ..plan
        };
        assert_eq!(
            command(&plan),
            "bulkhead-chaos sim --replay 7 --without 1,4 --nodes 5+20 --clients 1 --trouble 900"
        );
    }

    #[test]
    fn a_replay_is_the_same_run_and_says_its_digest() {
        let folder = tempfile::tempdir().expect("a folder");
        let asked = Simulation {
            seeds: 1,
            from: 0,
            jobs: None,
            replay: Some(2),
            without: BTreeSet::new(),
            clients: None,
            nodes: None,
            trouble_ms: None,
            every_message: false,
            report: folder.path().join("report"),
        };
        let mut out = Vec::new();
        assert_eq!(run(&asked, &mut out).expect("written"), Verdict::Pass);
        let printed = String::from_utf8(out).expect("text");
        let digest = simulate(Plan::of(2)).digest;
        assert!(printed.contains(&format!("digest {digest}")), "{printed}");
        assert!(folder.path().join("report/report.json").exists());
        let fewer = Simulation {
            without: (1..1_000).collect(),
            ..asked
        };
        let mut out = Vec::new();
        run(&fewer, &mut out).expect("written");
        assert!(
            !String::from_utf8(out).expect("text").contains("Kill"),
            "no strike is left"
        );
    }
}
