//! Small conversions from wire values to what a person or a script reads.

use std::time::Duration;

use bulkhead_identity::seam::{Entropy, SystemEntropy};
use bulkhead_proto::ids::{ID_BYTES, base32_lower};
use bulkhead_proto::wire::{Label, Role};
use serde_json::Value;

/// An object id as text; empty where there is none.
pub(crate) fn id(bytes: &[u8]) -> String {
    base32_lower().encode(bytes)
}

/// What tables show of an id.
pub(crate) fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

/// Random bytes for an id or a request: the client chooses both, so that a retry finds itself.
pub(crate) fn new_id() -> [u8; ID_BYTES] {
    let mut bytes = [0; ID_BYTES];
    SystemEntropy
        .fill(&mut bytes)
        .expect("the kernel gives random bytes once it is up");
    bytes
}

/// A point in time, RFC 3339; `null` where there is none.
pub(crate) fn time(ms: i64) -> Value {
    match jiff::Timestamp::from_millisecond(ms) {
        Ok(time) if ms != 0 => Value::String(time.to_string()),
        _ => Value::Null,
    }
}

/// The wall clock, in milliseconds.
pub(crate) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// How far `at` is from `now`, in the largest unit that fits: `3m ago`, `in 89d`.
pub(crate) fn distance(at: i64, now: i64) -> String {
    if at == 0 {
        return "-".into();
    }
    let span = rough(Duration::from_millis(at.abs_diff(now)));
    if at > now {
        format!("in {span}")
    } else {
        format!("{span} ago")
    }
}

/// A duration in its largest unit.
pub(crate) fn rough(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Bytes in binary units, as Docker's grammar reads them back.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
    let (unit, scale) = UNITS
        .into_iter()
        .find(|(_, scale)| bytes >= *scale)
        .unwrap_or(("B", 1));
    match (bytes * 10 / scale) % 10 {
        0 => format!("{}{unit}", bytes / scale),
        tenth => format!("{}.{tenth}{unit}", bytes / scale),
    }
}

/// Labels as a map.
pub(crate) fn labels(labels: &[Label]) -> Value {
    let pairs = labels
        .iter()
        .map(|label| (label.key.clone(), Value::String(label.value.clone())));
    Value::Object(pairs.collect())
}

/// A role's word.
pub(crate) fn role(role: Role) -> &'static str {
    match role {
        Role::Unspecified => "unknown",
        Role::Manager => "manager",
        Role::Worker => "worker",
        Role::Operator => "operator",
        Role::Standby => "standby",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_well() {
        for (value, want) in [
            (0, "0B"),
            (1023, "1023B"),
            (1536, "1.5KiB"),
            (256 << 20, "256MiB"),
            (3 << 30, "3GiB"),
        ] {
            assert_eq!(bytes(value), want);
        }
        for (at, want) in [
            (0, "-"),
            (1_000, "9s ago"),
            (130_000, "in 2m"),
            (90 * 86_400_000, "in 89d"),
        ] {
            assert_eq!(distance(at, 10_000), want);
        }
        assert_eq!(time(0), Value::Null);
        assert_eq!(time(1_000), "1970-01-01T00:00:01Z");
        assert_eq!(id(&[0; 16]).len(), 26);
    }
}
