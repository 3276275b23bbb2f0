//! Waiting for a condition: never for a time.

use std::time::{Duration, Instant};

/// Far longer than anything takes: programs are debug builds, and machines that test are busy.
pub const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

/// Asks until there is an answer, and fails with the last reason when [`PATIENCE`] is over.
pub fn eventually<T>(what: &str, ask: impl FnMut() -> Result<T, String>) -> T {
    within(PATIENCE, what, ask)
}

/// As [`eventually`], with a time of its own.
pub fn within<T>(patience: Duration, what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        match ask() {
            Ok(found) => return found,
            Err(reason) => assert!(
                Instant::now() < deadline,
                "{what}: not within {} s: {reason}",
                patience.as_secs()
            ),
        }
        std::thread::sleep(LOOK);
    }
}
