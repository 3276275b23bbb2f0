use proptest::prelude::*;
use todc_utils::specifications::Specification;
use todc_utils::{Action as Entry, History, WGLChecker};

use super::linearize::{Verdict, check as linearize};
use super::order::{Broken, check as order};
use super::*;

const BUDGET: usize = 1_000_000;

fn swap(called: u64, returned: u64, from: Option<u64>, to: u64) -> Operation {
    Operation {
        called,
        returned,
        action: Action::Swap { from, to },
        told: Told::Done,
        index: None,
    }
}

fn read(called: u64, returned: u64, value: Option<u64>) -> Operation {
    Operation {
        action: Action::Read { value },
        ..swap(called, returned, None, 0)
    }
}

fn told(told: Told, operation: Operation) -> Operation {
    Operation { told, ..operation }
}

fn at(index: u64, operation: Operation) -> Operation {
    Operation {
        index: Some(index),
        ..operation
    }
}

#[test]
fn hand_made_histories_are_judged_as_they_should_be() {
    let good = [
        vec![],
        vec![read(0, 1, None)],
        vec![swap(0, 1, None, 1), read(2, 3, Some(1))],
        // A read that overlaps a write sees it or not; two reads may differ, in one order.
        vec![swap(0, 9, None, 1), read(1, 2, None), read(3, 4, Some(1))],
        // Of unknown outcome: done late, or never.
        vec![
            told(Told::Unknown, swap(0, 0, None, 1)),
            read(5, 6, None),
            read(7, 8, Some(1)),
        ],
        vec![
            told(Told::Unknown, swap(0, 0, None, 1)),
            read(5, 6, None),
            swap(7, 8, None, 2),
        ],
        // Refused, since the other one came first.
        vec![
            swap(0, 5, None, 1),
            told(Told::Stale, swap(1, 6, None, 2)),
            read(7, 8, Some(1)),
        ],
    ];
    for history in good {
        assert_eq!(linearize(&history, BUDGET), Verdict::Linearizable, "{history:?}");
    }
    let bad = [
        // A stale read; a read of what nobody wrote; a read before the write was asked for.
        (vec![swap(0, 1, None, 1), read(2, 3, None)], 1),
        (vec![read(0, 1, Some(7))], 0),
        (vec![read(0, 1, Some(1)), swap(2, 3, None, 1)], 0),
        // Back in time, within one client or between two.
        (
            vec![swap(0, 9, None, 1), read(1, 2, Some(1)), read(3, 4, None)],
            2,
        ),
        // Two that won on one value.
        (
            vec![
                swap(0, 1, None, 1),
                swap(2, 8, Some(1), 2),
                swap(3, 9, Some(1), 3),
            ],
            2,
        ),
        // An unknown one counts once.
        (
            vec![
                told(Told::Unknown, swap(0, 0, None, 1)),
                swap(1, 2, Some(1), 2),
                swap(3, 4, Some(2), 3),
                read(5, 6, Some(1)),
            ],
            3,
        ),
        // Refused although nothing else was there.
        (vec![told(Told::Stale, swap(0, 1, None, 1))], 0),
    ];
    for (history, number) in bad {
        assert_eq!(
            linearize(&history, BUDGET),
            Verdict::Broken(number),
            "{history:?}"
        );
    }
}

#[test]
fn a_budget_that_is_used_up_is_no_pass() {
    let many: Vec<Operation> = (1..30)
        .map(|n| told(Told::Unknown, swap(0, 0, Some(n - 1), n)))
        .collect();
    let history = [&[swap(0, 1, None, 0)], many.as_slice(), &[read(2, 3, Some(29))]].concat();
    assert_eq!(linearize(&history, 10), Verdict::Unknown);
    assert_eq!(linearize(&history, BUDGET), Verdict::Linearizable);
}

#[test]
fn indexes_must_make_sense_and_fit_the_times() {
    let written = at(5, swap(0, 1, None, 1));
    assert_eq!(order(&[written, at(5, read(2, 3, Some(1)))]), Ok(()));
    assert_eq!(order(&[written, at(4, read(0, 3, None))]), Ok(()));
    assert_eq!(
        order(&[written, at(4, read(2, 3, None))]),
        Err(Broken::Time(0, 1))
    );
    assert_eq!(order(&[written, at(6, read(2, 3, None))]), Err(Broken::Answer(1)));
    assert_eq!(
        order(&[written, at(9, swap(2, 3, None, 2))]),
        Err(Broken::Answer(1))
    );
    // As a write that was sent more than once: it was made, and its answer does not say at which index.
    let somewhere = swap(2, 3, Some(1), 2);
    assert_eq!(order(&[written, somewhere, at(7, read(4, 5, Some(2)))]), Ok(()));
    assert_eq!(
        order(&[written, somewhere, at(7, read(4, 5, Some(3)))]),
        Err(Broken::Answer(2))
    );
    let unknown = told(Told::Unknown, swap(0, 0, Some(1), 2));
    assert_eq!(order(&[written, unknown, at(7, read(2, 3, Some(2)))]), Ok(()));
    assert_eq!(
        order(&[
            written,
            unknown,
            at(7, read(2, 3, Some(2))),
            at(8, read(4, 5, Some(1)))
        ]),
        Err(Broken::Answer(3))
    );
}

