//! Control groups, version 1 and 2: limits, and the backstop that kills.
//!
//! A task's groups are below the launcher's own, so that whoever confines the launcher confines
//! its tasks, and carry the data folder's name, so that launchers side by side do not meet.
//! What is written where is decided by pure functions; the rest works on any tree of folders.

mod discover;
mod settings;

pub(crate) use discover::{Hierarchy, discover};

use crate::message::Limits;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use settings::settings;

/// Which interface a hierarchy speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Version {
    /// One hierarchy per controller.
    V1,
    /// The unified hierarchy.
    V2,
}

/// The part of the hierarchies in which this launcher keeps its tasks.
#[derive(Debug)]
pub(crate) struct Cgroups {
    parents: Vec<(Version, Vec<String>, PathBuf)>,
}

/// A task's folders, one per hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskGroups {
    folders: Vec<(Version, Vec<String>, PathBuf)>,
}

impl Cgroups {
    /// Makes this launcher's part, `name`, below its own groups.
    pub(crate) fn prepare(hierarchies: &[Hierarchy], name: &str) -> io::Result<Cgroups> {
        let mut parents = Vec::new();
        for one in hierarchies {
            let mut parent = one.own.clone();
            if one.version == Version::V2 && !one.controllers.is_empty() {
                parent = delegate(one)?;
            }
            let folder = parent.join(name);
            make(&folder)?;
            if one.version == Version::V2 && !one.controllers.is_empty() {
                enable(&folder, &one.controllers)?;
            }
            parents.push((one.version, one.controllers.clone(), folder));
        }
        Ok(Cgroups { parents })
    }

    /// The controllers that limits are enforced with.
    pub(crate) fn controllers(&self) -> Vec<String> {
        self.parents
            .iter()
            .flat_map(|(_, controllers, _)| controllers.clone())
            .collect()
    }

    /// `v1`, `v2`, or `hybrid` when the unified hierarchy only kills.
    pub(crate) fn kind(&self) -> &'static str {
        let has = |version| self.parents.iter().any(|(v, _, _)| *v == version);
        let enforces = |version| {
            self.parents
                .iter()
                .any(|(v, c, _)| *v == version && !c.is_empty())
        };
        match (has(Version::V1), has(Version::V2), enforces(Version::V2)) {
            (true, true, _) => "hybrid",
            (false, true, true) => "v2",
            (true, false, _) => "v1",
            _ => "none",
        }
    }

    /// A task's groups, not made yet.
    pub(crate) fn of_task(&self, task: &str) -> TaskGroups {
        let folder = |(version, controllers, parent): &(Version, Vec<String>, PathBuf)| {
            (*version, controllers.clone(), parent.join(task))
        };
        TaskGroups {
            folders: self.parents.iter().map(folder).collect(),
        }
    }

    /// The folders that hold the tasks' groups, one per hierarchy.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &Path> {
        self.parents.iter().map(|(_, _, folder)| folder.as_path())
    }

    /// Names of the groups that exist, whether or not anyone remembers their task.
    pub(crate) fn existing(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for (_, _, parent) in &self.parents {
            for entry in fs::read_dir(parent)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    names.push(entry.file_name().to_string_lossy().into_owned());
                }
            }
        }
        names.sort();
        names.dedup();
        Ok(names)
    }
}

impl TaskGroups {
    /// Makes the groups and sets the limits. A limit that cannot be set is an error, swap excepted where
    /// the kernel does not account for it.
    pub fn create(&self, limits: &Limits) -> io::Result<()> {
        for (version, controllers, folder) in &self.folders {
            make(folder)?;
            for setting in settings(*version, controllers, limits) {
                match fs::write(folder.join(setting.file), &setting.value) {
                    Err(error) if setting.optional && error.kind() == io::ErrorKind::NotFound => {}
                    result => result?,
                }
            }
        }
        Ok(())
    }

    /// The files that a process enters the groups by.
    pub fn entrances(&self) -> Vec<PathBuf> {
        self.folders
            .iter()
            .map(|(_, _, folder)| folder.join("cgroup.procs"))
            .collect()
    }

    /// The file that counts kills for want of memory.
    pub fn memory_events(&self) -> Option<PathBuf> {
        self.of("memory").map(|(version, folder)| {
            folder.join(match version {
                Version::V1 => "memory.oom_control",
                Version::V2 => "memory.events",
            })
        })
    }

    /// The file that counts refused processes.
    pub fn pids_events(&self) -> Option<PathBuf> {
        self.of("pids").map(|(_, folder)| folder.join("pids.events"))
    }

    /// File and value of each limit, as the kernel has them.
    pub fn limits(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for (version, controllers, folder) in &self.folders {
            for setting in settings(*version, controllers, &Limits::default()) {
                if let Ok(value) = fs::read_to_string(folder.join(setting.file)) {
                    found.push((setting.file.to_owned(), value.trim().to_owned()));
                }
            }
        }
        found
    }

    /// Kills every process in the groups. Returns whether there was none.
    pub fn kill(&self) -> io::Result<bool> {
        let mut empty = true;
        for (_, _, folder) in &self.folders {
            empty &= kill_members(folder)?;
        }
        Ok(empty)
    }

