//! A check that takes the log's indexes at their word: operations in the order of their indexes must make sense, and that
//! order must be one that the times allow. It takes as long as sorting.

use super::{Action, Operation, Told};

/// Why a history is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// In the order of the indexes the operation with this number was told what cannot be.
    Answer(usize),
    /// The second operation began after the first had its answer, and has an index before it.
    Time(usize, usize),
}

/// Looks at the operations of one object, which was not there before the first. Operations without an index, as those of
/// unknown outcome, may have been done anywhere: a value that only they write is taken for written where it is first seen.
///
/// # Errors
/// [`Broken`].
pub fn check(operations: &[Operation]) -> Result<(), Broken> {
    let mut known: Vec<(u64, bool, usize)> = Vec::new();
    let mut unknown = std::collections::HashMap::new();
    for (number, operation) in operations.iter().enumerate() {
        let looks = matches!(operation.action, Action::Read { .. }) || operation.told == Told::Stale;
        match (operation.index, operation.told, operation.action) {
            // What looks at an index sees what was written at it.
            (Some(index), Told::Done | Told::Stale, _) => known.push((index, looks, number)),
            (_, Told::Unknown, Action::Swap { from, to }) | (None, Told::Done, Action::Swap { from, to }) => {
                unknown.insert(to, from);
            }
            _ => {}
        }
    }
    known.sort_unstable();
    answers(operations, &known, unknown)?;
    times(operations, &known)
}

fn answers(
    operations: &[Operation],
    known: &[(u64, bool, usize)],
    mut unknown: std::collections::HashMap<u64, Option<u64>>,
) -> Result<(), Broken> {
    let mut value = None;
    for (_, _, number) in known {
        let operation = &operations[*number];
        let wanted = match operation.action {
            Action::Read { value } => value,
            Action::Swap { from, .. } => from,
        };
        match operation.told {
            Told::Stale => continue, // that it was another value then is the other checker's to say
            Told::Done | Told::Unknown => {}
        }
        if wanted != value && !explained(value, wanted, &mut unknown) {
            return Err(Broken::Answer(*number));
        }
        value = match operation.action {
            Action::Swap { to, .. } => Some(to),
            Action::Read { value } => value,
        };
    }
    Ok(())
}

/// Whether operations of unknown outcome lead from one value to the other. Each counts once.
fn explained(
    from: Option<u64>,
    to: Option<u64>,
    unknown: &mut std::collections::HashMap<u64, Option<u64>>,
) -> bool {
    let (mut at, mut path) = (to, Vec::new());
    while at != from {
        let Some(before) = at.and_then(|value| unknown.get(&value)) else {
            return false;
        };
        path.extend(at);
        at = *before;
    }
    for value in path {
        unknown.remove(&value);
    }
    true
}

/// In the order of their indexes no operation may have begun only after one with a later index had its answer.
fn times(operations: &[Operation], known: &[(u64, bool, usize)]) -> Result<(), Broken> {
    // From the end: the earliest answer of all that come later.
    let mut earliest: Option<(u64, usize)> = None;
    for group in known
        .chunk_by(|one, other| (one.0, one.1) == (other.0, other.1))
        .rev()
    {
        for (_, _, number) in group {
            if let Some((answer, later)) = earliest
                && answer < operations[*number].called
            {
                return Err(Broken::Time(later, *number));
            }
        }
        let first = group
            .iter()
            .map(|(_, _, number)| (operations[*number].returned, *number))
            .min();
        earliest = match (earliest, first) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }
    Ok(())
}
