//! From a copy of the supervisor to the image's program: the order in which privileges shrink.
//!
//! Everything here runs in the task's first process, already in its namespaces. Each step needs
//! what a later one takes away; what fails is told to the supervisor, and nothing runs.

use super::mounts::{self, Stage};
use super::seccomp::Filters;
use super::user::{MAX_ACCOUNTS_BYTES, User};
use super::{SetupError, Step, capabilities, landlock, sys};
use crate::message::{Refusal, RefusalCode, TaskSpec};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

/// Where programs are looked for when the environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Open files: as many as `select` can watch, and what a program may raise that to.
const OPEN_FILES: (u64, u64) = (1_024, 4_096);
/// Memory that cannot be swapped; there is hardly a use for it without a privilege.
const LOCKED_BYTES: u64 = 64 << 10;

/// What the task's process needs, all of it made before it existed.
#[derive(Debug)]
pub(crate) struct Confinement<'a> {
    /// The task.
    pub spec: &'a TaskSpec,
    /// Its mounts.
    pub stage: &'a Stage,
    /// Its system calls.
    pub filters: &'a Filters,
    /// Writing ends of its output and error streams.
    pub output: [BorrowedFd<'a>; 2],
    /// Where a failure is told; closes by itself when the program is executed.
    pub report: BorrowedFd<'a>,
}

impl Confinement<'_> {
    /// Goes through all steps. Returns only the reason why the program does not run.
    pub(crate) fn run(self) -> Result<Infallible, Refusal> {
        let spec = self.spec;
        // 1. Root of the task's user namespace and nobody outside; invisible to its other processes.
        become_namespace_root().step("become root of the namespace")?;
        unshare(CloneFlags::CLONE_NEWCGROUP).step("make a cgroup namespace")?;
        let _ = unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)); // reported as absent by the probe
        nix::unistd::sethostname(&spec.hostname).step("set the host name")?;

        // 2. The task's own root; the settings of its namespaces while procfs is writable.
        let socket = rustix::net::socket(
            rustix::net::AddressFamily::INET,
            rustix::net::SocketType::DGRAM,
            None,
        )
        .step("open a socket")?;
        sys::loopback_up(socket.as_fd()).step("bring up the loopback network")?;
        drop(socket);
        self.stage.assemble(|proc| {
            // Low ports without a capability; no further user namespaces, whatever a filter lets through.
            set(proc, "sys/net/ipv4/ip_unprivileged_port_start").step("open low ports")?;
            set(proc, "sys/user/max_user_namespaces").step("forbid user namespaces")
        })?;

        // 3. Its user, and what belongs to it.
        let (uid, gid) = resolve_user(&spec.user)?;
        if let Some(secrets) = self.stage.secrets() {
            let names: Vec<_> = spec.secrets.iter().map(|s| (s.name.clone(), s.size)).collect();
            mounts::hand_over_secrets(secrets, &names, uid, gid)?;
        }
        for stream in self.output {
            let owner = (
                Some(rustix::fs::Uid::from_raw(uid)),
                Some(rustix::fs::Gid::from_raw(gid)),
            );
            rustix::fs::fchown(stream, owner.0, owner.1).step("give the output to the task's user")?;
        }
        enter(&spec.workdir)?;
        let candidates = candidates(spec)?;

        // 4. A session, limits and standard streams of its own.
        rustix::process::umask(Mode::from_raw_mode(0o022));
        rustix::process::setsid().step("start a session")?;
        let _ = sys::new_session_keyring(); // without keyrings in the kernel there is none to leave
        set_limits().step("set resource limits")?;
        let null = openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .step("open /dev/null")?;
        nix::unistd::dup2_stdin(&null).step("connect standard input")?;
        nix::unistd::dup2_stdout(self.output[0]).step("connect standard output")?;
        nix::unistd::dup2_stderr(self.output[1]).step("connect standard error")?;
        sys::default_sigpipe();
        nix::sys::signal::SigSet::empty()
            .thread_set_mask()
            .step("unblock signals")?;

        // 5. No privilege, for ever. The parent's death is asked for after the last change of ids,
        // which would clear it.
        let places = mounts::tmpfs_places(&spec.tmpfs);
        let writable: Vec<&str> = places
            .iter()
            .map(|p| p.path.as_str())
            .chain(["/dev/shm"])
            .collect();
        let argv = c_strings(spec.argv.iter().cloned())?;
        let env = c_strings(spec.env.iter().map(|(name, value)| format!("{name}={value}")))?;
        capabilities::become_powerless(uid, gid).step("give up privileges")?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
            .step("tie it to its supervisor")?;
        landlock::restrict(&writable).step("restrict files")?;
        std::mem::forget(null); // closed with all others
        sys::close_all_but(self.report).step("close descriptors")?;
        self.filters.load().step("filter system calls")?;

        // 6. The image's program.
        let mut refused = nix::errno::Errno::ENOENT;
        for path in &candidates {
            let Err(error) = nix::unistd::execve(path, &argv, &env);
            if error != nix::errno::Errno::ENOENT && error != nix::errno::Errno::ENOTDIR {
                refused = error;
            }
        }
        Err(refused)
            .step_as(RefusalCode::NotExecutable, "execute the program")
            .map_err(|error: SetupError| {
                let mut refusal = Refusal::from(error);
                refusal.message = format!("{} ({:?})", refusal.message, spec.argv[0]);
                refusal
            })
    }
}

