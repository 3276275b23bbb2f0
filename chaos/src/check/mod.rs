//! Whether a history could have come from one register that did one operation after the other.
//!
//! Two checkers that know nothing of each other: [`linearize`] searches an order by the times alone and trusts nothing that
//! the store says; [`order`] takes the log indexes at their word and is fast however long the history is.

pub mod linearize;
pub mod order;
#[cfg(test)]
mod tests;

/// What a client wanted of one object. Values are unique: no two writes of a history write the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Makes the object have a value, if it has exactly this one, or is not there.
    Swap {
        /// What it must have; nothing: it must not be there.
        from: Option<u64>,
        /// What it has then.
        to: u64,
    },
    /// Looks at the value.
    Read {
        /// What was seen; nothing: it was not there.
        value: Option<u64>,
    },
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It was done.
    Done,
    /// It was looked at and did not apply: the object had another value.
    Stale,
    /// Nobody knows: it was done once, or never, at any time from the call on.
    Unknown,
}

/// One operation of one client on one object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// When it was asked for.
    pub called: u64,
    /// When its answer came. Of no meaning where the outcome is unknown.
    pub returned: u64,
    /// What it was.
    pub action: Action,
    /// What came of it.
    pub told: Told,
    /// The index of the log that the answer is about, where there is one: of a write its entry, of a read what it saw.
    pub index: Option<u64>,
}

/// Configurations that the search for an order of one object's operations looks at.
const BUDGET: usize = 200_000;

/// What both checkers say of one object's history.
#[derive(Clone, Debug, Default)]
pub struct Judged {
    /// Operations of which the search found an order.
    pub checked: u64,
    /// Histories of which it did not become clear within the budget: none or one.
    pub unclear: u64,
    /// What does not fit.
    pub broken: Vec<String>,
}

/// Asks both checkers.
pub fn both(history: Vec<Operation>) -> Judged {
    let mut judged = Judged::default();
    match linearize::check(&history, BUDGET) {
        linearize::Verdict::Linearizable => judged.checked = history.len() as u64,
        linearize::Verdict::Broken(number) => {
            judged
                .broken
                .push(format!("nothing explains {:?}", history[number]));
        }
        linearize::Verdict::Unknown => judged.unclear = 1,
    }
    if let Err(broken) = order::check(&history) {
        judged
            .broken
            .push(format!("the indexes of the log do not fit: {broken:?}"));
    }
    judged
}

/// What a value becomes by an operation; nothing where it cannot have happened then.
fn step(value: Option<u64>, operation: &Operation) -> Option<Option<u64>> {
    match (operation.action, operation.told) {
        (Action::Swap { from, to }, Told::Done) => (from == value).then_some(Some(to)),
        // What was never done changes nothing; a search need not place it.
        (Action::Swap { from, to }, Told::Unknown) => (from == value).then_some(Some(to)),
        (Action::Swap { from, .. }, Told::Stale) => (from != value).then_some(value),
        (Action::Read { value: seen }, _) => (seen == value).then_some(value),
    }
}
