//! From the command line to the loop.

use crate::clock;
use crate::forget;
use crate::id_range::{IdRanges, taken_by_accounts};
use crate::layers::Layers;
use crate::node;
use crate::reconcile::reconcile;
use crate::sandbox::cgroup::{Cgroups, Hierarchy, discover};
use crate::sandbox::mounts::Owner;
use crate::sandbox::seccomp::Filters;
use crate::server::{Programs, Server, group_name};
use crate::tasks::{TaskFolders, boot_id};
use crate::worker_process::{WorkerCommand, WorkerProcess};
use crate::{supervisor, unpack};
use anyhow::{Context, bail};
use nix::sys::signal::{SigSet, Signal as NixSignal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The worker's user unless told otherwise: below the tasks' ranges, above what accounts have.
pub const DEFAULT_WORKER_UID: u32 = 0x6fff_ff00;
/// Where the launchers of one host agree on id ranges.
pub(crate) const CLAIMS: &str = "/run/bulkhead/id-ranges";
/// How long a worker may take to end when asked.
const WORKER_GRACE: Duration = Duration::from_secs(10);

/// What the command line says.
#[derive(Debug, Clone)]
pub struct Options {
    /// The data folder.
    pub data: PathBuf,
    /// The worker's program.
    pub worker: PathBuf,
    /// The worker's user.
    pub worker_uid: u32,
    /// Further arguments for the worker.
    pub worker_arguments: Vec<String>,
    /// Environment that the worker gets.
    pub worker_env: Vec<(String, String)>,
}

/// Runs until asked to end. Tasks go on.
pub fn run(options: &Options) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "the launcher needs root: it makes namespaces with other users' ids, mounts and control groups"
        );
    }
    let (data, _lock) = open_data(&options.data)?;
    make_worker_folder(&data, options.worker_uid)?;
    // Children clear their masks before they execute.
    let mut signals = SigSet::empty();
    [NixSignal::SIGCHLD, NixSignal::SIGTERM, NixSignal::SIGINT]
        .into_iter()
        .for_each(|one| signals.add(one));
    signals.thread_block().context("could not block signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let null = File::open("/dev/null").context("could not open /dev/null")?;
    nix::unistd::dup2_stdin(&null)?;

    let mut server = open_server(&data)?;
    let command = WorkerCommand::new(
        &options.worker,
        &data.join("worker"),
        options.worker_uid,
        &options.worker_arguments,
        &options.worker_env,
    )?;
    let mut worker = WorkerProcess::new(command);
    let mut stopping: Option<Duration> = None;
    loop {
        let now = clock::monotonic();
        if stopping.is_none() {
            match worker.start_if_due(server.programs.program.as_fd(), now) {
                Ok(Some(connection)) => server.set_worker(connection),
                Ok(None) => {}
                Err(error) => return Err(error).context("could not start the worker"),
            }
            if worker.is_running() && !server.has_worker() {
                worker.signal(rustix::process::Signal::KILL); // it closed its socket, or sent nonsense
            }
        }
        server.turn();
        wait(&server, &signals, &worker, stopping)?;
        while let Some(signal) = signals.read_signal()? {
            if signal.ssi_signo != NixSignal::SIGCHLD as u32 && stopping.is_none() {
                tracing::info!("ending; tasks run on");
                if !worker.signal(rustix::process::Signal::TERM) {
                    server.lose_worker();
                }
                stopping = Some(clock::monotonic() + WORKER_GRACE);
            }
        }
        while let Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) =
            waitpid(None, Some(WaitPidFlag::WNOHANG))
        {
            if worker.ended(pid.as_raw().cast_unsigned(), clock::monotonic()) {
                server.lose_worker();
            }
        }
        if let Some(deadline) = stopping
            && (!worker.is_running() || clock::monotonic() >= deadline)
        {
            worker.signal(rustix::process::Signal::KILL);
            if server.tasks.is_empty() {
                forget::leave_nothing(&data, &server.cgroups);
            }
            return Ok(());
        }
    }
}

fn wait(
    server: &Server,
    signals: &SignalFd,
    worker: &WorkerProcess,
    stopping: Option<Duration>,
) -> anyhow::Result<()> {
    let now = clock::monotonic();
    let due = if stopping.is_none() {
        worker.due_in(now)
    } else {
        None
    };
    let end = stopping.map(|deadline| deadline.saturating_sub(now));
    let timeout = [server.timeout(), due, end]
        .into_iter()
        .flatten()
        .min()
        .map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
    let descriptors = server.descriptors();
    let mut waiting = vec![PollFd::new(signals, PollFlags::IN)];
    for (descriptor, to_write) in &descriptors {
        let flags = if *to_write {
            PollFlags::IN | PollFlags::OUT
        } else {
            PollFlags::IN
        };
        waiting.push(PollFd::new(descriptor, flags));
    }
    match poll(&mut waiting, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error).context("could not wait"),
    }
}

/// Opens the data folder, which one launcher may have at a time.
pub(crate) fn open_data(data: &Path) -> anyhow::Result<(PathBuf, File)> {
    let make = |path: &Path, mode| fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    make(data, 0o711).with_context(|| format!("could not make {}", data.display()))?;
    let data = fs::canonicalize(data)?;
    // Passable for the worker, which has a folder in it, and for nothing else.
    fs::set_permissions(&data, fs::Permissions::from_mode(0o711))?;
    let state = data.join("launcher");
    make(&state, 0o700)?;
    fs::set_permissions(&state, fs::Permissions::from_mode(0o700))?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(state.join("lock"))?;
    if rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!(
            "another launcher uses {}: stop it, or give this one a data folder of its own",
            data.display()
        );
    }
    Ok((data, lock))
}

