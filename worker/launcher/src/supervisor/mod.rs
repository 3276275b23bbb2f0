//! One process per task: makes its sandbox, is its parent, keeps its log, records its end.
//!
//! It outlives worker and launcher, so that their restart costs no task; a new launcher finds it by the
//! socket in the task's folder. It is the launcher's own program, executed from a sealed copy
//! in memory: nothing that runs in a task can write to it (CVE-2019-5736).

pub mod protocol;
mod watch;

use crate::connection::Connection;
use crate::id_range::RANGE_SIZE;
use crate::log_file::LogWriter;
use crate::message::{Refusal, RefusalCode};
use crate::sandbox::confine::Confinement;
use crate::sandbox::mounts::{Owner, Stage, Tree};
use crate::sandbox::namespaces::{self, TASK_NAMESPACES, kill_and_reap, layer_mapping, write_maps};
use crate::sandbox::seccomp::Filters;
use crate::sandbox::sys::{self, Fork, Process};
use crate::sandbox::{SetupError, Step, capabilities};
use protocol::{Assignment, FromSupervisor, ToSupervisor};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Killed before anything of the host when memory is short; the kernel adds what a process uses.
const OOM_SCORE: &str = "500";
/// How long secrets may take to arrive: the worker has them in memory already.
const SECRETS_TIMEOUT: Duration = Duration::from_secs(10);

/// The supervisor's system calls after its task runs: its sockets, its log, its child.
pub const SYSTEM_CALLS: &str = "accept4 brk clock_gettime close exit exit_group fcntl fstat ftruncate futex getpid
    getrandom getsockopt gettid ioctl lseek madvise mmap mprotect mremap munmap newfstatat openat pidfd_send_signal
    poll ppoll pread64 read recvmsg renameat renameat2 restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn
    sendmsg sigaltstack socket statx tgkill unlinkat waitid write writev";

/// A running task.
#[derive(Debug)]
struct Running {
    process: Process,
    output: PipeReader,
    error: PipeReader,
    log: LogWriter,
    folder: OwnedFd,
    listener: OwnedFd,
    memory: Memory,
    pids_events: Option<File>,
    assignment: Assignment,
}

/// How the supervisor hears of kills for want of memory.
#[derive(Debug)]
struct Memory {
    events: Option<File>,
    alarm: Option<OwnedFd>,
}

/// Runs a supervisor: one assignment from `channel`, to the end of its task.
pub fn run(channel: OwnedFd) -> io::Result<()> {
    let channel = Connection::from_descriptor(channel)?;
    poll(&mut [PollFd::new(&channel, PollFlags::IN)], None)?;
    let Some((ToSupervisor::Start(assignment), descriptors)) = channel.receive()? else {
        return Ok(());
    };
    match start(*assignment, descriptors) {
        Ok(running) => {
            // The launcher may be gone by now; the next one learns of the task by its socket.
            let _ = channel.send(
                &FromSupervisor::Started {
                    pid: running.process.pid,
                },
                &[],
            );
            watch::watch(running, channel)
        }
        Err(refusal) => channel.send(&FromSupervisor::Failed(refusal), &[]),
    }
}

/// The order matters: see each step. Everything that needs the host's tree is opened before it is left.
fn start(assignment: Assignment, descriptors: Vec<OwnedFd>) -> Result<Running, Refusal> {
    let mut descriptors = descriptors.into_iter();
    let mut next = || {
        descriptors
            .next()
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))
    };
    let (state, folder) = (next().step("receive folders")?, next().step("receive folders")?);
    let (task_filters, own_filters) = (next().step("receive filters")?, next().step("receive filters")?);
    let spec = &assignment.spec;
    let values = if spec.secrets.is_empty() {
        None
    } else {
        Some(next().step("receive secrets")?)
    };

    rustix::process::umask(Mode::empty());
    rustix::process::setsid().step("start a session")?;
    fs::write("/proc/self/oom_score_adj", OOM_SCORE).step("offer itself when memory is short")?;
    let task_filters = read_filters(task_filters)?;
    let own_filters = read_filters(own_filters)?;
    let log = folder
        .try_clone()
        .and_then(|f| LogWriter::create(f, spec.limits.log_bytes))
        .step("start the log")?;
    let listener = listen(&folder).step("open its socket")?;
    let memory = Memory::watch(&assignment).step("watch its memory")?;
    let pids_events = assignment
        .groups
        .pids_events()
        .and_then(|path| File::open(path).ok());
    let mut entrances = Vec::new();
    for entrance in assignment.groups.entrances() {
        entrances.push(
            File::options()
                .write(true)
                .open(entrance)
                .step("open its control groups")?,
        );
    }

    let mapping = layer_mapping(assignment.range).step("map the ids of layers")?;
    let base = assignment.range.base();
    let names: Vec<(String, u32)> = spec.secrets.iter().map(|s| (s.name.clone(), s.size)).collect();
    let tree = Tree {
        layers: &assignment.layers,
        mapping: mapping.as_fd(),
        base,
        hostname: &spec.hostname,
        tmpfs: &spec.tmpfs,
        secrets: &names,
    };
    let mut values = values.map(UnixStream::from);
    if let Some(stream) = &values {
        stream.set_nonblocking(false).step("receive secrets")?;
        stream
            .set_read_timeout(Some(SECRETS_TIMEOUT))
            .step("receive secrets")?;
    }
    // By the current folder, not by descriptor: only that one moves along into a new mount namespace.
    rustix::process::fchdir(&state).step("enter the launcher's folder")?;
    let stage = Stage::build(&tree, values.as_mut().map(|stream| stream as &mut dyn Read))?;
    drop((state, mapping, values));

    let owner = Owner::become_id(base); // so that the task can open its streams again by /dev/stdout
    let (output, output_end) = io::pipe().step("make its streams")?;
    let (error, error_end) = io::pipe().step("make its streams")?;
    drop(owner);
    let (mut go_end, go) = io::pipe().step("make pipes")?;
    let (report, report_end) = io::pipe().step("make pipes")?;

    // Making files as somebody else has closed this process and its copies to everyone without a capability over
    // the host; the copy's namespaces must be opened before it closes itself again.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)
        .step("open itself to its own kind")?;
    match sys::fork(TASK_NAMESPACES).step("make its namespaces")? {
        Fork::Child => {
            drop((go, report));
            // Waits for its ids and control groups; without a parent there is nothing to wait for.
            if go_end.read_exact(&mut [0]).is_err() {
                sys::exit_now(1)
            }
            let ends = [output_end.as_fd(), error_end.as_fd()];
            let confinement = Confinement {
                spec,
                stage: &stage,
                filters: &task_filters,
                output: ends,
                report: report_end.as_fd(),
            };
            let Err(refusal) = confinement.run();
            tell(&report_end, &refusal);
            sys::exit_now(127)
        }
        Fork::Parent(process) => {
            drop((output_end, error_end, report_end, go_end, stage));
            let network = match release(&process, base, &entrances, go, report) {
                Ok(network) => network,
                Err(refusal) => {
                    let _ = kill_and_reap(&process); // it may have ended by itself
                    return Err(refusal);
                }
            };
            // From here on its own network is the task's: what the proxy connects never touches the host's.
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))
                .step("enter its network")?;
            capabilities::drop_all().step("give up its own privileges")?;
            own_filters.load().step("filter its own system calls")?;
            Ok(Running {
                process,
                output,
                error,
                log,
                folder,
                listener,
                memory,
                pids_events,
                assignment,
            })
        }
    }
}

