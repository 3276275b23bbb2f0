//! What is left of a run for people and programs: a folder with `report.json`, `report.md`, `timeline.svg` and
//! `timeline.png`.

pub(crate) mod markdown;
pub(crate) mod picture;
mod spans;
pub(crate) mod timeline;

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use spans::{Span, spans};

use crate::rules::{Rule, Violation};
use crate::sim::{Counts, Event, Plan, Report};

/// The format of `report.json`. It rises when a field changes its meaning or goes; new fields may come without.
pub const SCHEMA: u32 = 1;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every rule held, and enough was tried.
    Pass,
    /// A rule was broken.
    Violation,
    /// Every rule held, but too little was tried for that to mean much.
    Coverage,
}

impl Verdict {
    /// The program's exit code.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Pass => 0,
            Self::Violation => 1,
            Self::Coverage => 2,
        }
    }
}

/// Whether a rule held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Held {
    /// It did.
    Pass,
    /// It did not.
    Fail,
    /// It was not put to the test.
    Unknown,
}

/// A rule, whether it held, and what shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Judged {
    pub(crate) rule: Rule,
    pub(crate) says: &'static str,
    pub(crate) held: Held,
    pub(crate) evidence: Vec<String>,
}

impl Judged {
    /// A rule with what broke it; whether it was put to the test is of weight only where nothing did.
    pub(crate) fn new(rule: Rule, tried: bool, evidence: Vec<String>) -> Self {
        Self {
            rule,
            says: rule.says(),
            held: match (evidence.is_empty(), tried) {
                (false, _) => Held::Fail,
                (true, true) => Held::Pass,
                (true, false) => Held::Unknown,
            },
            evidence,
        }
    }
}

/// How runs ended, by their rules and by what was tried.
pub(crate) fn verdict(broken: bool, coverage: &[Covered]) -> Verdict {
    let too_little = coverage.iter().any(|it| it.count < it.least);
    match (broken, too_little) {
        (true, _) => Verdict::Violation,
        (false, true) => Verdict::Coverage,
        (false, false) => Verdict::Pass,
    }
}

/// Writes the files of a report; those of one before are replaced.
pub(crate) fn write(
    folder: &Path,
    json: &impl Serialize,
    markdown: &str,
    picture: &picture::Picture,
) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("report.json"), serde_json::to_vec_pretty(json)?)?;
    fs::write(folder.join("report.md"), markdown)?;
    fs::write(folder.join("timeline.svg"), picture.svg())?;
    fs::write(folder.join("timeline.png"), picture.png()?)
}

/// How often something was tried, and how often it had to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Covered {
    /// What.
    pub what: &'static str,
    /// How often it was.
    pub count: u64,
    /// How often it must be.
    pub least: u64,
}

/// Which program ran.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    version: &'static str,
    commit: &'static str,
    sha256: String,
}

impl Program {
    /// This one.
    ///
    /// # Errors
    /// Where its own file cannot be read.
    pub fn this() -> io::Result<Self> {
        let mut file = fs::File::open("/proc/self/exe")?;
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
        }
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            commit: env!("BULKHEAD_COMMIT"),
            sha256: hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
        })
    }
}

impl std::fmt::Display for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            version,
            commit,
            sha256,
        } = self;
        write!(
            f,
            "Program: version {version}, commit {commit}, SHA-256 {sha256}."
        )
    }
}

/// The seeds of a set of runs, and what came of them.
#[derive(Clone, Debug, Serialize)]
pub struct Seeds {
    /// The first.
    pub from: u64,
    /// How many.
    pub count: u64,
    /// Those that broke a rule.
    pub failed: Vec<u64>,
    /// Simulated time of all, in seconds.
    pub simulated_s: f64,
    /// What it took, in seconds.
    pub took_s: f64,
}

/// One run in full: the shrunk one that fails, or the last.
#[derive(Clone, Debug, Serialize)]
pub struct Shown {
    plan: Plan,
    digest: String,
    elapsed_us: u64,
    counts: Counts,
    faults: Vec<Span>,
    violations: Vec<Violation>,
    events: Vec<Event>,
    last_lines: Vec<String>,
    replay: String,
}

/// Lines of a run that a report quotes.
const LINES: usize = 60;

impl Shown {
    /// A run of a plan. `replay` is the command that runs it again.
    pub fn new(plan: Plan, report: Report, replay: String) -> Self {
        let from = report.lines.len().saturating_sub(LINES);
        Self {
            faults: spans(&report.events, report.elapsed_us),
            digest: report.digest,
            elapsed_us: report.elapsed_us,
            counts: report.counts,
            violations: report.violations,
            events: report.events,
            last_lines: report.lines[from..].to_vec(),
            plan,
            replay,
        }
    }

    fn picture(&self) -> picture::Picture {
        timeline::of_simulation(
            self.plan.members,
            self.elapsed_us,
            &self.events,
            &self.faults,
            &self.violations,
        )
        .draw()
    }
}

/// A report.
#[derive(Clone, Debug, Serialize)]
pub struct Document {
    schema: u32,
    level: &'static str,
    program: Program,
    verdict: Verdict,
    seeds: Seeds,
    rules: Vec<Judged>,
    counts: Counts,
    coverage: Vec<Covered>,
    shown: Shown,
}

