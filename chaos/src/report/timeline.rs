//! One picture of a run: a lane for each node with its program and its leadership, faults behind them, broken rules on
//! top.

use super::picture::{Colour, LETTER, Picture};
use super::spans::Span;
use crate::rules::Violation;
use crate::sim::{Event, What};

const WIDTH: u32 = 1_200;
const RIGHT: u32 = 10;
const TOP: u32 = 24;
const LANE: u32 = 30;
const BAR: u32 = 14;
/// Below the main bar of a lane.
const THIN: u32 = 4;
const LEGEND_ROW: u32 = 18;
/// Numbers of strikes that would cover each other stand below each other.
const ROWS: u32 = 3;
/// More lanes are not to be told apart.
const LANES: usize = 64;

pub(crate) const INK: Colour = [40, 40, 40];
pub(crate) const RUNS: Colour = [150, 180, 205];
pub(crate) const LEADS: Colour = [25, 90, 160];
pub(crate) const FAULT: Colour = [253, 235, 208];
pub(crate) const FAULT_EDGE: Colour = [220, 130, 30];
pub(crate) const WELL: Colour = [60, 150, 80];
pub(crate) const BROKEN: Colour = [200, 20, 40];
const GRID: Colour = [225, 225, 225];

/// A bar of a lane, from when to when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bar {
    pub(crate) from_us: u64,
    pub(crate) to_us: u64,
    pub(crate) colour: Colour,
}

/// What one node, or something else of the run, did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lane {
    pub(crate) name: String,
    pub(crate) bars: Vec<Bar>,
    /// Thin ones, below.
    pub(crate) thin: Vec<Bar>,
    /// Moments.
    pub(crate) marks: Vec<(u64, Colour)>,
    /// Words, each from its moment on.
    pub(crate) words: Vec<(u64, String)>,
}

/// A fault: in these lanes, or in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shade {
    pub(crate) number: u32,
    pub(crate) lanes: Vec<usize>,
    pub(crate) from_us: u64,
    pub(crate) to_us: u64,
}

/// All that a picture shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timeline {
    pub(crate) length_us: u64,
    pub(crate) lanes: Vec<Lane>,
    pub(crate) shades: Vec<Shade>,
    /// Lines through all lanes.
    pub(crate) lines: Vec<(u64, Colour)>,
    /// What each colour means.
    pub(crate) legend: Vec<(Colour, String)>,
}

impl Timeline {
    /// The picture.
    pub(crate) fn draw(&self) -> Picture {
        let lanes = &self.lanes[..self.lanes.len().min(LANES)];
        let longest = lanes.iter().map(|lane| lane.name.len()).max().unwrap_or_default();
        let left = 16 + u32::try_from(longest).unwrap_or(0) * LETTER.0;
        let count = u32::try_from(lanes.len()).unwrap_or(0);
        let labels = TOP + count * LANE + 4;
        let legend_rows = u32::try_from(self.legend.len().div_ceil(2)).unwrap_or(0);
        let mut picture = Picture::new(WIDTH, labels + ROWS * 14 + 22 + legend_rows * LEGEND_ROW);
        let length = self.length_us.max(1);
        let x = |at_us: u64| {
            let along = u64::from(WIDTH - left - RIGHT) * at_us.min(length) / length;
            left + u32::try_from(along).unwrap_or(0)
        };
        let y = |lane: usize| TOP + u32::try_from(lane).unwrap_or(0) * LANE;
        for shade in &self.shades {
            let (from, to) = (x(shade.from_us), x(shade.to_us));
            if shade.lanes.is_empty() {
                picture.fill((from, TOP), (to - from, count * LANE), FAULT);
            }
            for lane in shade.lanes.iter().filter(|lane| **lane < lanes.len()) {
                picture.fill((from, y(*lane)), (to - from, LANE), FAULT);
            }
        }
        let seconds = self.length_us / 1_000_000;
        for second in (0..=seconds).filter(|second| second % (1 + seconds / 12) == 0) {
            let at = x(second * 1_000_000);
            picture.fill((at, TOP), (1, count * LANE), GRID);
            let label = format!("{second} s");
            let wide = u32::try_from(label.len()).unwrap_or(0) * LETTER.0;
            picture.words(((at + 2).min(WIDTH - wide), TOP - LETTER.1 - 2), &label, INK);
        }
        for shade in &self.shades {
            let from = x(shade.from_us);
            picture.fill((from, TOP), (1, count * LANE + 4), FAULT_EDGE);
            let row = shade.number % ROWS;
            picture.words((from, labels + row * 14), &shade.number.to_string(), FAULT_EDGE);
        }
        for (at, lane) in lanes.iter().enumerate() {
            let top = y(at) + (LANE - BAR) / 2 - 2;
            picture.words((8, top), &lane.name, INK);
            for (bars, top, height) in [(&lane.bars, top, BAR), (&lane.thin, top + BAR + 1, THIN)] {
                for bar in bars {
                    let (from, to) = (x(bar.from_us), x(bar.to_us));
                    picture.fill((from, top), (to.saturating_sub(from), height), bar.colour);
                }
            }
            for (moment, words) in &lane.words {
                let wide = u32::try_from(words.len()).unwrap_or(0) * LETTER.0;
                picture.words(
                    ((x(*moment) + 2).min(WIDTH.saturating_sub(wide)), top),
                    words,
                    INK,
                );
            }
            for (moment, colour) in &lane.marks {
                picture.fill((x(*moment).saturating_sub(1), y(at)), (3, LANE), *colour);
            }
        }
        for (at_us, colour) in &self.lines {
            picture.fill(
                (x(*at_us).saturating_sub(1), TOP - 6),
                (3, count * LANE + 10),
                *colour,
            );
        }
        for (at, (colour, words)) in (0_u32..).zip(&self.legend) {
            let (column, row) = (at % 2, at / 2);
            let (x, y) = (left + column * 560, labels + ROWS * 14 + 10 + row * LEGEND_ROW);
            picture.fill((x, y), (14, 12), *colour);
            picture.words((x + 20, y), words, INK);
        }
        picture
    }
}