/// Gives the waiting child its ids and limits, lets it go, and hears whether it executed its program.
fn release(
    process: &Process,
    base: u32,
    entrances: &[File],
    mut go: PipeWriter,
    mut report: PipeReader,
) -> Result<OwnedFd, Refusal> {
    write_maps(process, 0, base).step("map its ids")?;
    let pid = process.pid.to_string();
    for mut entrance in entrances {
        entrance
            .write_all(pid.as_bytes())
            .step("move it into its control groups")?;
    }
    // Now: once it runs it may end at any moment, and its names in procfs with it.
    let network = namespaces::open(process, "net").step("open its network")?;
    go.write_all(&[1]).step("let it go")?;
    let mut failure = Vec::new();
    report.read_to_end(&mut failure).step("hear from it")?;
    if failure.is_empty() {
        return Ok(network);
    }
    let unclear = || Refusal::new(RefusalCode::StartFailed, "the sandbox was not completed");
    Err(serde_json::from_slice(&failure).unwrap_or_else(|_| unclear()))
}

fn tell(mut report: &PipeWriter, refusal: &Refusal) {
    let text = serde_json::to_vec(refusal).unwrap_or_default();
    let _ = report.write_all(&text); // the parent is gone, and with it the reason to tell
}

pub(crate) fn read_filters(file: OwnedFd) -> Result<Filters, SetupError> {
    // Shared by all supervisors, so read by position.
    let file = File::from(file);
    let mut bytes = vec![0; usize::try_from(file.metadata().step("read a filter")?.len()).unwrap_or(0)];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).step("read a filter")?;
    Filters::from_bytes(&bytes)
        .ok_or(io::Error::from(io::ErrorKind::InvalidData))
        .step("read a filter")
}

/// Listens in the task's folder. The path goes through a descriptor, as a socket's name must be short.
fn listen(folder: &OwnedFd) -> io::Result<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(
        &socket,
        &SocketAddrUnix::new(crate::tasks::socket_path(folder.as_fd()))?,
    )?;
    listen(&socket, 4)?;
    Ok(socket)
}

impl Memory {
    /// Version 2 kills a group whole by itself; version 1 must be told to tell.
    fn watch(assignment: &Assignment) -> io::Result<Memory> {
        let Some(path) = assignment.groups.memory_events() else {
            return Ok(Memory {
                events: None,
                alarm: None,
            });
        };
        let events = File::open(&path)?;
        let mut alarm = None;
        if let Ok(control) = openat(
            CWD,
            path.with_file_name("cgroup.event_control"),
            OFlags::WRONLY,
            Mode::empty(),
        ) {
            let bell = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?;
            use std::os::fd::AsRawFd;
            let line = format!("{} {}", bell.as_raw_fd(), events.as_raw_fd());
            rustix::io::write(&control, line.as_bytes())?;
            alarm = Some(bell);
        }
        Ok(Memory {
            events: Some(events),
            alarm,
        })
    }

    /// How many processes of the task the kernel killed for want of memory.
    fn kills(&self) -> u64 {
        count(self.events.as_ref(), "oom_kill ")
    }
}

/// Reads a counter of a control group's file that stays open.
fn count(file: Option<&File>, name: &str) -> u64 {
    let mut text = [0; 512];
    let read = file
        .and_then(|file| std::os::unix::fs::FileExt::read_at(file, &mut text, 0).ok())
        .unwrap_or(0);
    crate::sandbox::cgroup::counter(&String::from_utf8_lossy(&text[..read]), name)
}

// A range is what `write_maps` maps; an image has no other ids.
const _: () = assert!(RANGE_SIZE == 65_536);
