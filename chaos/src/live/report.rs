//! The report of a run on real programs, in the forms that all reports have.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::campaign::Campaign;
use super::cluster::{Ground, Node};
use super::fault::Strike;
use super::judge::Done;
use super::record::{Counts, Event, Record, Request, Sample, What};
use super::scenario::Expect;
use crate::report::markdown;
use crate::report::picture::Colour;
use crate::report::timeline::{BROKEN, Bar, FAULT, FAULT_EDGE, LEADS, Lane, RUNS, Shade, Timeline, WELL};
use crate::report::{self, Covered, Judged, Program, SCHEMA, Verdict};
use crate::rules::{Rule, Violation};

/// Tasks of a worker.
const TASKS: Colour = [120, 170, 120];
/// Requests that were not answered.
const UNANSWERED: Colour = [190, 80, 160];
/// A failed handshake.
const HANDSHAKE: Colour = [110, 60, 160];
/// The first root, the second one, and so on, in turn.
const ROOTS: [Colour; 4] = [[90, 140, 60], [60, 90, 190], [190, 120, 40], [130, 60, 130]];
/// Of each rule that was broken so many times are said.
const SAID: usize = 10;
/// Of all samples of a node the report has so many.
const SAMPLES: usize = 200;
/// The first part of a run in which programs grow to their size, of a hundred.
const WARM_UP: usize = 40;

/// What came of a run.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) nodes: Vec<Node>,
    pub(super) elapsed_us: u64,
    pub(super) done: Vec<Done>,
    pub(super) broken: Vec<Violation>,
    /// Rules that were put to the test.
    pub(super) tried: BTreeSet<Rule>,
    pub(super) record: Arc<Record>,
    /// Control groups of the cluster, which must be gone with it.
    pub(super) groups: Vec<PathBuf>,
}

/// What a node's programs took.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Curve {
    node: String,
    /// How resident memory grew, KiB for each hour, after the first part of the run; nothing: too short to say.
    slope_kib_per_hour: Option<f64>,
    most_kib: u64,
    most_descriptors: u64,
    most_threads: u64,
    samples: Vec<Sample>,
}

/// How long the cluster took to answer a write after faults of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Gaps {
    fault: String,
    count: usize,
    p50_ms: u64,
    p99_ms: u64,
    most_ms: u64,
}

/// The report.
#[derive(Debug, Serialize)]
pub(super) struct Document {
    schema: u32,
    level: &'static str,
    program: Program,
    verdict: Verdict,
    name: String,
    seed: u64,
    topology: Vec<Node>,
    elapsed_us: u64,
    rules: Vec<Judged>,
    operations: Counts,
    leader_changes: usize,
    faults: Vec<Done>,
    gaps: Vec<Gaps>,
    coverage: Vec<Covered>,
    expect: Expect,
    resources: Vec<Curve>,
    events: Vec<Event>,
    planned: Vec<Strike>,
    replay: String,
    #[serde(skip)]
    picture: Timeline,
}

impl Document {
    pub(super) fn new(campaign: &Campaign, run: Run) -> io::Result<Self> {
        let seen = run.record.seen();
        let rules = Rule::OF_PROGRAMS.iter().map(|rule| {
            let of_it = run.broken.iter().filter(|it| it.rule == *rule);
            let evidence = of_it.map(|it| format!("{} ms: {}", it.at_us / 1_000, it.evidence));
            Judged::new(*rule, run.tried.contains(rule), evidence.collect())
        });
        let struck = run.done.iter().filter(|it| it.skipped.is_none()).count() as u64;
        let coverage = vec![
            Covered {
                what: "faults",
                count: struck,
                // Some find nobody to strike, as the leader while there is none.
                least: (campaign.strikes.len() as u64 * 7).div_ceil(10),
            },
            Covered {
                what: "writes acknowledged",
                count: seen.counts.accepted,
                least: if campaign.clients.writers > 0 { 20 } else { 0 },
            },
        ];
        let verdict = report::verdict(!run.broken.is_empty(), &coverage);
        Ok(Self {
            schema: SCHEMA,
            level: match campaign.ground {
                Ground::Namespaces { .. } => "live, network namespaces",
                Ground::Compose { .. } => "live, docker-compose",
                Ground::Context { .. } => "live, a context",
            },
            program: Program::this()?,
            verdict,
            name: campaign.name.clone(),
            seed: campaign.seed,
            rules: rules.collect(),
            operations: seen.counts,
            leader_changes: seen.leaders.len().saturating_sub(1),
            gaps: gaps(&run.done),
            coverage,
            expect: campaign.expect,
            resources: run
                .nodes
                .iter()
                .enumerate()
                .map(|(at, node)| curve(node, seen.samples.get(&at)))
                .collect(),
            events: seen.events.clone(),
            planned: campaign.strikes.clone(),
            replay: campaign.replay.clone(),
            picture: picture(&run, &seen.events, &seen.requests),
            topology: run.nodes.clone(),
            elapsed_us: run.elapsed_us,
            faults: run.done.clone(),
        })
    }

