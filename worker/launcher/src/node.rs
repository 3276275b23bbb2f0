//! What this kernel and machine offer, and what is done where something is missing.

use crate::message::NodeFacts;
use crate::sandbox::cgroup::Cgroups;
use crate::sandbox::{mounts, sys};
use std::fs;
use std::path::Path;

/// Looks once; nothing of it changes while the machine runs.
pub(crate) fn probe(cgroups: &Cgroups, memory_limit: Option<u64>) -> NodeFacts {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let landlock_abi = sys::landlock_abi();
    let tmpfs_noswap = mounts::tmpfs_noswap();
    let time_namespace = Path::new("/proc/self/ns/time").exists();
    let controllers = cgroups.controllers();
    let mut fallbacks = Vec::new();
    let mut missing = |absent: bool, instead: &str| {
        if absent {
            fallbacks.push(instead.to_owned());
        }
    };
    missing(
        landlock_abi == 0,
        "no Landlock: files are protected by mounts and ids alone",
    );
    missing(
        (1..6).contains(&landlock_abi),
        "Landlock before version 6: signals and abstract sockets are confined by namespaces alone",
    );
    missing(
        !tmpfs_noswap,
        "no tmpfs noswap: secrets are kept in a sealed ramfs",
    );
    missing(
        !time_namespace,
        "no time namespace: tasks see the machine's uptime",
    );
    for controller in ["memory", "pids", "cpu"] {
        let absent = !controllers.iter().any(|c| c == controller);
        missing(
            absent,
            &format!("no {controller} controller: that limit is not enforced"),
        );
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let total = meminfo_total(&read("/proc/meminfo"));
    NodeFacts {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        landlock_abi,
        cgroup: cgroups.kind().to_owned(),
        controllers,
        tmpfs_noswap,
        time_namespace,
        memory_bytes: memory_limit.map_or(total, |limit| limit.min(total)),
        cpu_millis: cpus as u64 * 1_000,
        fallbacks,
    }
}

fn meminfo_total(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0)
        * 1_024
}

#[cfg(test)]
mod tests {
    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(
            super::meminfo_total("MemTotal:       24684092 kB\nMemFree: 1 kB\n"),
            24_684_092 * 1_024
        );
    }
}
