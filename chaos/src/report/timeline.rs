//! One picture of a run: a lane for each member with its program and its leadership, faults behind them, broken rules on
//! top.

use super::picture::{Colour, LETTER, Picture};
use super::spans::Span;
use crate::rules::Violation;
use crate::sim::{Event, What};

const WIDTH: u32 = 1_200;
const LEFT: u32 = 60;
const TOP: u32 = 24;
const LANE: u32 = 30;
const BAR: u32 = 14;
const LEGEND: u32 = 3 * 18;

const INK: Colour = [40, 40, 40];
const RUNS: Colour = [150, 180, 205];
const LEADS: Colour = [25, 90, 160];
const FAULT: Colour = [253, 235, 208];
const FAULT_EDGE: Colour = [220, 130, 30];
const WELL: Colour = [60, 150, 80];
const BROKEN: Colour = [200, 20, 40];
const GRID: Colour = [225, 225, 225];

/// Draws a run of so many members that took so long.
pub(super) fn draw(
    members: u64,
    elapsed_us: u64,
    events: &[Event],
    spans: &[Span],
    broken: &[Violation],
) -> Picture {
    let members = u32::try_from(members).unwrap_or(u32::MAX).min(64);
    let foot = TOP + members * LANE;
    // Numbers of strikes that would cover each other stand below each other.
    let rows = 3;
    let labels = foot + 4;
    let mut picture = Picture::new(WIDTH, labels + rows * 14 + 22 + LEGEND);
    let x = |at_us: u64| {
        let width = u64::from(WIDTH - LEFT - 10);
        LEFT + u32::try_from(at_us.min(elapsed_us) * width / elapsed_us.max(1)).unwrap_or(0)
    };
    for span in spans {
        let (from, to) = (x(span.start_us), x(span.end_us));
        // What hits one member is behind its own lane.
        let (lane, lanes) = match span.member.map(|member| u32::try_from(member - 1)) {
            Some(Ok(lane)) if lane < members => (lane, 1),
            _ => (0, members),
        };
        picture.fill((from, TOP + lane * LANE), (to - from, lanes * LANE), FAULT);
    }
    let seconds = elapsed_us / 1_000_000;
    for second in 0..=seconds {
        if second % (1 + seconds / 12) == 0 {
            let at = x(second * 1_000_000);
            picture.fill((at, TOP), (1, members * LANE), GRID);
            picture.words((at + 2, TOP - LETTER.1 - 2), &format!("{second} s"), INK);
        }
    }
    for span in spans {
        let from = x(span.start_us);
        picture.fill((from, TOP), (1, members * LANE + 4), FAULT_EDGE);
        let row = span.number % rows;
        picture.words((from, labels + row * 14), &span.number.to_string(), FAULT_EDGE);
    }
    for lane in 0..members {
        let member = u64::from(lane) + 1;
        let y = TOP + lane * LANE + (LANE - BAR) / 2;
        picture.words((8, y), &format!("m{member}"), INK);
        for (from, to, leads) in bars(member, elapsed_us, events) {
            let (from, to) = (x(from), x(to));
            let colour = if leads { LEADS } else { RUNS };
            picture.fill((from, y), (to - from, BAR), colour);
        }
    }
    for event in events.iter().filter(|it| it.what == What::AllIsWell) {
        picture.fill((x(event.at_us), TOP), (2, members * LANE), WELL);
    }
    for violation in broken {
        picture.fill(
            (x(violation.at_us).saturating_sub(1), TOP - 6),
            (3, members * LANE + 10),
            BROKEN,
        );
    }
    legend(&mut picture, labels + rows * 14 + 10);
    picture
}

fn legend(picture: &mut Picture, y: u32) {
    let entries: [(Colour, &str); 6] = [
        (RUNS, "program runs"),
        (LEADS, "leads"),
        (FAULT, "a fault lasts: of one member, or of all"),
        (FAULT_EDGE, "a strike, with its number in the report"),
        (WELL, "all faults are taken back"),
        (BROKEN, "a rule was broken"),
    ];
    for (at, (colour, words)) in (0_u32..).zip(entries) {
        let (column, row) = (at % 2, at / 2);
        let x = LEFT + column * 560;
        picture.fill((x, y + row * 18), (14, 12), colour);
        picture.words((x + 20, y + row * 18), words, INK);
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
