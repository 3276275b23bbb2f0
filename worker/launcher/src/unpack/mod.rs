//! Work on layers, in a process that can touch nothing else.
//!
//! Archives come from strangers. The process that reads them is in a user namespace mapped to the image
//! range, with the layer's folder as its whole file system, no network, three capabilities over
//! that folder only, and a list of harmless system calls. The same process verifies and
//! removes: files that an image brought are never walked by root.

pub mod extract;
pub mod tar;
pub mod tree;

use crate::connection::Connection;
use crate::id_range::IMAGE_RANGE;
use crate::message::{Compression, DiffId, Refusal, RefusalCode};
use crate::sandbox::namespaces::{reap, write_maps};
use crate::sandbox::seccomp::Filters;
use crate::sandbox::sys::{self, Fork};
use crate::sandbox::{SetupError, Step};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::process::{Resource, Rlimit, Signal, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use tar::{Archive, TarError};

/// The system calls of this process once it works.
pub const SYSTEM_CALLS: &str = "brk clock_gettime close exit exit_group fchmod fchmodat fchown fchownat fcntl
    fstat futex getdents64 getrandom linkat lseek madvise mkdirat mknodat mmap mprotect mremap munmap newfstatat
    openat openat2 prctl read readlinkat restart_syscall rt_sigaction rt_sigprocmask rt_sigreturn sendmsg
    sigaltstack statx symlinkat tgkill unlinkat utimensat write";

/// What a layer may be. Far above what images are, far below what fills a node unnoticed.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Sum of file sizes.
    pub bytes: u64,
    /// The archive itself, uncompressed.
    pub archive_bytes: u64,
    /// Entries, implied folders included.
    pub entries: u64,
    /// Folders inside each other.
    pub depth: usize,
    /// A name with its folders.
    pub path_bytes: usize,
    /// Processor time in seconds.
    pub cpu_seconds: u64,
    /// Address space: the largest zstd window, buffers and names.
    pub memory_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            bytes: 4 << 30,
            archive_bytes: 5 << 30,
            entries: 400_000,
            depth: 128,
            path_bytes: 4_095,
            cpu_seconds: 300,
            memory_bytes: 1 << 30,
        }
    }
}

/// What to do with a layer's folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Job {
    /// Fill it from an archive.
    Unpack {
        /// What the uncompressed archive must hash to.
        diff_id: DiffId,
        /// How it is compressed.
        compression: Compression,
    },
    /// Compute its digest.
    Verify,
    /// Empty it.
    Remove,
}

/// What came of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// The tree digest; empty after a removal.
    pub tree_digest: String,
    /// Entries written.
    pub entries: u64,
    /// Bytes of files written.
    pub bytes: u64,
    /// Whether there are whiteouts.
    pub masks: bool,
}

/// The answer to a job.
pub type Outcome = Result<Totals, Refusal>;

/// Runs one job that comes over `channel` with the layer's folder, the filters and, to unpack, the blob.
pub fn run(channel: OwnedFd) -> io::Result<()> {
    let channel = Connection::from_descriptor(channel)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    poll(&mut [PollFd::new(&channel, PollFlags::IN)], None)?;
    let Some((job, descriptors)) = channel.receive::<Job>()? else {
        return Ok(());
    };
    let outcome = isolate(&channel, &job, descriptors);
    if let Err(refusal) = outcome {
        channel.send(&Outcome::Err(refusal), &[])?;
    }
    Ok(())
}

const NAMESPACES: libc::c_int = crate::sandbox::namespaces::TASK_NAMESPACES;

/// Forks the process that works, gives it its ids, and waits for it.
fn isolate(channel: &Connection, job: &Job, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
    let mut descriptors = descriptors.into_iter();
    let mut next = || {
        descriptors
            .next()
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))
    };
    let (folder, filters) = (
        next().step("receive the layer's folder")?,
        next().step("receive filters")?,
    );
    let filters = crate::supervisor::read_filters(filters)?;
    let blob = descriptors.next().map(File::from);
    rustix::process::fchdir(&folder).step("enter the layer's folder")?;
    let (mut wait, go) = io::pipe().step("make a pipe")?;
    match sys::fork(NAMESPACES).step("make its namespaces")? {
        Fork::Child => {
            drop(go);
            let released = wait.read_to_end(&mut Vec::new()).is_ok_and(|read| read == 1);
            if !released {
                sys::exit_now(1)
            }
            let outcome = confine(&filters)
                .map_err(Refusal::from)
                .and_then(|()| work(job, blob));
            let _ = channel.send(&outcome, &[]); // without a launcher nobody wants to know
            sys::exit_now(0)
        }
        Fork::Parent(process) => {
            let mapped = write_maps(&process, 0, IMAGE_RANGE.base()).step("map its ids");
            if mapped.is_ok() {
                io::Write::write_all(&mut &go, &[1]).step("let it go")?;
            }
            drop(go);
            reap(&process).step("wait for its end")?;
            Ok(mapped?)
        }
    }
}

