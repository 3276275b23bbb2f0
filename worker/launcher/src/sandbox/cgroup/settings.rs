//! Limits in the words of both interfaces. Pure.

use super::Version;
use crate::message::Limits;

/// A processor's time is dealt out in slices of this length: the kernel's default. Shorter ones
/// smooth latency and cost more switches.
const PERIOD_US: u64 = 100_000;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) file: &'static str,
    pub(super) value: String,
    pub(super) optional: bool,
}

pub(super) fn settings(version: Version, controllers: &[String], limits: &Limits) -> Vec<Setting> {
    let set = |file, value: String| Setting {
        file,
        value,
        optional: false,
    };
    let maybe = |file, value: String| Setting {
        file,
        value,
        optional: true,
    };
    let quota = limits
        .cpu_millis
        .map(|millis| u64::from(millis) * PERIOD_US / 1_000);
    let mut all = Vec::new();
    for controller in controllers {
        match (version, controller.as_str()) {
            // Memory before memory with swap: the kernel keeps the first below the second.
            (Version::V1, "memory") => all.extend([
                set("memory.limit_in_bytes", limits.memory_bytes.to_string()),
                maybe("memory.memsw.limit_in_bytes", limits.memory_bytes.to_string()),
            ]),
            (Version::V2, "memory") => all.extend([
                set("memory.max", limits.memory_bytes.to_string()),
                maybe("memory.swap.max", "0".to_owned()),
                set("memory.oom.group", "1".to_owned()),
            ]),
            (_, "pids") => all.push(set("pids.max", limits.pids.to_string())),
            (Version::V1, "cpu") => {
                let shares = u64::from(limits.cpu_weight) * 1_024 / 100;
                all.push(set("cpu.shares", shares.max(2).to_string()));
                let quota = quota.map_or("-1".to_owned(), |quota| quota.to_string());
                all.push(maybe("cpu.cfs_period_us", PERIOD_US.to_string()));
                all.push(Setting {
                    file: "cpu.cfs_quota_us",
                    value: quota,
                    optional: limits.cpu_millis.is_none(),
                });
            }
            (Version::V2, "cpu") => {
                all.push(set("cpu.weight", limits.cpu_weight.clamp(1, 10_000).to_string()));
                let quota = quota.map_or("max".to_owned(), |quota| quota.to_string());
                all.push(set("cpu.max", format!("{quota} {PERIOD_US}")));
            }
            _ => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: [&str; 3] = ["memory", "pids", "cpu"];

    fn values(version: Version, limits: &Limits) -> Vec<String> {
        let controllers = WANTED.map(str::to_owned);
        settings(version, &controllers, limits)
            .iter()
            .map(|s| format!("{}={}", s.file, s.value))
            .collect()
    }

    #[test]
    fn limits_in_both_languages() {
        let limits = Limits {
            cpu_millis: Some(1_500),
            cpu_weight: 200,
            ..Limits::default()
        };
        assert_eq!(
            values(Version::V1, &limits),
            [
                "memory.limit_in_bytes=268435456",
                "memory.memsw.limit_in_bytes=268435456",
                "pids.max=512",
                "cpu.shares=2048",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=150000"
            ]
        );
        assert_eq!(
            values(Version::V2, &limits),
            [
                "memory.max=268435456",
                "memory.swap.max=0",
                "memory.oom.group=1",
                "pids.max=512",
                "cpu.weight=200",
                "cpu.max=150000 100000"
            ]
        );
    }
}
