//! What the commands that run simulations share.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::report::{Covered, Document, Verdict};
use crate::rules::Violation;
use crate::sim::Report;
use crate::sim::shrink::{Shrinks, shrink};

/// Failing seeds after which a sweep ends: more of them say nothing new.
pub(crate) const ENOUGH: usize = 10;

#[expect(clippy::disallowed_methods, reason = "how long it really takes, for people")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Leaves the report, and says where it is.
pub(crate) fn leave(document: &Document, folder: &Path, out: &mut impl Write) -> anyhow::Result<Verdict> {
    document
        .write(folder)
        .with_context(|| format!("cannot write the report to {}", folder.display()))?;
    writeln!(out, "report: {}", folder.join("report.md").display())?;
    Ok(document.verdict())
}

/// Says of what too little was tried.
pub(crate) fn say_too_few(covered: &[Covered], out: &mut impl Write) -> anyhow::Result<()> {
    for little in covered.iter().filter(|it| it.count < it.least) {
        writeln!(
            out,
            "too few {}: {}, wanted {}",
            little.what, little.count, little.least
        )?;
    }
    Ok(())
}

/// The shortest run of a failing plan that breaks one of the same rules, found in at most so many runs.
pub(crate) fn shortest<P: Shrinks>(
    plan: P,
    limit: usize,
    simulate: impl Fn(P) -> Report,
    again: impl Fn(&P) -> String,
    out: &mut impl Write,
) -> anyhow::Result<(P, Report)> {
    let first = simulate(plan.clone());
    let rules: BTreeSet<_> = first.violations.iter().map(|it| it.rule).collect();
    let (mut plan, runs) = shrink(plan, first.strikes, limit, |plan| {
        let report = simulate(plan.clone());
        report.violations.iter().any(|it| rules.contains(&it.rule))
    });
    let report = simulate(plan.clone());
    writeln!(
        out,
        "seed {}: {} of {} strikes suffice (found in {runs} runs):",
        report.seed,
        first.strikes as usize - plan.parts().without.len(),
        first.strikes
    )?;
    for violation in &report.violations {
        writeln!(out, "VIOLATION {violation}")?;
    }
    writeln!(out, "to run it again: {}", again(&plan))?;
    Ok((plan, report))
}

/// How many runs go on at once.
pub(crate) fn jobs(asked: Option<usize>) -> usize {
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// The arguments that leave strikes out.
pub(crate) fn left_out(strikes: &BTreeSet<u32>) -> String {
    if strikes.is_empty() {
        return String::new();
    }
    let numbers: Vec<String> = strikes.iter().map(ToString::to_string).collect();
    format!(" --without {}", numbers.join(","))
}

/// What a run broke, with its seed.
pub(crate) fn broken(report: &Report) -> Vec<(u64, Violation)> {
    let violations = report.violations.iter();
    violations.map(|it| (report.seed, it.clone())).collect()
}

/// The seeds that broke something, each once.
pub(crate) fn failed(broken: &[(u64, Violation)]) -> Vec<u64> {
    let seeds: BTreeSet<u64> = broken.iter().map(|(seed, _)| *seed).collect();
    seeds.into_iter().collect()
}

pub(crate) fn seconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64()
}
