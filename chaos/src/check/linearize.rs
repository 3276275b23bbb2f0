//! A search for an order of all operations that fits the times and what each was told.
//!
//! Just-in-time linearization (Gavin Lowe, "Testing for linearizability", 2017): events are taken in the order of time, and
//! an operation is placed as late as its answer allows, with whatever has to come before it. What is kept are the
//! configurations that are possible so far: a value, and which of the operations under way were placed already. Its
//! effort grows with how many operations are under way at once, not with the length of the history.

use std::collections::HashSet;

use super::{Operation, Told, step};

/// What the search found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is such an order.
    Linearizable,
    /// There is none: nothing explains the answer of the operation with this number.
    Broken(usize),
    /// The budget was used up before either was clear.
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Configuration {
    value: Option<u64>,
    /// Of the operations under way, those that were placed; in order of their numbers.
    placed: Vec<usize>,
}

impl Configuration {
    fn with(&self, number: usize, value: Option<u64>) -> Self {
        let mut placed = self.placed.clone();
        let at = placed.partition_point(|it| *it < number);
        placed.insert(at, number);
        Self { value, placed }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    // Calls first: who is called when another returns may have been before it.
    Call(usize),
    Return(usize),
}

/// Looks for an order of the operations of one object, which was not there before the first. `budget` is how many
/// configurations are looked at.
pub fn check(operations: &[Operation], budget: usize) -> Verdict {
    let mut events: Vec<(u64, Event)> = Vec::with_capacity(2 * operations.len());
    for (number, operation) in operations.iter().enumerate() {
        events.push((operation.called, Event::Call(number)));
        if operation.told != Told::Unknown {
            events.push((operation.returned, Event::Return(number)));
        }
    }
    events.sort_unstable();
    let mut possible = HashSet::from([Configuration {
        value: None,
        placed: Vec::new(),
    }]);
    let mut under_way: Vec<usize> = Vec::new();
    let mut left = budget;
    for (_, event) in events {
        match event {
            Event::Call(number) => under_way.push(number),
            Event::Return(number) => {
                let Some(next) = place(operations, &under_way, number, possible, &mut left) else {
                    return Verdict::Unknown;
                };
                if next.is_empty() {
                    return Verdict::Broken(number);
                }
                possible = next;
                under_way.retain(|it| *it != number);
            }
        }
    }
    Verdict::Linearizable
}

/// The configurations in which this operation was placed before its answer; without it, since it is not under way any more.
fn place(
    operations: &[Operation],
    under_way: &[usize],
    number: usize,
    possible: HashSet<Configuration>,
    left: &mut usize,
) -> Option<HashSet<Configuration>> {
    let mut next = HashSet::new();
    let mut open: Vec<Configuration> = possible.iter().cloned().collect();
    let mut seen = possible;
    while let Some(mut configuration) = open.pop() {
        *left = left.checked_sub(1)?;
        if let Ok(at) = configuration.placed.binary_search(&number) {
            configuration.placed.remove(at);
            next.insert(configuration);
            continue;
        }
        for other in under_way {
            if configuration.placed.binary_search(other).is_ok() {
                continue;
            }
            if let Some(value) = step(configuration.value, &operations[*other]) {
                let more = configuration.with(*other, value);
                if seen.insert(more.clone()) {
                    open.push(more);
                }
            }
        }
    }
    Some(next)
}