impl Document {
    /// What came of these seeds of the simulation.
    pub fn new(
        program: Program,
        seeds: Seeds,
        counts: Counts,
        coverage: Vec<Covered>,
        broken: &[(u64, Violation)],
        shown: Shown,
    ) -> Self {
        let rules = Rule::OF_STATE.iter().map(|rule| judge(*rule, &counts, broken));
        Self {
            schema: SCHEMA,
            level: "core simulation",
            program,
            verdict: verdict(!seeds.failed.is_empty(), &coverage),
            rules: rules.collect(),
            seeds,
            counts,
            coverage,
            shown,
        }
    }

    /// The same of whole programs in simulation.
    pub fn of_wire(
        program: Program,
        seeds: Seeds,
        counts: Counts,
        coverage: Vec<Covered>,
        broken: &[(u64, Violation)],
        shown: Shown,
    ) -> Self {
        let rules = Rule::OF_WIRE.iter().map(|rule| judge(*rule, &counts, broken));
        Self {
            level: "whole programs in simulation",
            rules: rules.collect(),
            ..Self::new(program, seeds, counts, coverage, broken, shown)
        }
    }

    /// How the runs ended.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// The report on one page, Markdown.
    pub fn markdown(&self) -> String {
        markdown::page(self)
    }

    /// Writes the folder; files of a report before are replaced.
    ///
    /// # Errors
    /// Where the folder or a file cannot be written.
    pub fn write(&self, folder: &Path) -> io::Result<()> {
        write(folder, self, &self.markdown(), &self.shown.picture())
    }
}

/// A rule that nothing in the runs could have broken was not put to the test.
fn judge(rule: Rule, counts: &Counts, broken: &[(u64, Violation)]) -> Judged {
    let tried = match rule {
        Rule::AcknowledgedIsKept => counts.accepted > 0 && counts.kills + counts.power_losses > 0,
        Rule::RefusedNeverAppears => counts.refused > 0,
        Rule::OneSuccessor => counts.swaps > 0,
        Rule::FreshReads => counts.reads > 0,
        Rule::Linearizable => counts.checked > 0 && counts.unclear == 0,
        Rule::StartsAgain => counts.kills + counts.power_losses > 0,
        Rule::OneLeaderPerTerm => counts.terms > 0,
        Rule::WhatIsAskedForRuns => counts.settled > 0,
        _ => true,
    };
    let evidence: Vec<String> = broken
        .iter()
        .filter(|(_, violation)| violation.rule == rule)
        .map(|(seed, violation)| format!("seed {seed}, {} us: {}", violation.at_us, violation.evidence))
        .collect();
    Judged::new(rule, tried, evidence)
}

/// Where in sorted figures the smallest one is that so many in a hundred do not exceed.
pub(crate) fn rank(count: usize, percent: usize) -> usize {
    (count * percent).div_ceil(100).max(1) - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::run;

    fn document(coverage: Vec<Covered>, broken: &[(u64, Violation)]) -> Document {
        let plan = Plan::of(3);
        let report = run(plan.clone());
        let seeds = Seeds {
            from: 3,
            count: 1,
            failed: broken.iter().map(|(seed, _)| *seed).collect(),
            simulated_s: 5.0,
            took_s: 0.1,
        };
        let (program, counts) = (Program::this().expect("this program"), report.counts);
        let shown = Shown::new(plan, report, "bulkhead-chaos sim --replay 3".into());
        Document::new(program, seeds, counts, coverage, broken, shown)
    }

    #[test]
    fn a_report_says_what_was_run_and_how_it_ended_in_each_of_its_forms() {
        let folder = tempfile::tempdir().expect("a folder");
        let broken = Violation {
            rule: Rule::FreshReads,
            at_us: 7,
            evidence: "a read at m1 missed the write at 3".into(),
        };
        let document = document(Vec::new(), &[(3, broken)]);
        assert_eq!(document.verdict(), Verdict::Violation);
        document.write(folder.path()).expect("written");
        let text = fs::read_to_string(folder.path().join("report.json")).expect("there");
        let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(json["schema"], SCHEMA);
        assert_eq!(json["program"]["sha256"].as_str().expect("text").len(), 64);
        assert_eq!(json["shown"]["replay"], "bulkhead-chaos sim --replay 3");
        let rules = json["rules"].as_array().expect("a list");
        let held =
            |rule: &str| rules.iter().find(|it| it["rule"] == rule).expect("each rule")["held"].clone();
        assert_eq!(held("fresh-reads"), "fail");
        assert_eq!(held("one-leader-per-term"), "pass");
        let page = fs::read_to_string(folder.path().join("report.md")).expect("there");
        for part in [
            "violation",
            "missed the write at 3",
            "bulkhead-chaos sim --replay 3",
            "timeline.svg",
        ] {
            assert!(page.contains(part), "{part} is not in {page}");
        }
        let svg = fs::read_to_string(folder.path().join("timeline.svg")).expect("there");
        assert!(svg.contains(">m3</text>"), "a lane for each member");
        assert!(
            fs::read(folder.path().join("timeline.png"))
                .expect("there")
                .starts_with(b"\x89PNG")
        );
    }

    #[test]
    fn too_little_that_was_tried_is_no_pass() {
        let covered = |least| {
            vec![Covered {
                what: "kills",
                count: 2,
                least,
            }]
        };
        assert_eq!(document(covered(2), &[]).verdict().exit_code(), 0);
        assert_eq!(document(covered(3), &[]).verdict().exit_code(), 2);
    }
}
