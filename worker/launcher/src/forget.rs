//! What a launcher keeps outside of its data folder, and how that goes: control groups, and claims of ids.
//!
//! A launcher that ends without a task removes both. After a crash, or before a machine leaves for good, [`forget`]
//! does, and ends whatever still runs of the folder's tasks.

use crate::clock;
use crate::id_range::release_claims;
use crate::launcher::{CLAIMS, open_data};
use crate::sandbox::cgroup::{Cgroups, remove_empty, remove_with_members};
use crate::tasks::{ProcessId, TaskFolders};
use anyhow::{Context, bail};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long killed processes may take to go.
const GONE: Duration = Duration::from_secs(20);
const LOOK: Duration = Duration::from_millis(10);

/// Writes down where the tasks' groups are, beside where they were: a launcher may be started elsewhere.
pub(crate) fn remember_groups(state: &Path, cgroups: &Cgroups) -> io::Result<()> {
    let now = cgroups.folders().map(Path::to_owned);
    let before = remembered(state)?.into_iter().filter(|folder| folder.exists());
    let all: BTreeSet<PathBuf> = now.chain(before).collect();
    fs::write(state.join("groups.draft"), serde_json::to_vec(&all)?)?;
    fs::rename(state.join("groups.draft"), state.join("groups"))
}

fn remembered(state: &Path) -> io::Result<BTreeSet<PathBuf>> {
    match fs::read(state.join("groups")) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

/// At the end of a launcher without tasks.
pub(crate) fn leave_nothing(data: &Path, cgroups: &Cgroups) {
    let groups = cgroups
        .folders()
        .try_for_each(|folder| remove_empty(folder).map(drop));
    // What stays is an empty group or a claim that the next launcher of this folder has again.
    if let Err(error) = groups.and_then(|()| release_claims(Path::new(CLAIMS), data)) {
        tracing::warn!(%error, "could not remove the empty control groups and id claims");
    }
}

/// Ends what runs of this folder's tasks, and removes them, their groups and their claims of ids. Layers stay.
pub fn forget(data: &Path) -> anyhow::Result<()> {
    // Before anything is touched: opening a folder closes it to others, which a mistyped one must not suffer.
    if !data.join("launcher").is_dir() {
        bail!(
            "{} is no launcher's data folder: name the --data of the one that ended",
            data.display()
        );
    }
    let (data, _lock) = open_data(data)?;
    let state = data.join("launcher");
    let tasks = state.join("tasks");
    let records = TaskFolders::open(tasks.clone()).and_then(|folders| folders.load());
    let records = records.context("could not read the tasks' records")?;
    let groups = remembered(&state).context("could not read where the control groups are")?;
    for group in &groups {
        let removed = || remove_with_members(group);
        wait_for(removed).with_context(|| format!("could not remove {}", group.display()))?;
    }
    // They end with their tasks, and write down how into the folders that go next.
    let supervisors: Vec<ProcessId> = records.iter().filter_map(|record| record.supervisor).collect();
    wait_for(|| Ok(!supervisors.iter().any(|one| one.is_alive()))).context("a supervisor does not end")?;
    fs::remove_dir_all(&tasks).with_context(|| format!("could not remove {}", tasks.display()))?;
    release_claims(Path::new(CLAIMS), &data).context("could not give up the claimed ids")
}

/// Tries until it is done. Killed processes are gone soon, unless one hangs in the kernel.
#[expect(
    clippy::disallowed_methods,
    reason = "version 1 does not tell when a group is empty; no runtime is here"
)]
fn wait_for(mut done: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let until = clock::monotonic() + GONE;
    while !done()? {
        if clock::monotonic() >= until {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "killed processes do not go",
            ));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