    pub(super) fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// The last line that a user sees.
    pub(super) fn summary(&self) -> String {
        let struck = self.faults.iter().filter(|it| it.skipped.is_none()).count();
        let mut text = format!(
            "{}: {struck} faults in {} s; {} writes acknowledged, {} of unknown outcome, {} reads; {} of {} requests answered; {} leader changes",
            markdown::says(self.verdict),
            self.elapsed_us / 1_000_000,
            self.operations.accepted,
            self.operations.unknown,
            self.operations.reads,
            self.operations.requests - self.operations.unanswered,
            self.operations.requests,
            self.leader_changes,
        );
        for rule in &self.rules {
            for evidence in rule.evidence.iter().take(SAID) {
                // Writing to a string never fails.
                let _written = write!(text, "\nbroken: {}: {evidence}", rule.says);
            }
            if rule.evidence.len() > SAID {
                let _written = write!(text, "\nbroken: {} more times", rule.evidence.len() - SAID);
            }
        }
        text
    }

    /// Writes the folder.
    pub(super) fn write(&self, folder: &Path) -> io::Result<()> {
        let mut page = String::new();
        // Writing to a string never fails.
        let _written = self.page(&mut page);
        report::write(folder, self, &page, &self.picture.draw())
    }

    fn page(&self, page: &mut String) -> std::fmt::Result {
        writeln!(
            page,
            "# {}: {}: {}\n",
            self.level,
            self.name,
            markdown::says(self.verdict)
        )?;
        let managers = self.topology.iter().filter(|node| node.manager).count();
        writeln!(
            page,
            "{managers} managers and {} workers for {} s, seed {}. {}\n",
            self.topology.len() - managers,
            self.elapsed_us / 1_000_000,
            self.seed,
            self.program
        )?;
        markdown::rules(page, &self.rules)?;
        let it = &self.operations;
        writeln!(
            page,
            "\nOperations: {} writes acknowledged, {} refused, {} of unknown outcome, {} sent again; {} reads, {} not answered. \
             Requests to services: {}, {} not answered. Leader changes: {}.\n",
            it.accepted,
            it.refused,
            it.unknown,
            it.repeats,
            it.reads,
            it.unread,
            it.requests,
            it.unanswered,
            self.leader_changes
        )?;
        markdown::covered(page, &self.coverage)?;
        writeln!(page, "\n![a lane for each node, with its faults](timeline.svg)\n")?;
        writeln!(page, "From a fault to the next write that is acknowledged:\n")?;
        writeln!(
            page,
            "| fault | times | p50 | p99 | most |\n|---|---|---|---|---|"
        )?;
        for it in &self.gaps {
            writeln!(
                page,
                "| {} | {} | {} ms | {} ms | {} ms |",
                it.fault, it.count, it.p50_ms, it.p99_ms, it.most_ms
            )?;
        }
        writeln!(
            page,
            "\n| node | memory, most | grows by, each hour | descriptors | threads |\n|---|---|---|---|---|"
        )?;
        for it in &self.resources {
            let slope = it
                .slope_kib_per_hour
                .map_or("-".to_owned(), |it| format!("{it:.0} KiB"));
            writeln!(
                page,
                "| {} | {} KiB | {slope} | {} | {} |",
                it.node, it.most_kib, it.most_descriptors, it.most_threads
            )?;
        }
        writeln!(
            page,
            "\n| # | fault | of | from | to | taken back by | next write |\n|---|---|---|---|---|---|---|"
        )?;
        for it in &self.faults {
            let (of, undo) = match &it.skipped {
                Some(why) => (format!("left out: {why}"), "-"),
                None if it.nodes.is_empty() => ("all".to_owned(), it.undo),
                None => (it.nodes.join(", "), it.undo),
            };
            let gap = it
                .gap_us
                .map_or("-".to_owned(), |it| format!("{} ms", it / 1_000));
            writeln!(
                page,
                "| {} | {} | {} | {} ms | {} ms | {undo} | {gap} |",
                it.number,
                it.fault,
                of.replace('|', "\\|"),
                it.start_us / 1_000,
                it.end_us / 1_000
            )?;
        }
        writeln!(
            page,
            "\nTo run it again (the same faults; when exactly they strike is the machine's):\n\n    {}",
            self.replay
        )
    }
}

