//! Medians and percentiles.

use std::time::Duration;

use serde::Serialize;

/// What many measurements of one thing come to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// How many there were.
    pub(crate) n: usize,
    pub(crate) min: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Summary {
    /// Of any numbers; nothing where there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Self {
            n: sorted.len(),
            min,
            p50: rank(&sorted, 50),
            p99: rank(&sorted, 99),
            max,
        })
    }

    /// Of times, in milliseconds.
    pub(crate) fn of_times(times: &[Duration]) -> Option<Self> {
        Self::of(times.iter().map(|time| time.as_secs_f64() * 1e3))
    }
}

/// The smallest value that at least so many percent do not exceed (nearest rank).
fn rank(sorted: &[f64], percent: usize) -> f64 {
    let at = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[at - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_values_that_were_measured() {
        let of = |count: u32| Summary::of((1..=count).rev().map(f64::from)).expect("some");
        let check = |count, p50: f64, p99: f64| {
            let got = of(count);
            assert_eq!((got.p50, got.p99), (p50, p99), "{count}");
            assert_eq!((got.min, got.max), (1.0, f64::from(count)), "{count}");
        };
        check(1, 1.0, 1.0);
        check(2, 1.0, 2.0);
        check(3, 2.0, 3.0);
        check(50, 25.0, 50.0);
        check(1000, 500.0, 990.0);
        assert_eq!(Summary::of([]), None);
    }
}
