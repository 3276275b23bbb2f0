//! What the commands that run simulations share.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::report::{Covered, Document, Verdict};
use crate::rules::Violation;
use crate::sim::Report;

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
