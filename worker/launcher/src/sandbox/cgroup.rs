//! Control groups, version 1 and 2: limits, and the backstop that kills.
//!
//! A task's groups are below the launcher's own, so that whoever confines the launcher confines
//! its tasks, and carry the data folder's name, so that launchers side by side do not meet.
//! What is written where is decided by pure functions; the rest works on any tree of folders.

use crate::message::Limits;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Controllers that limits need.
const WANTED: [&str; 3] = ["memory", "pids", "cpu"];
/// A processor's time is dealt out in slices of this length: the kernel's default. Shorter ones
/// smooth latency and cost more switches.
const PERIOD_US: u64 = 100_000;

/// Which interface a hierarchy speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Version {
    /// One hierarchy per controller.
    V1,
    /// The unified hierarchy.
    V2,
}

/// A mounted hierarchy, and the launcher's place in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// Its interface.
    pub version: Version,
    /// The wanted controllers that it has.
    pub controllers: Vec<String>,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The folder of the launcher's own group.
    pub own: PathBuf,
}

/// Finds the hierarchies that limits need, and the unified one for killing, from the texts of
/// `/proc/self/cgroup` and `/proc/self/mountinfo`. `controllers_of` reads a unified group's list.
pub(crate) fn discover(
    cgroup: &str,
    mountinfo: &str,
    controllers_of: impl Fn(&Path) -> String,
) -> Vec<Hierarchy> {
    let wanted = |list: &str, separator: char| -> Vec<String> {
        list.split(separator)
            .map(str::trim)
            .filter(|c| WANTED.contains(c))
            .map(str::to_owned)
            .collect()
    };
    let mut found = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(names), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let version = if names.is_empty() {
            Version::V2
        } else {
            Version::V1
        };
        let mut controllers = wanted(names, ',');
        if version == Version::V1 && controllers.is_empty() {
            continue;
        }
        let Some((root, mount)) = mount_of(mountinfo, version, names) else {
            continue;
        };
        // In a container, the mount shows a part of the hierarchy only.
        let below = path.strip_prefix(root).unwrap_or(path).trim_start_matches('/');
        let own = if below.is_empty() {
            mount.clone()
        } else {
            mount.join(below)
        };
        if version == Version::V2 {
            controllers = wanted(&controllers_of(&own), ' ');
        }
        found.push(Hierarchy {
            version,
            controllers,
            mount,
            own,
        });
    }
    found
}

/// The root and the mount point of the hierarchy that has the first of `names`.
fn mount_of<'a>(mountinfo: &'a str, version: Version, names: &str) -> Option<(&'a str, PathBuf)> {
    let first = names.split(',').next()?;
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?, left.next()?);
        let mut right = right.split(' ');
        let (kind, options) = (right.next()?, right.nth(1)?);
        let fits = match version {
            Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == first),
            Version::V2 => kind == "cgroup2",
        };
        fits.then(|| (root.trim_end_matches('/'), PathBuf::from(point)))
    })
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
        for (version, _, folder) in &self.folders {
            let members = match fs::read_to_string(folder.join("cgroup.procs")) {
                Ok(members) => members,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if members.trim().is_empty() {
                continue;
            }
            empty = false;
            if *version == Version::V2 && fs::write(folder.join("cgroup.kill"), "1").is_ok() {
                continue;
            }
            for pid in members
                .lines()
                .filter_map(|line| line.parse().ok())
                .filter_map(Pid::from_raw)
            {
                // Gone between reading and killing is what is wanted.
                let _ = pidfd_open(pid, PidfdFlags::empty())
                    .and_then(|process| pidfd_send_signal(process, Signal::KILL));
            }
        }
        Ok(empty)
    }

    /// Removes the groups. `false` while a process is still in one.
    pub fn remove(&self) -> io::Result<bool> {
        let mut gone = true;
        for (_, _, folder) in &self.folders {
            match fs::remove_dir(folder) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => gone = false,
                Err(error) => return Err(error),
            }
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

/// The value of a counter in a file of `name value` lines.
pub(crate) fn counter(text: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

#[derive(Debug, PartialEq, Eq)]
struct Setting {
    file: &'static str,
    value: String,
    optional: bool,
}

fn settings(version: Version, controllers: &[String], limits: &Limits) -> Vec<Setting> {
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

    const HYBRID: &str = "9:name=systemd:/\n8:pids:/\n4:memory:/agents/one\n2:cpuacct:/\n1:cpu:/\n0::/\n";
    const HYBRID_MOUNTS: &str = "\
30 20 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
31 20 0:27 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct
32 20 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 20 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 20 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    fn own(hierarchies: &[Hierarchy]) -> Vec<(&str, String)> {
        let shown = |one: &Hierarchy| one.controllers.join("+");
        hierarchies
            .iter()
            .map(|one| (one.own.to_str().expect("text"), shown(one)))
            .collect()
    }

    #[test]
    fn a_hybrid_host_limits_by_v1_and_kills_by_v2() {
        let found = discover(HYBRID, HYBRID_MOUNTS, |_| "hugetlb".into());
        assert_eq!(
            own(&found),
            [
                ("/sys/fs/cgroup/pids", "pids".into()),
                ("/sys/fs/cgroup/memory/agents/one", "memory".into()),
                ("/sys/fs/cgroup/cpu", "cpu".into()),
                ("/sys/fs/cgroup/unified", String::new()),
            ]
        );
    }

    #[test]
    fn in_a_container_the_mount_is_its_own_part() {
        let cgroup = "4:cpu,cpuacct:/docker/abc\n0::/docker/abc\n";
        let mounts = "\
50 40 0:26 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct
51 40 0:30 /docker/abc /sys/fs/cgroup/unified ro - cgroup2 cgroup rw
";
        let found = discover(cgroup, mounts, |_| String::new());
        assert_eq!(
            own(&found),
            [
                ("/sys/fs/cgroup/cpu,cpuacct", "cpu".into()),
                ("/sys/fs/cgroup/unified", String::new())
            ]
        );
    }

    #[test]
    fn a_unified_host_uses_only_v2() {
        let mounts = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = discover("0::/system.slice/bulkhead.service\n", mounts, |_| {
            "cpuset cpu io memory pids\n".into()
        });
        assert_eq!(
            own(&found),
            [(
                "/sys/fs/cgroup/system.slice/bulkhead.service",
                "cpu+memory+pids".into()
            )]
        );
    }

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
