//! Random numbers of one part of a run. Each part has its own, so that one more roll in one moves no other.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_raft::seam::{Entropy, EntropyError};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

/// Clones share one sequence.
#[derive(Clone)]
pub(crate) struct Dice(Arc<Mutex<SmallRng>>);

impl fmt::Debug for Dice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dice")
    }
}

impl Dice {
    /// The dice of a part of a run.
    pub(crate) fn new(seed: u64, part: u64) -> Self {
        let mixed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ part.wrapping_mul(0xD1B5_4A32_D192_ED03);
        Self(Arc::new(Mutex::new(SmallRng::seed_from_u64(mixed))))
    }

    fn with<T>(&self, roll: impl FnOnce(&mut SmallRng) -> T) -> T {
        roll(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A number below `count`, which is not 0.
    pub(crate) fn below(&self, count: usize) -> usize {
        self.with(|rng| rng.random_range(0..count))
    }

    /// True this often in a hundred.
    pub(crate) fn percent(&self, chance: usize) -> bool {
        self.below(100) < chance
    }

    /// A time between two numbers of microseconds.
    pub(crate) fn micros(&self, from: u64, to: u64) -> Duration {
        Duration::from_micros(self.with(|rng| rng.random_range(from..to)))
    }

    /// These in any order.
    pub(super) fn shuffle<T>(&self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// One of these.
    pub(crate) fn pick<T: Copy>(&self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.below(from.len())])
    }
}

impl Entropy for Dice {
    fn fill(&self, buffer: &mut [u8]) -> Result<(), EntropyError> {
        self.with(|rng| rng.fill_bytes(buffer));
        Ok(())
    }
}
