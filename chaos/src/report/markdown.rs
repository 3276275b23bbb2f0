//! The report on one page.

use std::fmt::Write as _;

use super::{Covered, Document, Held, Judged, Verdict};

pub(super) fn page(document: &Document) -> String {
    let mut page = String::new();
    // Writing to a string never fails.
    let _written = write(document, &mut page);
    page
}

fn write(document: &Document, page: &mut String) -> std::fmt::Result {
    let Document {
        program,
        seeds,
        shown,
        ..
    } = document;
    let verdict = says(document.verdict);
    writeln!(page, "# {}: {verdict}\n", document.level)?;
    writeln!(
        page,
        "Seeds {} to {}, {} of them failed. {:.0} s of simulated time in {:.1} s ({:.0} times as fast as real time).\n",
        seeds.from,
        (seeds.from + seeds.count).saturating_sub(1),
        seeds.failed.len(),
        seeds.simulated_s,
        seeds.took_s,
        seeds.simulated_s / seeds.took_s.max(0.001)
    )?;
    writeln!(page, "{program}\n")?;
    rules(page, &document.rules)?;
    let counts = &document.counts;
    writeln!(
        page,
        "\nOperations: {} writes acknowledged, {} refused, {} of unknown outcome; {} conditional writes won; {} reads.\n",
        counts.accepted, counts.refused, counts.unknown, counts.swaps, counts.reads
    )?;
    covered(page, &document.coverage)?;
    writeln!(
        page,
        "\n## Seed {}\n\nTrace digest {}. To run it again:\n\n    {}\n",
        shown.plan.seed, shown.digest, shown.replay
    )?;
    writeln!(page, "![a lane for each member, with its faults](timeline.svg)\n")?;
    writeln!(
        page,
        "| strike | fault | at | from | to | ended by |\n|---|---|---|---|---|---|"
    )?;
    for span in &shown.faults {
        let member = span.member.map_or("-".to_owned(), |member| format!("m{member}"));
        writeln!(
            page,
            "| {} | {:?} | {member} | {} ms | {} ms | {} |",
            span.number,
            span.fault,
            span.start_us / 1_000,
            span.end_us / 1_000,
            span.undone_by
        )?;
    }
    if !shown.violations.is_empty() {
        writeln!(page, "\nWhat broke:\n")?;
        for violation in &shown.violations {
            writeln!(page, "    {violation}")?;
        }
        writeln!(page, "\nThe last lines:\n")?;
        for line in &shown.last_lines {
            writeln!(page, "    {line}")?;
        }
    }
    Ok(())
}

/// A verdict in words.
pub(crate) fn says(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Pass => "pass: every rule held",
        Verdict::Violation => "violation: a rule was broken",
        Verdict::Coverage => "coverage not reached: every rule held, but too little was tried",
    }
}

/// So many pieces of evidence of a rule are on the page; the JSON has all.
const EVIDENCE: usize = 20;

/// The table of rules.
pub(crate) fn rules(page: &mut String, rules: &[Judged]) -> std::fmt::Result {
    writeln!(page, "| rule | held | evidence |\n|---|---|---|")?;
    for rule in rules {
        let held = match rule.held {
            Held::Pass => "yes",
            Held::Fail => "**no**",
            Held::Unknown => "not put to the test",
        };
        let mut said = rule.evidence[..rule.evidence.len().min(EVIDENCE)].join("<br>");
        if rule.evidence.len() > EVIDENCE {
            write!(said, "<br>and {} more", rule.evidence.len() - EVIDENCE)?;
        }
        writeln!(page, "| {} | {held} | {} |", rule.says, said.replace('|', "\\|"))?;
    }
    Ok(())
}

/// The table of what was tried, where there is one.
pub(crate) fn covered(page: &mut String, coverage: &[Covered]) -> std::fmt::Result {
    if coverage.is_empty() {
        return Ok(());
    }
    writeln!(page, "| tried | times | at least |\n|---|---|---|")?;
    for covered in coverage {
        writeln!(
            page,
            "| {} | {} | {} |",
            covered.what, covered.count, covered.least
        )?;
    }
    Ok(())
}
