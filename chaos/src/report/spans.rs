//! From when to when each fault lasted, and what ended it.

use serde::Serialize;

use crate::sim::{Event, Fault, What};

/// A fault of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Span {
    /// The number of its strike.
    pub(super) number: u32,
    /// Which.
    pub(super) fault: Fault,
    /// Whom it hit; nobody: the network, or all.
    pub(super) member: Option<u64>,
    /// When it began, in microseconds since the run began.
    pub(super) start_us: u64,
    /// When it was over.
    pub(super) end_us: u64,
    /// What ended it.
    pub(super) undone_by: &'static str,
}

/// The faults of these events, of a run that took so long.
pub(super) fn spans(events: &[Event], elapsed_us: u64) -> Vec<Span> {
    let mut spans = Vec::new();
    for (at, event) in events.iter().enumerate() {
        let What::Strike {
            number,
            fault,
            member,
        } = event.what
        else {
            continue;
        };
        if matches!(fault, Fault::Heal | Fault::Restart) {
            continue;
        }
        let end = events[at + 1..]
            .iter()
            .find_map(|later| Some((later.at_us, ends(fault, member, &later.what)?)));
        let (end_us, undone_by) = match fault {
            // They are over as soon as they were done.
            Fault::HandOver | Fault::PowerLossOfAll | Fault::DiskLost => (event.at_us, "itself"),
            _ => end.unwrap_or((elapsed_us, "the end of the run")),
        };
        spans.push(Span {
            number,
            fault,
            member,
            start_us: event.at_us,
            end_us,
            undone_by,
        });
    }
    spans
}

/// Whether, and as what, an event ends a fault.
fn ends(fault: Fault, member: Option<u64>, event: &What) -> Option<&'static str> {
    let of_network = fault.is_of_network();
    let of_program = matches!(fault, Fault::Kill | Fault::KillLeader | Fault::PowerLoss);
    // A program that ended is not stopped any more, and its disk not busy.
    let of_life = matches!(fault, Fault::Pause | Fault::PauseLeader | Fault::DiskStall);
    match event {
        What::Runs { member: again } if of_program && Some(*again) == member => Some("a restart"),
        What::AllIsWell if !of_program => Some("the final heal"),
        What::Strike {
            fault: Fault::Heal, ..
        } if !of_program => Some("a heal"),
        // There is one partition at a time.
        What::Strike { fault: next, .. } if of_network && next.is_of_network() => Some("the next partition"),
        What::Ends { member: ended } if of_life && Some(*ended) == member => Some("its end"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_lasts_until_what_ends_its_kind() {
        let strike = |at_us, number, fault, member| Event {
            at_us,
            what: What::Strike {
                number,
                fault,
                member,
            },
        };
        let events = [
            strike(1, 1, Fault::Split, None),
            strike(2, 2, Fault::Kill, Some(3)),
            strike(3, 3, Fault::Storm, None),
            strike(4, 4, Fault::OneWay, Some(1)),
            Event {
                at_us: 5,
                what: What::Runs { member: 2 },
            },
            strike(6, 5, Fault::Heal, None),
            Event {
                at_us: 7,
                what: What::Runs { member: 3 },
            },
            strike(8, 6, Fault::KillLeader, Some(1)),
            strike(9, 7, Fault::HandOver, Some(2)),
        ];
        let found: Vec<_> = spans(&events, 10)
            .into_iter()
            .map(|it| (it.number, it.start_us, it.end_us, it.undone_by))
            .collect();
        assert_eq!(
            found,
            [
                (1, 1, 4, "the next partition"),
                (2, 2, 7, "a restart"),
                (3, 3, 6, "a heal"),
                (4, 4, 6, "a heal"),
                (6, 8, 10, "the end of the run"),
                (7, 9, 9, "itself"),
            ]
        );
    }
}
