//! Durations, sizes and CPUs in the grammar that Docker's users have in their fingers.

use std::time::Duration;

use crate::refusal::{Code, Refusal};

/// A point in time, as people give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// So long ago.
    Ago(Duration),
    /// Then; milliseconds since 1970.
    At(i64),
}

impl Since {
    /// The point in milliseconds since 1970, where it is `now`.
    pub fn before(self, now: i64) -> i64 {
        match self {
            Since::At(at) => at,
            Since::Ago(ago) => now.saturating_sub(i64::try_from(ago.as_millis()).unwrap_or(i64::MAX)),
        }
    }
}

/// Reads a duration like `10m`, or a time like `2026-01-31T12:00:00Z`.
pub fn since(text: &str) -> Result<Since, String> {
    if let Ok(duration) = duration(text) {
        return Ok(Since::Ago(duration));
    }
    let time: jiff::Timestamp = text
        .parse()
        .map_err(|_| "write a duration like 10m, or a time like 2026-01-31T12:00:00Z")?;
    Ok(Since::At(time.as_millisecond()))
}

/// Units of a duration in nanoseconds. `ms` before `m`: the longest unit that fits is taken.
const TIMES: &[(&str, u128)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
    ("d", 86_400_000_000_000),
];

/// A century: past it a duration is a typing mistake, and arithmetic on clocks could overflow.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Binary units, as Docker reads them: `k` and `kib` alike are 1024.
const SIZES: &[(&str, u128)] = &[
    ("", 1),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
];

/// Digits accepted before and after the point; enough for any value in range, too few to overflow 128 bits.
const DIGITS: usize = 18;

/// Reads `1m30s`, `1.5h`, `500ms` or `0`.
pub fn duration(text: &str) -> Result<Duration, Refusal> {
    let refuse = |reason: &str| {
        let reason = format!("'{text}' {reason}");
        Refusal::new(
            Code::BadQuantity,
            "duration",
            reason,
            "write it like 90s, 1m30s, 1.5h or 500ms",
        )
    };
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let (number, after) = leading_number(rest).ok_or_else(|| refuse("has no number where one is due"))?;
        let end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (unit, next) = after.split_at(end);
        let (_, scale) = TIMES
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(|| refuse("needs a unit after each number: ns, us, ms, s, m, h or d"))?;
        nanos = nanos.saturating_add(number.scaled(*scale));
        rest = next;
    }
    if text.is_empty() {
        return Err(refuse("is empty"));
    }
    let seconds = u64::try_from(nanos / 1_000_000_000).map_err(|_| refuse("is too long"))?;
    let subsecond = u32::try_from(nanos % 1_000_000_000).map_err(|_| refuse("is too long"))?;
    let value = Duration::new(seconds, subsecond);
    if value > LONGEST {
        Err(refuse("is longer than a century"))
    } else {
        Ok(value)
    }
}

/// Reads `512m`, `2g`, `1.5GiB` or a plain number of bytes.
pub fn size(text: &str) -> Result<u64, Refusal> {
    let refuse = |reason: &str| {
        let reason = format!("'{text}' {reason}");
        Refusal::new(
            Code::BadQuantity,
            "size",
            reason,
            "write it like 512m, 2g, 1.5g or 4096",
        )
    };
    let (number, unit) = leading_number(text).ok_or_else(|| refuse("does not start with a number"))?;
    let unit = unit.to_ascii_lowercase();
    let prefix = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let (_, scale) = SIZES
        .iter()
        .find(|(name, _)| *name == prefix)
        .ok_or_else(|| refuse("has an unknown unit; there are b, k, m, g and t"))?;
    u64::try_from(number.scaled(*scale)).map_err(|_| refuse("is too large"))
}

/// Reads a number of CPUs, `0.5` or `2`, as thousandths.
pub fn cpus(text: &str) -> Result<u64, Refusal> {
    let refuse = |reason: &str| {
        let reason = format!("'{text}' {reason}");
        Refusal::new(Code::BadQuantity, "CPUs", reason, "write it like 0.5 or 2")
    };
    let (number, rest) = leading_number(text).ok_or_else(|| refuse("is not a number"))?;
    if !rest.is_empty() {
        return Err(refuse("has something after the number"));
    }
    if number.fraction_digits > 3 {
        return Err(refuse("is finer than a thousandth of a CPU"));
    }
    u64::try_from(number.scaled(1_000)).map_err(|_| refuse("is too large"))
}

/// A decimal number kept exact: binary fractions would turn `0.3` into 299 thousandths.
struct Decimal {
    digits: u128,
    fraction_digits: u32,
}

impl Decimal {
    fn scaled(&self, unit: u128) -> u128 {
        self.digits.saturating_mul(unit) / 10u128.pow(self.fraction_digits)
    }
}

fn leading_number(text: &str) -> Option<(Decimal, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let empty = whole.is_empty() && fraction.is_empty();
    if empty || whole.len() > DIGITS || fraction.len() > DIGITS || fraction.contains('.') {
        return None;
    }
    let digits = format!("{whole}{fraction}").parse().ok()?;
    let fraction_digits = u32::try_from(fraction.len()).ok()?;
    Some((
        Decimal {
            digits,
            fraction_digits,
        },
        rest,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        for (text, millis) in [
            ("0", 0),
            ("90s", 90_000),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("500ms", 500),
            (".5s", 500),
            ("30d", 2_592_000_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in [
            "",
            "5",
            "-1s",
            "1x",
            "s",
            "1.2.3s",
            "1m30",
            "99999999999999999999s",
            "40000d",
            " 1s",
        ] {
            assert_eq!(
                duration(text).map_err(|e| e.code()),
                Err(Code::BadQuantity),
                "{text}"
            );
        }
    }

    #[test]
    fn sizes_are_binary_and_exact() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1024),
            ("512m", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("900g", 900 << 30),
            ("2gb", 2 << 30),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "g", "1x", "-1", "1 g", "999999999999999999t", "1..5g"] {
            assert_eq!(size(text).map_err(|e| e.code()), Err(Code::BadQuantity), "{text}");
        }
    }

    #[test]
    fn cpus_are_thousandths() {
        for (text, millis) in [("0.3", 300), ("2", 2_000), ("1.001", 1_001)] {
            assert_eq!(cpus(text), Ok(millis), "{text}");
        }
        for text in ["", "1c", "0.0001", "-1"] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn since_is_a_duration_or_a_time() {
        assert_eq!(since("10m"), Ok(Since::Ago(Duration::from_secs(600))));
        assert_eq!(since("1970-01-01T00:00:01Z"), Ok(Since::At(1_000)));
        assert!(since("yesterday").is_err());
    }
}