/// Every order there is, one after the other: slow, and plainly right.
fn by_all_orders(operations: &[Operation], placed: &mut Vec<usize>, value: Option<u64>) -> bool {
    let open: Vec<usize> = (0..operations.len())
        .filter(|number| !placed.contains(number))
        .collect();
    if open
        .iter()
        .all(|number| operations[*number].told == Told::Unknown)
    {
        return true;
    }
    for &number in &open {
        let operation = &operations[number];
        // Whatever had its answer before this one was asked for is before it.
        let too_early = open.iter().any(|&other| {
            other != number
                && operations[other].told != Told::Unknown
                && operations[other].returned < operation.called
        });
        if too_early {
            continue;
        }
        if let Some(next) = step(value, operation) {
            placed.push(number);
            let found = by_all_orders(operations, placed, next);
            placed.pop();
            if found {
                return true;
            }
        }
    }
    false
}

/// The register, as another checker takes it.
struct Register;

impl Specification for Register {
    type State = Option<u64>;
    type Operation = Operation;

    fn init() -> Option<u64> {
        None
    }

    fn apply(operation: &Operation, value: &Option<u64>) -> (bool, Option<u64>) {
        step(*value, operation).map_or((false, *value), |next| (true, next))
    }
}

/// What a published checker says (`todc-utils`: Wing and Gong's search as Horn and Kroening describe it). It knows no unknown
/// outcomes: each such operation has an answer in the end, or is left out.
fn by_another_checker(operations: &[Operation]) -> bool {
    let unknown = operations.iter().filter(|it| it.told == Told::Unknown).count();
    (0..1_u32 << unknown).any(|done| {
        let mut nth = 0;
        let mut entries = Vec::new();
        for (number, operation) in operations.iter().enumerate() {
            let mut returned = operation.returned;
            if operation.told == Told::Unknown {
                nth += 1;
                if done >> (nth - 1) & 1 == 0 {
                    continue;
                }
                returned = u64::MAX;
            }
            entries.push((operation.called, false, number));
            entries.push((returned, true, number));
        }
        entries.sort_unstable();
        let entry = |(_, returns, number): (u64, bool, usize)| {
            let operation = operations[number];
            let entry = match returns {
                true => Entry::Response(operation),
                false => Entry::Call(operation),
            };
            (number, entry)
        };
        // It takes no history without any operation.
        entries.is_empty()
            || WGLChecker::<Register>::is_linearizable(History::from_actions(
                entries.into_iter().map(entry).collect(),
            ))
    })
}

prop_compose! {
    fn operation()(
        called in 0..12_u64,
        takes in 0..6_u64,
        kind in 0..3,
        from in prop::option::of(1..4_u64),
        to in 1..4_u64,
        outcome in prop::sample::select(vec![Told::Done, Told::Done, Told::Stale, Told::Unknown]),
    ) -> Operation {
        match kind {
            0 => read(called, called + takes, from),
            _ => told(outcome, swap(called, called + takes, from, to)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_search_agrees_with_trying_every_order(history in prop::collection::vec(operation(), 0..7)) {
        let expected = by_all_orders(&history, &mut Vec::new(), None);
        let found = linearize(&history, BUDGET);
        prop_assert_eq!(found == Verdict::Linearizable, expected, "{:?}", found);
        prop_assert_ne!(found, Verdict::Unknown);
    }

    /// Longer ones than can be tried in every order: what a register did, with some answers changed and some not known.
    #[test]
    fn the_search_agrees_with_a_published_checker(
        steps in prop::collection::vec((0..3_u8, 0..40_u64, 0..40_u64, 0..12_u8), 0..24),
    ) {
        let (mut value, mut unknown, mut history) = (None, 0, Vec::new());
        for (number, (kind, before, after, luck)) in steps.into_iter().enumerate() {
            let (time, to) = (10 * number as u64 + 40, number as u64 + 1);
            let (called, returned) = (time - before, time + after);
            let seen = if luck == 0 { Some(to / 2) } else { value };
            match kind {
                0 => history.push(read(called, returned, seen)),
                1 if luck < 4 && unknown < 6 => {
                    unknown += 1;
                    history.push(told(Told::Unknown, swap(called, returned, value, to)));
                    if luck > 1 {
                        value = Some(to);
                    }
                }
                1 => {
                    history.push(swap(called, returned, seen, to));
                    value = Some(to);
                }
                _ => history.push(told(Told::Stale, swap(called, returned, Some(1_000), to))),
            }
        }
        let found = linearize(&history, BUDGET);
        prop_assert_ne!(found, Verdict::Unknown);
        prop_assert_eq!(found == Verdict::Linearizable, by_another_checker(&history), "{:?}", found);
    }

    /// A register that does one operation after the other, seen by clients whose calls overlap: both checkers take it; and
    /// neither takes it with one answer changed.
    #[test]
    fn what_a_register_did_passes_and_what_it_did_not_fails(
        steps in prop::collection::vec((any::<bool>(), 0..4_u64, 0..4_u64), 2..60),
        changed in any::<prop::sample::Index>(),
    ) {
        let (mut value, mut index, mut history) = (None, 0, Vec::new());
        for (number, (reads, before, after)) in steps.into_iter().enumerate() {
            let time = 10 * number as u64 + 50;
            let (called, returned) = (time - 10 * before, time + 10 * after + 1);
            if reads {
                history.push(at(index, read(called, returned, value)));
            } else {
                let to = number as u64 + 1;
                index = to;
                history.push(at(index, swap(called, returned, value, to)));
                value = Some(to);
            }
        }
        prop_assert_eq!(linearize(&history, BUDGET), Verdict::Linearizable);
        prop_assert_eq!(order(&history), Ok(()));
        let wrong = Some(1_000_000);
        let broken = changed.index(history.len());
        history[broken].action = match history[broken].action {
            Action::Read { .. } => Action::Read { value: wrong },
            Action::Swap { to, .. } => Action::Swap { from: wrong, to },
        };
        prop_assert!(matches!(linearize(&history, BUDGET), Verdict::Broken(_)));
        prop_assert!(order(&history).is_err());
    }
}
