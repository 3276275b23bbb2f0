//! A process that can open no more files and connections.
//!
//! Limits of another process are changed by `prlimit(1)`, which runs as that process's user: root may only with
//! `CAP_SYS_RESOURCE` (`getrlimit(2)`).

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, ensure};

/// How many descriptors a process may have: its soft limit.
///
/// # Errors
/// It is gone, or `prlimit` is missing.
pub fn limit_of(pid: u32) -> anyhow::Result<u64> {
    let text = prlimit(pid, &["--nofile", "--output", "SOFT", "--noheadings", "--raw"])?;
    let text = text.trim();
    text.parse()
        .with_context(|| format!("prlimit says {text}, which is no number"))
}

/// Sets that limit, at most to the hard one.
///
/// # Errors
/// As [`limit_of`].
pub fn limit(pid: u32, descriptors: u64) -> anyhow::Result<()> {
    prlimit(pid, &[&format!("--nofile={descriptors}:")]).map(drop)
}

/// Leaves a process what it has open now and no more.
///
/// # Errors
/// As [`limit_of`].
pub fn exhaust(pid: u32) -> anyhow::Result<()> {
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .with_context(|| format!("process {pid} is gone"))?
        .count();
    limit(pid, open as u64)
}

fn prlimit(pid: u32, words: &[&str]) -> anyhow::Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let id = |name: &str| -> Option<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    let (uid, gid) = id("Uid:").zip(id("Gid:")).context("a process without a user")?;
    let output = Command::new("prlimit")
        .args(["--pid", &pid.to_string()])
        .args(words)
        .uid(uid)
        .gid(gid)
        .output()
        .context("could not run prlimit, of util-linux")?;
    ensure!(
        output.status.success(),
        "prlimit: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Shell;

    #[test]
    fn a_process_opens_no_more_and_then_some_again() {
        let mut shell = Shell::that_does("exec 9</dev/null && echo opened || echo refused; exec 9<&-");
        let pid = shell.pid();
        let mut ask = || shell.ask();
        assert_eq!(ask(), "opened");
        let before = limit_of(pid).expect("it lives");
        exhaust(pid).expect("its own user's");
        assert_eq!(ask(), "refused");
        limit(pid, before).expect("its own user's");
        assert_eq!(ask(), "opened");
    }
}