/// What a picture of a simulated run of so many members shows.
pub(super) fn of_simulation(
    members: u64,
    elapsed_us: u64,
    events: &[Event],
    spans: &[Span],
    broken: &[Violation],
) -> Timeline {
    let lane = |member| {
        let bar = |(from_us, to_us, leads)| Bar {
            from_us,
            to_us,
            colour: if leads { LEADS } else { RUNS },
        };
        Lane {
            name: format!("m{member}"),
            bars: bars(member, elapsed_us, events).into_iter().map(bar).collect(),
            ..Lane::default()
        }
    };
    // What hits one member is behind its own lane.
    let of = |member: u64| usize::try_from(member - 1).ok();
    let shade = |span: &Span| Shade {
        number: span.number,
        lanes: span.member.and_then(of).into_iter().collect(),
        from_us: span.start_us,
        to_us: span.end_us,
    };
    let well = events.iter().filter(|it| it.what == What::AllIsWell);
    let well = well.map(|event| (event.at_us, WELL));
    let legend = [
        (RUNS, "program runs"),
        (LEADS, "leads"),
        (FAULT, "a fault lasts: of one member, or of all"),
        (FAULT_EDGE, "a strike, with its number in the report"),
        (WELL, "all faults are taken back"),
        (BROKEN, "a rule was broken"),
    ];
    Timeline {
        length_us: elapsed_us,
        lanes: (1..=members).map(lane).collect(),
        shades: spans.iter().map(shade).collect(),
        lines: well.chain(broken.iter().map(|it| (it.at_us, BROKEN))).collect(),
        legend: legend.map(|(colour, words)| (colour, words.to_owned())).to_vec(),
    }
}

/// From when to when a member's program ran, and whether it led.
fn bars(member: u64, elapsed_us: u64, events: &[Event]) -> Vec<(u64, u64, bool)> {
    let mut bars = Vec::new();
    let mut open: Option<(u64, bool)> = None;
    for event in events {
        let next = match event.what {
            What::Runs { member: its } | What::Follows { member: its } if its == member => Some(false),
            What::Leads { member: its, .. } if its == member => Some(true),
            What::Ends { member: its } if its == member => None,
            _ => continue,
        };
        if let Some((from, leads)) = open.take() {
            bars.push((from, event.at_us, leads));
        }
        open = next.map(|leads| (event.at_us, leads));
    }
    bars.extend(open.map(|(from, leads)| (from, elapsed_us, leads)));
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_has_a_bar_while_its_program_runs_and_another_while_it_leads() {
        let event = |at_us, what| Event { at_us, what };
        let events = [
            event(10, What::Runs { member: 1 }),
            event(15, What::Runs { member: 2 }),
            event(20, What::Leads { member: 1, term: 1 }),
            event(30, What::Ends { member: 1 }),
            event(50, What::Runs { member: 1 }),
        ];
        assert_eq!(
            bars(1, 90, &events),
            [(10, 20, false), (20, 30, true), (50, 90, false)]
        );
        assert_eq!(bars(3, 90, &events), []);
    }
}
