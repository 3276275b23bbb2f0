//! Which control groups this process is in. Pure: works on the texts of `/proc`.

use super::Version;
use std::path::{Path, PathBuf};

/// Controllers that limits need.
const WANTED: [&str; 3] = ["memory", "pids", "cpu"];

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
}