fn gaps(done: &[Done]) -> Vec<Gaps> {
    let mut by: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for one in done {
        if let Some(gap) = one.gap_us.filter(|_| one.skipped.is_none()) {
            let whom = if one.nodes.is_empty() {
                String::new()
            } else {
                format!(" of {}", one.target)
            };
            by.entry(format!("{}{whom}", one.fault))
                .or_default()
                .push(gap / 1_000);
        }
    }
    by.into_iter()
        .map(|(fault, mut all)| {
            all.sort_unstable();
            let at = |share: usize| all[(all.len() * share / 100).min(all.len() - 1)];
            Gaps {
                fault,
                count: all.len(),
                p50_ms: at(50),
                p99_ms: at(99),
                most_ms: at(100),
            }
        })
        .collect()
}

fn curve(node: &Node, samples: Option<&Vec<Sample>>) -> Curve {
    let samples = samples.map(Vec::as_slice).unwrap_or_default();
    let most = |of: fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or_default();
    let every = samples.len().div_ceil(SAMPLES).max(1);
    Curve {
        node: node.name.clone(),
        slope_kib_per_hour: slope(samples),
        most_kib: most(|it| it.resident_kib),
        most_descriptors: most(|it| it.descriptors),
        most_threads: most(|it| it.threads),
        samples: samples.iter().step_by(every).copied().collect(),
    }
}

/// How memory grows after the first part, by least squares. A program that started again is another one.
fn slope(samples: &[Sample]) -> Option<f64> {
    let rest = &samples[samples.len() * WARM_UP / 100..];
    if rest.len() < 30 {
        return None;
    }
    let x = |it: &Sample| it.at_us as f64 / 3.6e9;
    let count = rest.len() as f64;
    let mean = |of: &dyn Fn(&Sample) -> f64| rest.iter().map(of).sum::<f64>() / count;
    let (mean_x, mean_y) = (mean(&x), mean(&|it| it.resident_kib as f64));
    let up: f64 = rest
        .iter()
        .map(|it| (x(it) - mean_x) * (it.resident_kib as f64 - mean_y))
        .sum();
    let down: f64 = rest.iter().map(|it| (x(it) - mean_x).powi(2)).sum();
    (down > 0.0).then_some(up / down)
}

fn picture(run: &Run, events: &[Event], requests: &[Request]) -> Timeline {
    let end = run.elapsed_us;
    let mut lanes: Vec<Lane> = run
        .nodes
        .iter()
        .enumerate()
        .map(|(at, node)| Lane {
            name: node.name.clone(),
            bars: bars(at, events, end),
            thin: unanswered(at, requests),
            marks: marks(at, events),
            words: tasks(at, events),
        })
        .collect();
    lanes.push(roots(events, end));
    let shade = |it: &Done| Shade {
        number: u32::try_from(it.number).unwrap_or(u32::MAX),
        lanes: it
            .nodes
            .iter()
            .filter_map(|name| run.nodes.iter().position(|node| node.name == *name))
            .collect(),
        from_us: it.start_us,
        to_us: it.end_us.min(end),
    };
    let well = events
        .iter()
        .filter(|it| it.what == What::AllIsWell)
        .map(|it| (it.at_us, WELL));
    let mut legend = vec![
        (RUNS, "the node's program runs"),
        (LEADS, "it leads"),
        (TASKS, "a worker's program runs; the number is that of its tasks"),
        (UNANSWERED, "thin: requests to services there are not answered"),
        (FAULT, "a fault lasts: of these nodes, or of all"),
        (FAULT_EDGE, "a strike, with its number in the report"),
        (HANDSHAKE, "a handshake between nodes failed"),
        (WELL, "all faults are taken back"),
        (BROKEN, "a rule was broken"),
    ];
    let names = [
        "root: the first one signs; the fifth, the ninth",
        "root: the second one; the sixth, and so on",
        "root: the third one",
        "root: the fourth one",
    ];
    legend.extend(ROOTS.into_iter().zip(names));
    Timeline {
        length_us: end,
        lanes,
        shades: run
            .done
            .iter()
            .filter(|it| it.skipped.is_none())
            .map(shade)
            .collect(),
        lines: well
            .chain(run.broken.iter().map(|it| (it.at_us, BROKEN)))
            .collect(),
        legend: legend
            .into_iter()
            .map(|(colour, words)| (colour, words.to_owned()))
            .collect(),
    }
}

/// From when to when a node's program ran, and whether it led.
fn bars(at: usize, events: &[Event], end: u64) -> Vec<Bar> {
    let works = events
        .iter()
        .any(|it| matches!(it.what, What::Tasks { node, .. } if node == at));
    let plain = if works { TASKS } else { RUNS };
    let mut bars = Vec::new();
    let mut open: Option<(u64, Colour)> = None;
    for event in events {
        let next = match &event.what {
            What::Runs { node } if *node == at => Some(plain),
            What::Follows { node } if *node == at && open.is_some() => Some(plain),
            What::Leads { node, .. } if *node == at => Some(LEADS),
            What::Ends { node, .. } if *node == at => None,
            _ => continue,
        };
        if let Some((from_us, colour)) = open.take() {
            bars.push(Bar {
                from_us,
                to_us: event.at_us,
                colour,
            });
        }
        open = next.map(|colour| (event.at_us, colour));
    }
    bars.extend(open.map(|(from_us, colour)| Bar {
        from_us,
        to_us: end,
        colour,
    }));
    bars
}