    /// Removes the groups. `false` while a process is still in one.
    pub fn remove(&self) -> io::Result<bool> {
        let mut gone = true;
        for (_, _, folder) in &self.folders {
            gone &= remove_empty(folder)?;
        }
        Ok(gone)
    }

    fn of(&self, controller: &str) -> Option<(Version, &Path)> {
        let has = |controllers: &[String]| controllers.iter().any(|c| c == controller);
        self.folders
            .iter()
            .find(|(_, c, _)| has(c))
            .map(|(version, _, folder)| (*version, folder.as_path()))
    }
}

/// Kills every process of one group. Returns whether there was none.
fn kill_members(folder: &Path) -> io::Result<bool> {
    let members = match fs::read_to_string(folder.join("cgroup.procs")) {
        Ok(members) => members,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    };
    if members.trim().is_empty() {
        return Ok(true);
    }
    // Version 1 has no such file.
    let kill_file = folder.join("cgroup.kill");
    if kill_file.exists() && fs::write(kill_file, "1").is_ok() {
        return Ok(false);
    }
    for pid in members
        .lines()
        .filter_map(|line| line.parse().ok())
        .filter_map(Pid::from_raw)
    {
        // Gone between reading and killing is what is wanted.
        let _ =
            pidfd_open(pid, PidfdFlags::empty()).and_then(|process| pidfd_send_signal(process, Signal::KILL));
    }
    Ok(false)
}

/// Kills whatever is in the groups below a launcher's folder, and removes them with it. `false` while a process is
/// still in one.
pub(crate) fn remove_with_members(parent: &Path) -> io::Result<bool> {
    let entries = match fs::read_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        entries => entries?,
    };
    let mut gone = true;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            kill_members(&entry.path())?;
            gone &= remove_empty(&entry.path())?;
        }
    }
    Ok(gone && remove_empty(parent)?)
}

/// Removes a group. `false` while something is in it.
pub(crate) fn remove_empty(folder: &Path) -> io::Result<bool> {
    match fs::remove_dir(folder) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
        Err(error) => Err(error),
    }
}

/// The value of a counter in a file of `name value` lines.
pub(crate) fn counter(text: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

fn make(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn enable(folder: &Path, controllers: &[String]) -> io::Result<()> {
    let list: Vec<String> = controllers.iter().map(|c| format!("+{c}")).collect();
    fs::write(folder.join("cgroup.subtree_control"), list.join(" "))
}

/// Makes the launcher's unified group one that may have children with controllers: such a
/// group must not have processes of its own, so they move to a leaf. The root is exempt.
fn delegate(one: &Hierarchy) -> io::Result<PathBuf> {
    // Started again by a launcher that had moved to its leaf: the delegated group is the one above.
    let own = match one.own.file_name() {
        Some(name) if name == "launcher" => one.own.parent().unwrap_or(&one.own).to_owned(),
        _ => one.own.clone(),
    };
    if own != one.mount || own.join("cgroup.type").exists() {
        let leaf = own.join("launcher");
        make(&leaf)?;
        for pid in fs::read_to_string(own.join("cgroup.procs"))?.lines() {
            fs::write(leaf.join("cgroup.procs"), pid)?;
        }
    }
    enable(&own, &one.controllers)?;
    Ok(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: [&str; 3] = ["memory", "pids", "cpu"];

    /// A v2 tree made of plain folders, as on a host where this cannot run for real.
    #[test]
    fn a_unified_tree_is_delegated_and_limited() {
        let tree = tempfile::tempdir().expect("folder");
        let own = tree.path().join("bulkhead.service");
        fs::create_dir(&own).expect("own");
        fs::write(own.join("cgroup.procs"), "41\n42\n").expect("procs");
        let one = Hierarchy {
            version: Version::V2,
            controllers: WANTED.map(str::to_owned).to_vec(),
            mount: tree.path().to_owned(),
            own: own.clone(),
        };
        let groups = Cgroups::prepare(&[one], "bulkhead-0").expect("prepare");
        let read = |path: &str| fs::read_to_string(own.join(path)).expect("written");
        assert_eq!(read("launcher/cgroup.procs"), "42"); // a plain file keeps the last of the moves
        assert_eq!(read("cgroup.subtree_control"), "+memory +pids +cpu");
        assert_eq!(read("bulkhead-0/cgroup.subtree_control"), "+memory +pids +cpu");
        assert_eq!(groups.kind(), "v2");

        let task = groups.of_task("t1");
        task.create(&Limits::default()).expect("create");
        assert_eq!(read("bulkhead-0/t1/memory.max"), "268435456");
        assert_eq!(read("bulkhead-0/t1/cpu.max"), "max 100000");
        assert!(
            task.memory_events()
                .expect("memory")
                .ends_with("t1/memory.events")
        );
        assert_eq!(groups.existing().expect("list"), ["t1"]);

        fs::write(own.join("bulkhead-0/t1/cgroup.procs"), "1999999999\n").expect("member");
        fs::write(own.join("bulkhead-0/t1/cgroup.kill"), "").expect("kill file");
        assert!(!task.kill().expect("kill"));
        assert_eq!(read("bulkhead-0/t1/cgroup.kill"), "1");
    }

    #[test]
    fn counters_are_read_by_their_whole_name() {
        let text = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        assert_eq!(counter(text, "oom_kill "), 3);
        assert_eq!(counter(text, "oom_group_kill "), 0);
    }
}
