//! What a cluster left behind: processes, mounts, control groups, claims of user ids, files.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_lab::claims_of;

/// What must be gone when a cluster is.
#[derive(Debug)]
pub(crate) struct Leftovers {
    groups: BTreeSet<PathBuf>,
}

impl Leftovers {
    /// Writes down, while a cluster runs, what nobody could find afterwards.
    pub(crate) fn expected(dev: &Path) -> Self {
        let groups = members(dev).into_iter().flat_map(groups_of).collect();
        Self { groups }
    }

    /// Whatever is still there, in words.
    pub(crate) fn found(&self, folder: &Path) -> Vec<String> {
        let needle = folder.to_string_lossy().into_owned();
        let mut found = processes_of(&needle);
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        let mounts = mounts.lines().filter(|line| line.contains(&needle));
        found.extend(mounts.map(|line| format!("mount: {line}")));
        let groups = self.groups.iter().filter(|group| group.exists());
        found.extend(groups.map(|group| format!("control group: {}", group.display())));
        found.extend(
            claims_of(folder)
                .iter()
                .map(|claim| format!("claim: {}", claim.display())),
        );
        let dev = folder.join("dev");
        found.extend(dev.exists().then(|| format!("folder: {}", dev.display())));
        found
    }
}

/// The processes of a local cluster: those below its control group.
pub(crate) fn members(dev: &Path) -> BTreeSet<i32> {
    let cluster = fs::read(dev.join("cluster.json")).unwrap_or_default(); // there may be none
    let cluster: serde_json::Value = serde_json::from_slice(&cluster).unwrap_or_default();
    let mut found = BTreeSet::new();
    if let Some(group) = cluster["group"].as_str() {
        collect(Path::new(group), &mut found);
    }
    found
}

fn collect(group: &Path, found: &mut BTreeSet<i32>) {
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    found.extend(members.lines().filter_map(|pid| pid.parse::<i32>().ok()));
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            collect(&entry.path(), found);
        }
    }
}

/// The control groups that a process is in and that a launcher or `dev` made, in every hierarchy.
fn groups_of(pid: i32) -> Vec<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (hierarchy, path) = (parts.next()?.trim_start_matches("name="), parts.next()?);
        let own = path.find("/bulkhead-")?;
        let end = path[own + 1..].find('/').map_or(path.len(), |at| own + 1 + at);
        let place = |folder: &str| PathBuf::from(format!("/sys/fs/cgroup{folder}{}", &path[..end]));
        let places = match hierarchy {
            "" => vec![place("/unified"), place("")],
            name => vec![place(&format!("/{name}"))],
        };
        places.into_iter().find(|place| place.exists())
    };
    text.lines().filter_map(of_line).collect()
}

/// Processes that name the folder in their arguments, or have something open in it, as supervisors of tasks do.
fn processes_of(needle: &str) -> Vec<String> {
    let own = std::process::id().to_string();
    let named = |process: &Path| {
        let line = fs::read(process.join("cmdline")).unwrap_or_default(); // it may have ended
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let mut files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let open = files.any(|file| {
            fs::read_link(file.path()).is_ok_and(|target| target.to_string_lossy().contains(needle))
        });
        (line.contains(needle) || open).then(|| format!("process {}: {line}", process.display()))
    };
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter(|entry| entry.file_name().to_string_lossy() != own)
        .filter_map(|entry| named(&entry.path()))
        .collect()
}
