//! What a launcher leaves on purpose when it ends: control groups, and tasks in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::GRACE;
use crate::machine::send;

/// The control groups that a launcher made for its data folder.
pub fn groups_of(data: &Path) -> Vec<PathBuf> {
    let hash = Sha256::digest(data.as_os_str().as_encoded_bytes());
    let name: String = hash[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("bulkhead-{name}");
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::from("/sys/fs/cgroup")]);
    while let Some(folder) = folders.pop() {
        for child in folders_in(&folder) {
            match child.file_name().is_some_and(|it| it == name.as_str()) {
                true => found.push(child),
                false => folders.push(child),
            }
        }
    }
    found
}

/// Removes them, with whoever is still in them.
pub fn remove_groups(data: &Path) {
    for group in groups_of(data) {
        remove_group(&group);
    }
}

/// Where launchers claim ranges of user ids, each in a file that names its data folder.
const CLAIMS: &str = "/run/bulkhead/id-ranges";

/// The claims of launchers whose data is below a folder.
pub fn claims_of(folder: &Path) -> Vec<PathBuf> {
    let claims = fs::read_dir(CLAIMS).into_iter().flatten().flatten();
    let of_it =
        |claim: &PathBuf| fs::read_to_string(claim).is_ok_and(|it| Path::new(it.trim()).starts_with(folder));
    claims.map(|entry| entry.path()).filter(of_it).collect()
}

/// Removes them: for nodes that are removed for good.
pub fn remove_claims(folder: &Path) {
    for claim in claims_of(folder) {
        let _ = fs::remove_file(claim); // it is gone already, then
    }
}

fn remove_group(group: &Path) {
    for child in folders_in(group) {
        remove_group(&child);
    }
    let end = Instant::now() + GRACE;
    // Busy while a process in it still ends; what then stays is empty and harmless.
    while fs::remove_dir(group).is_err() && Instant::now() < end {
        let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines().filter_map(|line| line.parse().ok()) {
            send(pid, Signal::SIGKILL);
        }
        #[expect(clippy::disallowed_methods, reason = "a destructor cannot await")]
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}