/// The layer's folder becomes everything there is; then privileges go.
fn confine(filters: &Filters) -> Result<(), SetupError> {
    use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    set_thread_groups(&[]).step("drop groups")?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).step("become root of the namespace")?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).step("become root of the namespace")?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let folder = open_tree(CWD, ".", flags).step("enter the layer")?;
    move_mount(&folder, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).step("enter the layer")?;
    rustix::process::fchdir(&folder).step("enter the layer")?;
    drop(folder);
    rustix::process::pivot_root(".", ".").step("leave the host's tree")?;
    unmount(".", UnmountFlags::DETACH).step("leave the host's tree")?;
    rustix::process::chdir("/").step("enter the layer")?;
    rustix::process::umask(Mode::from_raw_mode(0));
    let limits = Limits::default();
    let limit = |resource, value| {
        setrlimit(
            resource,
            Rlimit {
                current: Some(value),
                maximum: Some(value),
            },
        )
        .step("set resource limits")
    };
    limit(Resource::Fsize, limits.bytes)?;
    limit(Resource::Cpu, limits.cpu_seconds)?;
    limit(Resource::As, limits.memory_bytes)?;
    limit(Resource::Core, 0)?;
    // To give files their owners and modes, and to read what only an owner may: of this folder, nothing else.
    let keep = CapabilitySet::CHOWN | CapabilitySet::FOWNER | CapabilitySet::DAC_OVERRIDE;
    let sets = CapabilitySets {
        effective: keep,
        permitted: keep,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).step("give up privileges")?;
    rustix::thread::set_no_new_privs(true).step("give up privileges")?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step("tie it to its parent")?;
    filters.load().step("filter system calls")
}

fn work(job: &Job, blob: Option<File>) -> Outcome {
    let limits = Limits::default();
    let open = |name: &str| {
        openat(
            CWD,
            name,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    };
    let (root, mask) = (
        open("root").step("open the layer")?,
        open("mask").step("open the layer")?,
    );
    let mut totals = match job {
        Job::Unpack { diff_id, compression } => {
            let blob =
                blob.ok_or_else(|| Refusal::new(RefusalCode::Invalid, "no blob came with the request"))?;
            let unpacked = unpack(blob, *compression, diff_id, (root.as_fd(), mask.as_fd()), &limits);
            if unpacked.is_err() {
                // Here rather than by root: only ids of the image range ever touch what an image brought.
                tree::empty(root.as_fd())
                    .and_then(|()| tree::empty(mask.as_fd()))
                    .step("remove the layer")?;
            }
            unpacked?
        }
        Job::Verify => Totals::default(),
        Job::Remove => {
            tree::empty(root.as_fd())
                .and_then(|()| tree::empty(mask.as_fd()))
                .step("remove the layer")?;
            return Ok(Totals::default());
        }
    };
    totals.tree_digest =
        tree::digest(&[root.as_fd(), mask.as_fd()], &limits).step("compute the tree digest")?;
    Ok(totals)
}

fn unpack(
    blob: File,
    compression: Compression,
    diff_id: &DiffId,
    (root, mask): (std::os::fd::BorrowedFd<'_>, std::os::fd::BorrowedFd<'_>),
    limits: &Limits,
) -> Outcome {
    let hostile = |error: TarError| Refusal::new(RefusalCode::HostileLayer, error.to_string());
    let source: Box<dyn Read> = match compression {
        Compression::None => Box::new(blob),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(blob)),
        Compression::Zstd => {
            let mut decoder = zstd::Decoder::new(blob).step("start decompressing")?;
            // 128 MiB, what the format asks decoders to support.
            decoder.window_log_max(27).step("start decompressing")?;
            Box::new(decoder)
        }
    };
    let mut hashed = Hashed {
        source,
        hash: Sha256::new(),
        left: limits.archive_bytes,
    };
    let totals = extract::extract(&mut Archive::new(&mut hashed), root, mask, limits).map_err(hostile)?;
    let found: String = hashed
        .hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if found != diff_id.hex() {
        let message = format!("the layer is sha256:{found}, not the {diff_id} that the image names");
        return Err(Refusal::new(RefusalCode::DigestMismatch, message));
    }
    Ok(totals)
}

/// Hashes and bounds what is read.
struct Hashed<R> {
    source: R,
    hash: Sha256,
    left: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.source.read(buffer)?;
        self.left = self
            .left
            .checked_sub(read as u64)
            .ok_or_else(|| io::Error::other("it grows beyond what a layer may be"))?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}
