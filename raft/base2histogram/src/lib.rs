//! Small histograms for the statistics that openraft keeps of itself.
//!
//! It stands in place of the crate of the same name, whose tables for scales that nobody asks for take 26 MiB of every
//! manager. Only what openraft calls is here; no statistic of it leaves a manager (its `runtime-stats` feature is off).

use std::fmt;
use std::marker::PhantomData;

/// One bucket for zero, and one for each number of significant bits.
const BUCKETS: usize = 65;

/// Counts of values by their magnitude.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: [u64; BUCKETS],
    data: PhantomData<T>,
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Histogram<T> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            counts: [0; BUCKETS],
            data: PhantomData,
        }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value so many times.
    pub fn record_n(&mut self, value: u64, count: u64) {
        let bits = u64::BITS - value.leading_zeros();
        if let Some(counted) = self.counts.get_mut(bits as usize) {
            *counted = counted.saturating_add(count);
        }
    }

    /// The usual percentiles, each as the least value of its bucket.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        let samples = self
            .counts
            .iter()
            .fold(0u64, |sum, count| sum.saturating_add(*count));
        let at = |permille: u64| self.value_at(samples, permille);
        PercentileStats {
            samples,
            p0_1: at(1),
            p1: at(10),
            p5: at(50),
            p10: at(100),
            p50: at(500),
            p90: at(900),
            p99: at(990),
            p99_9: at(999),
        }
    }

    /// The bucket that holds this share of the values.
    fn value_at(&self, samples: u64, permille: u64) -> u64 {
        let rank = u128::from(samples) * u128::from(permille);
        let mut below = 0u128;
        for (bits, count) in self.counts.iter().enumerate() {
            below += u128::from(*count) * 1_000;
            if *count > 0 && below >= rank {
                return match bits {
                    0 => 0,
                    bits => 1 << (bits - 1),
                };
            }
        }
        0
    }
}

/// Percentiles of a histogram, named so; zero where it is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            samples,
            p50,
            p90,
            p99,
            p99_9,
            ..
        } = self;
        write!(
            f,
            "{samples} samples, p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}"
        )
    }
}

/// Named histograms, printed as their percentiles.
#[derive(Debug, Clone, Default)]
pub struct AsciiChart(Vec<(String, Histogram)>);

impl AsciiChart {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a histogram.
    #[must_use]
    pub fn add(mut self, name: impl Into<String>, histogram: Histogram) -> Self {
        self.0.push((name.into(), histogram));
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(name, histogram)| writeln!(f, "{name}: {}", histogram.percentile_stats()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_least_values_of_their_buckets() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile_stats().p99_9, 0);
        histogram.record_n(1, 90);
        histogram.record_n(1_000, 9);
        histogram.record(u64::MAX);
        let stats = histogram.percentile_stats();
        assert_eq!(stats.samples, 100);
        assert_eq!((stats.p50, stats.p90, stats.p99), (1, 1, 512));
        assert_eq!(stats.p99_9, 1 << 63);
        histogram.record(0);
        assert_eq!(histogram.percentile_stats().p0_1, 0);
    }
}
