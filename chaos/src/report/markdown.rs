//! The report on one page.

use std::fmt::Write as _;

use super::{Document, Held, Verdict};

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
    let verdict = match document.verdict {
        Verdict::Pass => "pass: every rule held",
        Verdict::Violation => "violation: a rule was broken",
        Verdict::Coverage => "coverage not reached: every rule held, but too little was tried",
    };
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
    writeln!(
        page,
        "Program: version {}, commit {}, SHA-256 {}.\n",
        program.version, program.commit, program.sha256
    )?;
    writeln!(page, "| rule | held | evidence |\n|---|---|---|")?;
    for rule in &document.rules {
        let held = match rule.held {
            Held::Pass => "yes",
            Held::Fail => "**no**",
            Held::Unknown => "not put to the test",
        };
        let more = match rule.evidence.len() {
            0 => String::new(),
            1 => rule.evidence[0].clone(),
            more => format!("{} (and {} more)", rule.evidence[0], more - 1),
        };
        writeln!(page, "| {} | {held} | {} |", rule.says, more.replace('|', "\\|"))?;
    }
    let counts = &document.counts;
    writeln!(
        page,
        "\nOperations: {} writes acknowledged, {} refused, {} of unknown outcome; {} conditional writes won; {} reads.\n",
        counts.accepted, counts.refused, counts.unknown, counts.swaps, counts.reads
    )?;
    if !document.coverage.is_empty() {
        writeln!(page, "| tried | times | at least |\n|---|---|---|")?;
        for covered in &document.coverage {
            writeln!(
                page,
                "| {} | {} | {} |",
                covered.what, covered.count, covered.least
            )?;
        }
    }
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