/// In a new user namespace a process has every capability there, but its ids still are those of the
/// host, which have no meaning inside.
fn become_namespace_root() -> io::Result<()> {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    set_thread_groups(&[])?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    Ok(())
}

fn set(proc: BorrowedFd<'_>, setting: &str) -> io::Result<()> {
    let file = openat(
        proc,
        setting,
        OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::io::write(&file, b"0")?;
    Ok(())
}

fn resolve_user(text: &str) -> Result<(u32, u32), Refusal> {
    let user = User::parse(text)?;
    let read = |path| {
        if user.needs_accounts() {
            read_accounts(path)
        } else {
            Ok(String::new())
        }
    };
    user.resolve(&read("etc/passwd")?, &read("etc/group")?)
}

/// Reads a file of the image that may be anything: a link is followed within the root only, a pipe or
/// device is not waited for, and only its beginning is read.
fn read_accounts(path: &str) -> Result<String, Refusal> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).step("open the root")?;
    let file = match openat2(&root, path, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(_) => return Ok(String::new()), // then no name is known, which the caller says
    };
    if !file.metadata().is_ok_and(|facts| facts.is_file()) {
        return Ok(String::new());
    }
    let mut text = Vec::new();
    file.take(MAX_ACCOUNTS_BYTES)
        .read_to_end(&mut text)
        .step("read the image's accounts")?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Enters the working folder, which must lie below the root by its real path: a folder reached
/// through a descriptor of procfs could lie outside (CVE-2024-21626).
fn enter(workdir: &str) -> Result<(), Refusal> {
    let path = if workdir.is_empty() { "/" } else { workdir };
    let step = "enter the working folder";
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).step(step)?;
    let folder = openat2(
        &root,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )
    .step_as(RefusalCode::Invalid, step)?;
    rustix::process::fchdir(&folder).step(step)?;
    let real = rustix::process::getcwd(Vec::new()).step(step)?;
    if real.to_bytes().starts_with(b"/") && !real.to_bytes().starts_with(b"/proc") {
        return Ok(());
    }
    Err(Refusal::new(
        RefusalCode::Invalid,
        "the working folder is not in the image",
    ))
}

/// The paths to try, in order.
fn candidates(spec: &TaskSpec) -> Result<Vec<CString>, Refusal> {
    let program = spec.argv.first().map_or("", String::as_str);
    let path = spec
        .env
        .iter()
        .find(|(name, _)| name == "PATH")
        .map_or(DEFAULT_PATH, |(_, value)| value);
    let paths: Vec<String> = if program.contains('/') {
        vec![program.to_owned()]
    } else {
        path.split(':')
            .filter(|folder| folder.starts_with('/'))
            .map(|f| format!("{f}/{program}"))
            .collect()
    };
    c_strings(paths.into_iter())
}

fn c_strings(strings: impl Iterator<Item = String>) -> Result<Vec<CString>, Refusal> {
    let nul = |_| Refusal::new(RefusalCode::Invalid, "a zero byte in an argument or variable");
    strings.map(|text| CString::new(text).map_err(nul)).collect()
}

/// Only ever lowers: raising needs a privilege that not every root has.
fn set_limits() -> io::Result<()> {
    let lower = |resource, soft: u64, hard: u64| {
        let now = getrlimit(resource);
        let hard = now.maximum.map_or(hard, |maximum| maximum.min(hard));
        setrlimit(
            resource,
            Rlimit {
                current: Some(soft.min(hard)),
                maximum: Some(hard),
            },
        )
    };
    lower(Resource::Core, 0, 0)?;
    lower(Resource::Nofile, OPEN_FILES.0, OPEN_FILES.1)?;
    lower(Resource::Memlock, LOCKED_BYTES, LOCKED_BYTES)?;
    Ok(())
}
