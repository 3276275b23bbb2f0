//! The clock and entropy seams: the only places where a program asks the machine for time or random bytes.
//!
//! Whatever decides receives these as traits, so that a simulation can drive both from one seed.

use std::fmt;
use std::time::{Duration, Instant, SystemTime};

use ring::rand::{SecureRandom as _, SystemRandom};

/// Time, in the two kinds that must not be confused.
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Milliseconds since 1970, UTC. It may jump either way: for expiry and for people, never for intervals.
    fn wall_millis(&self) -> u64;
    /// Time since a start of the clock's own choosing; never goes back. For intervals; means nothing elsewhere.
    fn monotonic(&self) -> Duration;
}

/// Random bytes fit for keys and nonces.
pub trait Entropy: fmt::Debug + Send + Sync + 'static {
    /// Fills the buffer.
    ///
    /// # Errors
    /// [`EntropyError`]; the buffer's content is then not random and must not be used.
    fn fill(&self, buffer: &mut [u8]) -> Result<(), EntropyError>;
}

/// The system gave no random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the system gave no random bytes; check that the getrandom system call is allowed")]
pub struct EntropyError;

/// The machine's clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    #[expect(clippy::disallowed_methods, reason = "this is the clock seam")]
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "this is the clock seam")]
    fn wall_millis(&self) -> u64 {
        #[cfg(feature = "simulated")]
        if let Some(world) = crate::simulated::world() {
            return world.wall_millis();
        }
        // A clock set before 1970 reads as 1970: everything then looks unexpired, and the managers' comparison of
        // their clocks keeps such a one from leading.
        let since = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

/// The kernel's random source.
#[derive(Debug, Clone, Copy)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, buffer: &mut [u8]) -> Result<(), EntropyError> {
        #[cfg(feature = "simulated")]
        if let Some(world) = crate::simulated::world() {
            world.fill(buffer);
            return Ok(());
        }
        SystemRandom::new().fill(buffer).map_err(|_| EntropyError) // ring's error says no more
    }
}

/// Runs what blocks, like the reading of a file, beside the runtime's own threads; in a simulation at once, since the order
/// of its events must not depend on threads.
///
/// # Errors
/// Where it panicked, or the runtime shuts down.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    #[cfg(feature = "simulated")]
    if crate::simulated::world().is_some() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wall_clock_counts_milliseconds() {
        let millis = SystemClock::start().wall_millis();
        assert!(
            (1_600_000_000_000..100_000_000_000_000).contains(&millis),
            "{millis}"
        );
    }

    #[test]
    fn monotonic_time_never_goes_back() {
        let clock = SystemClock::start();
        let times: Vec<_> = (0..1000).map(|_| clock.monotonic()).collect();
        assert!(times.is_sorted());
    }

    #[test]
    fn entropy_fills_the_whole_buffer_and_differs() {
        let (mut one, mut two) = ([0; 32], [0; 32]);
        SystemEntropy.fill(&mut one).expect("the system's random source");
        SystemEntropy.fill(&mut two).expect("the system's random source");
        assert_ne!(one, two);
        assert_ne!(one[16..], [0; 16]);
    }
}
