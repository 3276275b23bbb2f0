//! What a task sees from inside, as JSON.

use crate::json::{array, object, string, strings};
use crate::sha256;
use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

/// The numbers of all open descriptors.
pub fn open_descriptors() -> Vec<i32> {
    // SAFETY: F_GETFD only reads a flag.
    (0..4_096)
        .filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0)
        .collect()
}

/// Everything, with the descriptors that were open at the start.
pub fn inspect(descriptors: &[i32]) -> String {
    object([
        ("pid", std::process::id().to_string()),
        ("hostname", string(&read("/proc/sys/kernel/hostname"))),
        (
            "cwd",
            string(&std::env::current_dir().map_or_else(|e| text(&e), |d| d.display().to_string())),
        ),
        ("args", strings(std::env::args())),
        ("env", strings(std::env::vars().map(|(name, _)| name))),
        ("descriptors", array(descriptors.iter().map(|fd| descriptor(*fd)))),
        ("status", status()),
        (
            "groups",
            array(groups().into_iter().map(|group| group.to_string())),
        ),
        ("namespaces", namespaces()),
        ("uid_map", string(&read("/proc/self/uid_map"))),
        ("cgroup", strings(read("/proc/self/cgroup").lines())),
        ("mounts", strings(read("/proc/self/mountinfo").lines())),
        ("limits", limits()),
        ("secrets", secrets()),
        (
            "processes",
            array(processes().into_iter().map(|pid| pid.to_string())),
        ),
        ("devices", devices()),
        (
            "write",
            object(WRITES.map(|path| (path, string(&try_write(path))))),
        ),
        ("read", object(READS.map(|path| (path, string(&try_read(path)))))),
        (
            "connect",
            object(CONNECTS.map(|address| (address, string(&try_connect(address))))),
        ),
        ("bind_80", string(&result(TcpListener::bind("127.0.0.1:80")))),
        (
            "interfaces",
            strings(
                read("/proc/net/dev")
                    .lines()
                    .skip(2)
                    .filter_map(|l| l.split(':').next())
                    .map(str::trim),
            ),
        ),
    ])
}

/// Places to make a file in, or to open for writing.
const WRITES: [&str; 17] = [
    "/",
    "/etc",
    "/bin",
    "/dev",
    "/proc",
    "/run",
    "/run/secrets",
    "/tmp",
    "/dev/shm",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/hostname",
    "/proc/sysrq-trigger",
    "/proc/self/exe",
    "/proc/1/exe",
    "/proc/self/oom_score_adj",
    "/etc/hosts",
    "/dev/null",
];
/// Files that tell about the host.
const READS: [&str; 14] = [
    "/proc/kcore",
    "/proc/cmdline",
    "/proc/keys",
    "/proc/kallsyms",
    "/proc/interrupts",
    "/proc/timer_list",
    "/proc/kmsg",
    "/proc/sched_debug",
    "/proc/modules",
    "/dev/mem",
    "/dev/kmsg",
    "/sys/kernel",
    "/etc/shadow",
    "/proc/1/environ",
];
const CONNECTS: [&str; 3] = ["127.0.0.1:1", "10.0.0.1:80", "169.254.169.254:80"];

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn text(error: &io::Error) -> String {
    error.to_string()
}

fn result<T>(result: io::Result<T>) -> String {
    result.map_or_else(|error| text(&error), |_| "ok".to_owned())
}

fn descriptor(fd: i32) -> String {
    let target = fs::read_link(format!("/proc/self/fd/{fd}"));
    object([
        ("number", fd.to_string()),
        (
            "target",
            string(&target.map_or_else(|error| text(&error), |path| path.display().to_string())),
        ),
    ])
}

fn status() -> String {
    let wanted = [
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
    ];
    let status = read("/proc/self/status");
    let pairs = status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(name, _)| wanted.contains(name));
    object(pairs.map(|(name, value)| (name.to_owned(), string(&value.trim().replace('\t', " ")))))
}

fn groups() -> Vec<u32> {
    let mut groups = [0; 64];
    // SAFETY: the buffer has the 64 entries that are named.
    let count = unsafe { libc::getgroups(64, groups.as_mut_ptr()) };
    groups[..usize::try_from(count).unwrap_or(0)].to_vec()
}

fn namespaces() -> String {
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    let link = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}"));
    object(kinds.map(|kind| {
        (
            kind,
            string(&link(kind).map_or_else(|e| text(&e), |path| path.display().to_string())),
        )
    }))
}

fn limits() -> String {
    let limit = |resource| {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: `limit` is valid for the kernel to write.
        unsafe { libc::getrlimit(resource, &mut limit) };
        array([limit.rlim_cur.to_string(), limit.rlim_max.to_string()])
    };
    object([
        ("core", limit(libc::RLIMIT_CORE)),
        ("open_files", limit(libc::RLIMIT_NOFILE)),
        ("locked_bytes", limit(libc::RLIMIT_MEMLOCK)),
    ])
}

/// Names, modes, owners and digests. Never a value.
fn secrets() -> String {
    let Ok(entries) = fs::read_dir("/run/secrets") else {
        return array([]);
    };
    array(entries.flatten().map(|entry| {
        let facts = entry.metadata();
        let number = |value: Option<u32>| value.map_or("null".to_owned(), |value| value.to_string());
        let content = fs::read(entry.path());
        object([
            ("name", string(&entry.file_name().to_string_lossy())),
            (
                "mode",
                string(
                    &facts
                        .as_ref()
                        .map_or(String::new(), |f| format!("{:04o}", f.mode() & 0o7777)),
                ),
            ),
            ("uid", number(facts.as_ref().ok().map(MetadataExt::uid))),
            ("gid", number(facts.as_ref().ok().map(MetadataExt::gid))),
            (
                "length",
                content
                    .as_ref()
                    .map_or("null".to_owned(), |bytes| bytes.len().to_string()),
            ),
            (
                "sha256",
                string(&content.map_or_else(|error| text(&error), |bytes| sha256::hex(&bytes))),
            ),
        ])
    }))
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

fn devices() -> String {
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            // The folder's own idea of the type is that of the file below the mount.
            match fs::symlink_metadata(entry.path()).map(|facts| facts.file_type()) {
                Ok(kind) if kind.is_char_device() => {
                    let number = fs::metadata(entry.path()).map_or(0, |facts| facts.rdev());
                    format!("{name} c{}:{}", libc::major(number), libc::minor(number))
                }
                Ok(kind) if kind.is_block_device() => format!("{name} block"),
                _ => name,
            }
        })
        .collect();
    names.sort();
    strings(names)
}

/// Makes a file in a folder (and removes it), or opens a file for writing.
fn try_write(path: &str) -> String {
    if Path::new(path).is_dir() {
        let file = Path::new(path).join("probe-write");
        let made = fs::File::create(&file);
        if made.is_ok() {
            let _ = fs::remove_file(file);
        }
        return result(made);
    }
    result(fs::File::options().write(true).open(path))
}

/// Opens and reads a few bytes: what is covered is there and empty.
fn try_read(path: &str) -> String {
    let mut bytes = [0; 16];
    match fs::File::open(path).and_then(|mut file| io::Read::read(&mut file, &mut bytes)) {
        Ok(0) => "empty".to_owned(),
        Ok(_) => "ok".to_owned(),
        Err(error) => text(&error),
    }
}

fn try_connect(address: &str) -> String {
    let address = address.parse().expect("an address in the table above");
    result(TcpStream::connect_timeout(&address, Duration::from_millis(500)))
}
