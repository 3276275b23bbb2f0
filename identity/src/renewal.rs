//! When a node asks for its next certificate.

/// The time to renew a certificate, milliseconds since 1970: between 50 % and 80 % of its validity.
///
/// `jitter` is any random number, drawn once for each certificate: nodes that joined together then do not renew
/// together. Below 50 % nodes would ask more often than it helps; above 80 % an outage of the managers could outlast
/// what is left.
pub fn due_at(not_before_ms: i64, not_after_ms: i64, jitter: u64) -> i64 {
    let validity = i128::from(not_after_ms) - i128::from(not_before_ms);
    let spread = (validity * 3 / 10).max(0);
    let extra = spread * i128::from(jitter) / i128::from(u64::MAX);
    let due = i128::from(not_before_ms) + validity / 2 + extra;
    i64::try_from(due).unwrap_or(not_after_ms) // cannot be: it lies between two i64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn renewal_is_due_between_half_and_four_fifths() {
        assert_eq!(due_at(1_000, 2_000, 0), 1_500);
        assert_eq!(due_at(1_000, 2_000, u64::MAX / 2), 1_649);
        assert_eq!(due_at(1_000, 2_000, u64::MAX), 1_800);
    }

    proptest! {
        #[test]
        fn it_never_leaves_the_validity(from in any::<i64>(), length in 10..i64::MAX, jitter in any::<u64>()) {
            let to = from.saturating_add(length);
            prop_assume!(to > from);
            let due = due_at(from, to, jitter);
            prop_assert!(from <= due && due <= to);
        }
    }
}