/// Makes the worker's folder as the worker's user: changing the owner of an existing one takes a
/// capability that a launcher in a container does not have.
fn make_worker_folder(data: &Path, uid: u32) -> anyhow::Result<()> {
    let folder = data.join("worker");
    if let Ok(facts) = fs::metadata(&folder) {
        if facts.uid() != uid {
            bail!(
                "{} belongs to user {}, not {uid}: start with --worker-uid {}",
                folder.display(),
                facts.uid(),
                facts.uid()
            );
        }
        return Ok(());
    }
    let nursery = data.join("launcher/nursery");
    let _ = fs::remove_dir_all(&nursery); // from a start that was interrupted
    fs::create_dir(&nursery)?;
    fs::set_permissions(&nursery, fs::Permissions::from_mode(0o777))?;
    let place = File::open(&nursery)?;
    let open = rustix::fs::Mode::from_raw_mode(0o777);
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    let owner = Owner::become_id(uid);
    rustix::fs::mkdirat(&place, "worker", open)?;
    drop(owner);
    rustix::process::umask(umask);
    fs::rename(nursery.join("worker"), &folder)?;
    fs::remove_dir(&nursery)?;
    let owner = Owner::become_id(uid);
    let closed = fs::set_permissions(&folder, fs::Permissions::from_mode(0o700));
    drop(owner);
    closed.context("could not close the worker's folder")
}

fn open_server(data: &Path) -> anyhow::Result<Server> {
    let state = data.join("launcher");
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state.join("stage"))?;
    let folders = TaskFolders::open(state.join("tasks"))?;
    let records = folders.load().context("could not read the tasks' records")?;
    let layers = Layers::open(state.join("layers")).context("could not open the layers")?;
    let hierarchies = find_cgroups()?;
    let cgroups =
        Cgroups::prepare(&hierarchies, &group_name(data)).context("could not make control groups")?;
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default(); // a host without accounts has none
    let taken = taken_by_accounts(
        &read("/etc/passwd"),
        &(read("/etc/subuid") + &read("/etc/subgid")),
    );
    forget::remember_groups(&data.join("launcher"), &cgroups)
        .context("could not write down the control groups")?;
    let in_use: Vec<_> = records.iter().map(|record| record.range).collect();
    let ids = IdRanges::open(Path::new(CLAIMS), data, &in_use, taken).context("could not claim id ranges")?;
    let programs = Programs {
        program: sealed_program().context("could not copy this program into memory")?,
        task_filters: sealed("task-filters", &Filters::for_tasks()?.to_bytes())?,
        supervisor_filters: sealed(
            "supervisor-filters",
            &Filters::from_list(supervisor::SYSTEM_CALLS)?.to_bytes(),
        )?,
        unpacker_filters: sealed(
            "unpacker-filters",
            &Filters::from_list(unpack::SYSTEM_CALLS)?.to_bytes(),
        )?,
        state: File::open(&state)?.into(),
    };
    let facts = node::probe(&cgroups, own_memory_limit(&hierarchies));
    facts
        .fallbacks
        .iter()
        .for_each(|fallback| tracing::warn!(%fallback, "a kernel feature is absent"));
    let mut server = Server::new(programs, (folders, layers), cgroups, ids, facts, boot_id()?);
    reconcile(&mut server, records).context("could not take over the tasks that there are")?;
    Ok(server)
}

/// Finds this process's control groups. In a container they are mounted read-only: then they are made writable in a
/// mount namespace of the launcher's own, where only the container's own part is visible.
fn find_cgroups() -> anyhow::Result<Vec<Hierarchy>> {
    let controllers = |own: &Path| fs::read_to_string(own.join("cgroup.controllers")).unwrap_or_default();
    let mountinfo = fs::read_to_string("/proc/self/mountinfo")?;
    let found = discover(&fs::read_to_string("/proc/self/cgroup")?, &mountinfo, controllers);
    if found.is_empty() {
        bail!("no control groups are mounted: limits could not be enforced");
    }
    let read_only = |one: &&Hierarchy| {
        rustix::fs::access(&one.own, rustix::fs::Access::WRITE_OK) == Err(rustix::io::Errno::ROFS)
    };
    let mut own_mounts = false;
    for one in found.iter().filter(read_only) {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount_change, mount_remount};
        if !std::mem::replace(&mut own_mounts, true) {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
                .context("could not make a mount namespace, which takes CAP_SYS_ADMIN")?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
                .context("could not separate the mounts")?;
        }
        let flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount_remount(&one.mount, flags, "").context("could not make the control groups writable")?;
    }
    Ok(found)
}

/// The memory that the launcher and its tasks may use, when a group above says so.
fn own_memory_limit(hierarchies: &[Hierarchy]) -> Option<u64> {
    let own = hierarchies
        .iter()
        .find(|one| one.controllers.iter().any(|c| c == "memory"))?;
    let read = |file: &str| fs::read_to_string(own.own.join(file)).ok()?.trim().parse().ok();
    read("memory.max").or_else(|| read("memory.limit_in_bytes"))
}

/// This program as a file in memory that nobody, root included, can change: supervisors run in reach of
/// hostile tasks (CVE-2019-5736).
fn sealed_program() -> anyhow::Result<OwnedFd> {
    sealed("bulkhead", &fs::read("/proc/self/exe")?)
}

fn sealed(name: &str, content: &[u8]) -> anyhow::Result<OwnedFd> {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(file);
    file.write_all(content)?;
    fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    // Above the numbers that a spawned process is given.
    Ok(rustix::io::fcntl_dupfd_cloexec(&file, 64)?)
}
