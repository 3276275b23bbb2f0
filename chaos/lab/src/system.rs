//! What the kernel says: processor time and memory of processes, and what machine this is.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use tokio::time::Instant;

/// Where figures were measured.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Machine {
    date: String,
    processors: usize,
    model: String,
    memory_mib: u64,
    kernel: String,
    file_system: String,
    load_average: String,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}; {} × {}, {} MiB, Linux {}, {}; load average before: {}",
            self.date,
            self.processors,
            self.model,
            self.memory_mib,
            self.kernel,
            self.file_system,
            self.load_average
        )
    }
}

/// This machine, with the disk below a folder.
pub fn machine(folder: &Path) -> Machine {
    // What cannot be read stays empty: the figures are none the worse.
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map_or_else(String::new, |rest| {
            rest.trim_start_matches([' ', '\t', ':']).trim().to_owned()
        })
    };
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let memory: u64 = memory
        .trim_end_matches(" kB")
        .parse()
        .map_or(0, |kib: u64| kib / 1024);
    let model = field(&read("/proc/cpuinfo"), "model name");
    Machine {
        date: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        model: if model.is_empty() {
            "unknown processor".into()
        } else {
            model
        },
        memory_mib: memory,
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        file_system: file_system(folder, &read("/proc/self/mountinfo")),
        load_average: read("/proc/loadavg")
            .split_whitespace()
            .take(3)
            .collect::<Vec<_>>()
            .join(" "),
    }
}

/// Type of the file system that a folder is on: that of the longest mount point above it (`proc_pid_mountinfo(5)`).
fn file_system(folder: &Path, mountinfo: &str) -> String {
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    mountinfo
        .lines()
        .filter_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let point = place.split(' ').nth(4)?;
            let kind = kind.split(' ').next()?;
            folder.starts_with(point).then_some((point.len(), kind))
        })
        .max_by_key(|(length, _)| *length)
        .map_or_else(|| "unknown file system".to_owned(), |(_, kind)| kind.to_owned())
}

/// Ticks of `/proc/PID/stat`: always hundredths of a second for user space.
const TICK: Duration = Duration::from_millis(10);

/// Processor time of a process (`proc_pid_stat(5)`, fields 14 and 15), and with it that of its ended children (16, 17).
#[derive(Debug, Clone, Copy)]
struct Stat {
    parent: u32,
    /// Ticks since the machine started (field 22).
    started: u64,
    own: Duration,
    children: Duration,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&text)
}

fn parse_stat(text: &str) -> Option<Stat> {
    let after_name = text.rsplit_once(')')?.1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u32>().ok().map(|ticks| TICK * ticks);
    Some(Stat {
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
        own: ticks(11)? + ticks(12)?,
        children: ticks(13)? + ticks(14)?,
    })
}

/// When a process started, in ticks since the machine did: with its number this names it for good.
pub fn started(pid: u32) -> Option<u64> {
    stat(pid).map(|it| it.started)
}

/// Processor time of these processes so far; what ended counts nothing.
pub fn cpu_of(pids: &[u32]) -> Duration {
    pids.iter().filter_map(|pid| stat(*pid)).map(|it| it.own).sum()
}

/// Processes below one, itself first.
pub fn tree(root: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in processes() {
        if let Some(stat) = stat(pid) {
            children.entry(stat.parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        found.extend(children.remove(pid).unwrap_or_default());
        at += 1;
    }
    found
}

/// Every process there is.
pub fn processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// Processor time of single threads to the nanosecond, which a process of one short life needs: of all processes below
/// one, and of the children that they had.
pub fn cpu_of_tree(root: u32) -> Duration {
    let exact = |pid: u32| -> Duration {
        let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
            return Duration::ZERO; // it ended meanwhile; its parent has its time
        };
        threads
            .flatten()
            .filter_map(|thread| {
                let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
                text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
            })
            .sum()
    };
    tree(root)
        .into_iter()
        .map(|pid| exact(pid) + stat(pid).map_or(Duration::ZERO, |it| it.children))
        .sum()
}

/// Resident memory of a process, in bytes: all of it, and its proportional share.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Memory {
    pub resident: u64,
    pub proportional: u64,
}

/// Reads `smaps_rollup`; as root, since the programs are not dumpable.
pub fn memory(pid: u32) -> anyhow::Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("could not read {path}"))?;
    let kib = |name: &str| {
        text.lines()
            .find_map(|line| {
                line.strip_prefix(name)?
                    .trim()
                    .trim_end_matches(" kB")
                    .parse::<u64>()
                    .ok()
            })
            .with_context(|| format!("{path} says no {name}"))
    };
    Ok(Memory {
        resident: kib("Rss:")? * 1024,
        proportional: kib("Pss:")? * 1024,
    })
}

/// Watches what of the machine programs take that are not below this one.
#[derive(Debug)]
pub struct Others {
    since: Instant,
    busy: Duration,
    own: Duration,
}

impl Others {
    pub fn watch() -> Self {
        Self {
            since: Instant::now(),
            busy: busy(),
            own: own(),
        }
    }

    /// Percent of all processors since then.
    pub fn percent(&self) -> f64 {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let all = self.since.elapsed().as_secs_f64() * processors as f64;
        let others =
            busy().saturating_sub(self.busy).as_secs_f64() - own().saturating_sub(self.own).as_secs_f64();
        (others / all * 100.0).clamp(0.0, 100.0)
    }
}

/// Time that the processors of the machine worked (`proc_stat(5)`): all but idle, waiting and stolen time.
fn busy() -> Duration {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<u32> = line
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    let counted = [0, 1, 2, 5, 6];
    counted
        .iter()
        .filter_map(|at| ticks.get(*at))
        .map(|ticks| TICK * *ticks)
        .sum()
}

/// Time of this program and all below it, ended ones included.
fn own() -> Duration {
    tree(std::process::id())
        .into_iter()
        .filter_map(stat)
        .map(|it| it.own + it.children)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_blanks_hides_no_field() {
        let text = "42 (a) b (c)) S 7 1 1 0 -1 0 0 0 0 0 11 22 33 44 20 0 1 0 100";
        let stat = parse_stat(text).expect("whole");
        assert_eq!((stat.parent, stat.started), (7, 100));
        assert_eq!(stat.own, Duration::from_millis(330));
        assert_eq!(stat.children, Duration::from_millis(770));
        assert!(parse_stat("42 (a) S 7").is_none());
    }

    #[test]
    fn the_longest_mount_point_decides() {
        let mounts = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:5 / /tmp rw - tmpfs none rw\n";
        assert_eq!(file_system(Path::new("/tmp/x"), mounts), "tmpfs");
        assert_eq!(file_system(Path::new("/var"), mounts), "ext4");
        assert_eq!(file_system(Path::new("/var"), ""), "unknown file system");
    }

    #[test]
    fn this_process_is_below_its_parent_and_takes_memory() {
        let own = std::process::id();
        assert!(tree(nix::unistd::getppid().as_raw().cast_unsigned()).contains(&own));
        let memory = memory(own).expect("its own");
        assert!(memory.proportional <= memory.resident && memory.resident > 1 << 20);
    }
}