fn tasks(at: usize, events: &[Event]) -> Vec<(u64, String)> {
    let of_it = events.iter().filter_map(|it| match it.what {
        What::Tasks { node, count } if node == at => Some((it.at_us, count.to_string())),
        _ => None,
    });
    of_it.collect()
}

fn marks(at: usize, events: &[Event]) -> Vec<(u64, Colour)> {
    let failed = |it: &&Event| matches!(it.what, What::HandshakeFailed { node, .. } if node == at);
    events
        .iter()
        .filter(failed)
        .map(|it| (it.at_us, HANDSHAKE))
        .collect()
}

/// Spans in which requests to a node were not answered, joined where nothing else is between them.
fn unanswered(at: usize, requests: &[Request]) -> Vec<Bar> {
    let mut bars: Vec<Bar> = Vec::new();
    let mut open: Option<u64> = None;
    for request in requests.iter().filter(|it| it.node == Some(at)) {
        match (request.answered, open) {
            (false, None) => open = Some(request.at_us),
            (true, Some(from_us)) => {
                bars.push(Bar {
                    from_us,
                    to_us: request.at_us,
                    colour: UNANSWERED,
                });
                open = None;
            }
            _ => {}
        }
    }
    let last = requests.iter().map(|it| it.at_us).max().unwrap_or_default();
    bars.extend(open.map(|from_us| Bar {
        from_us,
        to_us: last,
        colour: UNANSWERED,
    }));
    bars
}

/// Which root signs, from when on.
fn roots(events: &[Event], end: u64) -> Lane {
    let named: Vec<(u64, &String)> = events
        .iter()
        .filter_map(|it| match &it.what {
            What::Issuer { root } => Some((it.at_us, root)),
            _ => None,
        })
        .collect();
    let bars = named.iter().enumerate().map(|(at, (from_us, _))| Bar {
        from_us: *from_us,
        to_us: named.get(at + 1).map_or(end, |it| it.0),
        colour: ROOTS[at % ROOTS.len()],
    });
    Lane {
        name: "root".into(),
        bars: bars.collect(),
        ..Lane::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at_us: u64, what: What) -> Event {
        Event { at_us, what }
    }

    #[test]
    fn a_lane_shows_programs_leaders_tasks_and_silence() {
        let events = [
            event(0, What::Runs { node: 0 }),
            event(0, What::Runs { node: 1 }),
            event(5, What::Leads { node: 0, term: 1 }),
            event(6, What::Tasks { node: 1, count: 2 }),
            event(
                9,
                What::Ends {
                    node: 0,
                    how: "killed".into(),
                },
            ),
            event(9, What::Follows { node: 0 }),
            event(20, What::Runs { node: 0 }),
        ];
        let found = |at| -> Vec<(u64, u64, Colour)> {
            bars(at, &events, 30)
                .into_iter()
                .map(|it| (it.from_us, it.to_us, it.colour))
                .collect()
        };
        assert_eq!(found(0), [(0, 5, RUNS), (5, 9, LEADS), (20, 30, RUNS)]);
        assert_eq!(found(1), [(0, 30, TASKS)]);
        assert_eq!(tasks(1, &events), [(6, "2".to_owned())]);
        let request = |at_us, answered| Request {
            node: Some(1),
            at_us,
            answered,
        };
        let requests = [
            request(1, true),
            request(2, false),
            request(3, false),
            request(4, true),
            request(5, false),
        ];
        let spans: Vec<(u64, u64)> = unanswered(1, &requests)
            .iter()
            .map(|it| (it.from_us, it.to_us))
            .collect();
        assert_eq!(spans, [(2, 4), (5, 5)]);
        assert_eq!(unanswered(0, &requests), []);
    }

    #[test]
    fn a_slope_is_that_of_the_later_part() {
        let sample = |at: u64, resident_kib| Sample {
            at_us: at * 1_000_000,
            resident_kib,
            descriptors: 1,
            threads: 1,
        };
        let grows: Vec<Sample> = (0..360)
            .map(|at| sample(at * 10, 1_000 + at.min(100) * 50))
            .collect();
        assert!(
            slope(&grows).expect("long").abs() < 1.0,
            "it grew at the beginning alone"
        );
        let leaks: Vec<Sample> = (0..360).map(|at| sample(at * 10, 1_000 + at)).collect();
        let found = slope(&leaks).expect("long");
        assert!((359.0..361.0).contains(&found), "{found}");
        assert_eq!(slope(&leaks[..40]), None);
    }
}
