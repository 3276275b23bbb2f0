//! The sandbox of a running task as the kernel reports it, for `task inspect`.
//!
//! Read from outside at the moment of asking: what is shown is what holds, not what was meant.

use crate::message::{DiffId, Profile};
use crate::sandbox::cgroup::TaskGroups;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// Lines of `status` that tell of privileges.
const STATUS: [&str; 11] = [
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
];
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Reads the profile of a process.
pub(crate) fn read(pid: u32, groups: &TaskGroups, layers: &[DiffId]) -> io::Result<Profile> {
    let file = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
    let namespace = |kind: &&str| {
        let inode = fs::metadata(format!("/proc/{pid}/ns/{kind}")).ok()?.ino();
        Some(((*kind).to_owned(), inode))
    };
    Ok(Profile {
        status: status(&file("status")?),
        uid_map: id_map(&file("uid_map")?),
        gid_map: id_map(&file("gid_map")?),
        namespaces: NAMESPACES.iter().filter_map(namespace).collect(),
        mounts: mounts(&file("mountinfo")?),
        limits: groups.limits(),
        layers: layers.to_vec(),
    })
}

fn status(text: &str) -> Vec<(String, String)> {
    let pair = |line: &str| {
        let (name, value) = line.split_once(':')?;
        STATUS
            .contains(&name)
            .then(|| (name.to_owned(), value.trim().replace('\t', " ")))
    };
    text.lines().filter_map(pair).collect()
}

fn id_map(text: &str) -> Vec<[u32; 3]> {
    let row = |line: &str| {
        let numbers: Vec<u32> = line.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        numbers.try_into().ok()
    };
    text.lines().filter_map(row).collect()
}

fn mounts(text: &str) -> Vec<(String, String, String)> {
    let row = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(4);
        let (place, options) = (left.next()?, left.next()?);
        Some((
            place.to_owned(),
            right.split(' ').next()?.to_owned(),
            options.to_owned(),
        ))
    };
    text.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_texts_become_rows() {
        let text = "Name:\tx\nUid:\t0\t0\t0\t0\nCapEff:\t0000000000000000\nSeccomp:\t2\n";
        let rows = status(text);
        assert_eq!(rows[0], ("Uid".to_owned(), "0 0 0 0".to_owned()));
        assert_eq!(rows.len(), 3);
        assert_eq!(
            id_map("         0 1879113728      65536\n"),
            [[0, 1_879_113_728, 65_536]]
        );
        let line = "77 70 0:50 / /tmp rw,nosuid,nodev,noexec,relatime - tmpfs none rw,size=65536k";
        let expected = ("/tmp", "tmpfs", "rw,nosuid,nodev,noexec,relatime");
        assert_eq!(
            mounts(line),
            [(expected.0.into(), expected.1.into(), expected.2.into())]
        );
    }
}
