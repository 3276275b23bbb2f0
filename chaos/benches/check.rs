//! How long the two checkers take for a long history of one register: `cargo bench -p bulkhead-chaos --bench check`.

use std::time::Instant;

use bulkhead_chaos::check::{Action, Operation, Told, linearize, order};

/// Operations of the history.
const OPERATIONS: u64 = 1_000_000;
/// So many are under way at once.
const CLIENTS: u64 = 8;

/// A register that does one operation after the other; each is called and answered while others are under way.
fn history() -> Vec<Operation> {
    let (mut value, mut index) = (None, 0);
    let operation = |number: u64| {
        let action = match number.is_multiple_of(3) {
            true => {
                let action = Action::Swap {
                    from: value,
                    to: number,
                };
                (value, index) = (Some(number), number);
                action
            }
            false => Action::Read { value },
        };
        Operation {
            called: 10 * number,
            returned: 10 * (number + CLIENTS),
            action,
            told: Told::Done,
            index: Some(index),
        }
    };
    (0..OPERATIONS).map(operation).collect()
}

#[expect(clippy::disallowed_methods, reason = "it measures real time")]
fn now() -> Instant {
    Instant::now()
}

fn main() {
    let history = history();
    let start = now();
    let verdict = linearize::check(&history, usize::MAX);
    println!(
        "search:  {OPERATIONS} operations, {CLIENTS} under way at once: {:?} in {:.2} s",
        verdict,
        start.elapsed().as_secs_f64()
    );
    let start = now();
    let verdict = order::check(&history);
    println!(
        "indexes: {OPERATIONS} operations: {verdict:?} in {:.2} s",
        start.elapsed().as_secs_f64()
    );
}
