//! What a network program gives up before it speaks to anyone.
//!
//! [`harden`] at the start of `main`, before threads; [`confine`] once the listening sockets' ports are known to be
//! allowed and before the runtime starts. Both only ever take away. Manager and worker never execute a program, never
//! fork, and have no business with mounts, namespaces, tracing or kernel modules.

use std::io;

use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use crate::unswapped;

/// Which program confines itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// No capability at all.
    Manager,
    /// Keeps NET_BIND_SERVICE where it has it, for published ports below 1024.
    Worker,
}

/// A privilege that could not be given up; the program must not go on.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A process setting.
    #[error("cannot give up {what}")]
    Setting {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The system call filter.
    #[error("cannot install the system call filter; the kernel needs seccomp with TSYNC")]
    Filter(#[from] SeccompError),
}

/// No core dumps, no tracing by others of the same user, no privileges through execution, files for the owner alone, and
/// memory for keys that is never swapped out; where that cannot be had, the log says so.
///
/// # Errors
/// Where the kernel refuses.
pub fn harden() -> Result<(), ConfineError> {
    let failed = |what| {
        move |error: nix::Error| ConfineError::Setting {
            what,
            source: error.into(),
        }
    };
    prctl::set_dumpable(false).map_err(failed("being dumpable"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed("core dumps"))?;
    prctl::set_no_new_privs().map_err(failed("gaining privileges"))?;
    umask(Mode::from_bits_truncate(0o077));
    unswapped::prepare();
    Ok(())
}

/// Drops capabilities and installs the system call filter on every thread.
///
/// Capabilities belong to a thread: call it before there are others.
///
/// # Errors
/// Where the kernel refuses.
pub fn confine(program: Program) -> Result<(), ConfineError> {
    drop_capabilities(program).map_err(|error| ConfineError::Setting {
        what: "capabilities",
        source: error.into(),
    })?;
    filter()?.load()?;
    Ok(())
}

fn drop_capabilities(program: Program) -> rustix::io::Result<()> {
    let had = capabilities(None)?;
    let keep = match program {
        Program::Manager => CapabilitySet::empty(),
        Program::Worker => had.permitted & CapabilitySet::NET_BIND_SERVICE,
    };
    if had.effective.contains(CapabilitySet::SETPCAP) {
        // Without SETPCAP the bounding set stays, and without execution it gives nothing.
        for capability in CapabilitySet::all().iter() {
            match remove_capability_from_bounding_set(capability) {
                Ok(()) | Err(rustix::io::Errno::INVAL) => {} // newer than this kernel
                Err(error) => return Err(error),
            }
        }
    }
    clear_ambient_capability_set()?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: keep,
            permitted: keep,
            inheritable: CapabilitySet::empty(),
        },
    )
}

/// Files of the data folder, `/etc/hosts`, `/proc` for the node's description.
const FILES: &str = "access chmod close close_range copy_file_range dup dup2 dup3 faccessat faccessat2 fadvise64
    fallocate fchmod fchmodat fcntl fdatasync flock fstat fstatfs fsync ftruncate getcwd getdents64 link linkat lseek
    lstat mkdir mkdirat newfstatat open openat pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readlink
    readlinkat readv rename renameat renameat2 rmdir stat statfs statx sync_file_range truncate umask unlink unlinkat
    utimensat write writev";
/// Memory; [`filter`] refuses what is executable.
const MEMORY: &str = "brk madvise mincore mlock mlock2 mremap munlock munmap";
/// Threads and the process itself; `clone` is bounded in [`filter`].
const PROCESS: &str = "capget exit exit_group futex futex_waitv get_robust_list getcpu getegid geteuid getgid getgroups
    getpgrp getpid getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid membarrier prlimit64
    restart_syscall rseq sched_getaffinity sched_getparam sched_getscheduler sched_yield set_robust_list
    set_tid_address sysinfo tgkill times uname wait4 waitid";
/// Signals, timers and clocks.
const SIGNALS_AND_TIME: &str =
    "clock_getres clock_gettime clock_nanosleep gettimeofday nanosleep pause rt_sigaction
    rt_sigpending rt_sigprocmask rt_sigreturn rt_sigtimedwait sigaltstack time timerfd_create timerfd_gettime
    timerfd_settime";
/// Sockets and waiting for them; `socket` is bounded in [`filter`].
const SOCKETS: &str = "accept accept4 bind connect epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd2
    getpeername getsockname getsockopt listen pipe2 poll ppoll pselect6 recvfrom recvmmsg recvmsg select sendfile
    sendmmsg sendmsg sendto setsockopt shutdown splice";
/// Randomness.
const RANDOM: &str = "getrandom";

/// CLONE_NEW* flags (clone(2)).
const NAMESPACES: u64 = 0x7e02_0080;
const CLONE_THREAD: u64 = 0x0001_0000;
const PROT_EXEC: u64 = 4;
const PR_SET_NAME: u64 = 15;
/// AF_UNIX, AF_INET, AF_INET6.
const FAMILIES: [u64; 3] = [1, 2, 10];
/// TCGETS (is it a terminal), FIONREAD, FIONBIO, FIOCLEX.
const REQUESTS: [u64; 4] = [0x5401, 0x541b, 0x5421, 0x5451];
/// System calls that are still to come get numbers below this for years.
const NUMBERS: i32 = 640;

/// Allows by name and refuses the rest with EPERM. What is newer than this list fails with ENOSYS, so that a C library
/// falls back instead of giving up.
fn filter() -> Result<ScmpFilterContext, SeccompError> {
    let mut filter = ScmpFilterContext::new(ScmpAction::Errno(EPERM))?;
    filter.set_ctl_tsync(true)?;
    filter.set_ctl_optimize(2)?; // a binary tree: the list is long, and each call walks it
    let lists = [FILES, MEMORY, PROCESS, SIGNALS_AND_TIME, SOCKETS, RANDOM];
    for name in lists.iter().flat_map(|list| list.split_whitespace()) {
        // Some names exist on one processor only.
        if let Ok(call) = ScmpSyscall::from_name(name) {
            filter.add_rule(ScmpAction::Allow, call)?;
        }
    }
    let bounded: [(&str, Vec<ScmpArgCompare>); 6] = [
        ("clone", vec![masked(0, NAMESPACES | CLONE_THREAD, CLONE_THREAD)]),
        ("mmap", vec![masked(2, PROT_EXEC, 0)]),
        ("mprotect", vec![masked(2, PROT_EXEC, 0)]),
        ("prctl", vec![masked(0, LOW, PR_SET_NAME)]),
        (
            "socket",
            FAMILIES.iter().map(|&family| masked(0, LOW, family)).collect(),
        ),
        (
            "ioctl",
            REQUESTS.iter().map(|&request| masked(1, LOW, request)).collect(),
        ),
    ];
    for (name, alternatives) in bounded {
        let call = ScmpSyscall::from_name(name)?;
        for comparison in alternatives {
            filter.add_rule_conditional(ScmpAction::Allow, call, &[comparison])?;
        }
    }
    filter.add_rule_conditional(
        ScmpAction::Allow,
        ScmpSyscall::from_name("socketpair")?,
        &[masked(0, LOW, FAMILIES[0])],
    )?;
    pretend_old(&mut filter)?;
    Ok(filter)
}

/// The kernel reads 32 bits of these arguments.
const LOW: u64 = 0xffff_ffff;
const ENOSYS: i32 = rustix::io::Errno::NOSYS.raw_os_error();
const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();

fn pretend_old(filter: &mut ScmpFilterContext) -> Result<(), SeccompError> {
    for call in (0..NUMBERS).map(ScmpSyscall::from) {
        // clone3 keeps its flags in memory, where no filter sees them; on ENOSYS a C library uses clone.
        if call.get_name().is_ok_and(|name| name != "clone3") {
            continue;
        }
        filter.add_rule(ScmpAction::Errno(ENOSYS), call)?;
    }
    Ok(())
}

fn masked(argument: u32, mask: u64, value: u64) -> ScmpArgCompare {
    ScmpArgCompare::new(argument, ScmpCompareOp::MaskedEqual(mask), value)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Runs an ignored test of this file in a process of its own: confinement has no way back.
    fn in_child(test: &str) {
        let program = std::env::current_exe().expect("this program");
        let done = Command::new(program)
            .args([
                "--ignored",
                "--exact",
                "--test-threads=1",
                "--nocapture",
                &format!("process::tests::{test}"),
            ])
            .output()
            .expect("a child");
        let text = [done.stdout, done.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(done.status.success() && text.contains("1 passed"), "{text}");
    }

    #[test]
    fn a_confined_manager_works_and_can_do_nothing_else() {
        in_child("confined_manager");
    }

    #[test]
    fn a_confined_worker_keeps_one_capability_at_most() {
        in_child("confined_worker");
    }

    #[test]
    #[ignore = "runs in a child of its own"]
    fn confined_manager() {
        harden().expect("hardened");
        confine(Program::Manager).expect("confined");
        assert!(capabilities(None).expect("sets").permitted.is_empty());
        works();
        refuses();
    }

    #[test]
    #[ignore = "runs in a child of its own"]
    fn confined_worker() {
        let had = capabilities(None).expect("sets").permitted & CapabilitySet::NET_BIND_SERVICE;
        harden().expect("hardened");
        confine(Program::Worker).expect("confined");
        let sets = capabilities(None).expect("sets");
        assert_eq!((sets.permitted, sets.effective), (had, had));
        assert!(sets.inheritable.is_empty());
        works();
        refuses();
    }

    /// What the kernel does with calls that have no safe wrapper, or that it would refuse without the filter too.
    #[test]
    fn the_filter_refuses_what_the_programs_have_no_business_with() {
        const ALLOW: u32 = 0x7fff_0000;
        let program = program();
        let refuse = |errno: i32| 0x0005_0000 | u32::try_from(errno).expect("positive");
        for name in "ptrace bpf keyctl add_key request_key setns unshare mount umount2 pivot_root chroot kexec_load
            kexec_file_load init_module finit_module delete_module execve execveat fork vfork kill tkill pidfd_open
            pidfd_getfd pidfd_send_signal process_vm_readv process_vm_writev perf_event_open userfaultfd
            io_uring_setup seccomp memfd_create mknod mknodat setuid setgid capset reboot settimeofday
            clock_settime sethostname open_by_handle_at"
            .split_whitespace()
        {
            let call = ScmpSyscall::from_name(name).expect(name);
            if i32::from(call) >= 0 {
                // This processor has it.
                assert_eq!(run(&program, call, &[0; 6]), refuse(EPERM), "{name}");
            }
        }
        for (name, arguments, allowed) in [
            ("read", [0; 6], true),
            ("clone", [CLONE_THREAD, 0, 0, 0, 0, 0], true),
            ("clone", [0; 6], false),                                      // fork
            ("clone", [CLONE_THREAD | 0x1000_0000, 0, 0, 0, 0, 0], false), // a user namespace
            ("mmap", [0, 0, 3, 0, 0, 0], true),
            ("mmap", [0, 0, 7, 0, 0, 0], false),
            ("mprotect", [0, 0, 1, 0, 0, 0], true),
            ("mprotect", [0, 0, 5, 0, 0, 0], false),
            ("prctl", [PR_SET_NAME, 0, 0, 0, 0, 0], true),
            ("prctl", [4, 1, 0, 0, 0, 0], false), // dumpable
            ("socket", [2, 1, 0, 0, 0, 0], true),
            ("socket", [16, 3, 0, 0, 0, 0], false), // netlink
            ("socketpair", [1, 1, 0, 0, 0, 0], true),
            ("socketpair", [2, 1, 0, 0, 0, 0], false),
            ("ioctl", [0, 0x5421, 0, 0, 0, 0], true),
            ("ioctl", [0, 0x5412, 0, 0, 0, 0], false), // typing into a terminal
        ] {
            let call = ScmpSyscall::from_name(name).expect("a call of every processor");
            let expected = if allowed { ALLOW } else { refuse(EPERM) };
            assert_eq!(run(&program, call, &arguments), expected, "{name} {arguments:x?}");
        }
        for call in [
            ScmpSyscall::from_name("clone3").expect("a call"),
            ScmpSyscall::from(NUMBERS - 1),
        ] {
            assert_eq!(run(&program, call, &[0; 6]), refuse(ENOSYS), "{call}");
        }
    }

    /// One instruction of classic BPF: operation, jumps, operand.
    type Instruction = (u16, u8, u8, u32);

    /// The filter as the kernel gets it (struct sock_filter).
    fn program() -> Vec<Instruction> {
        use std::io::{Read as _, Seek as _};
        let mut file = tempfile::tempfile().expect("a file");
        filter().expect("a filter").export_bpf(&file).expect("written");
        let mut bytes = Vec::new();
        file.rewind().expect("back to the start");
        file.read_to_end(&mut bytes).expect("read");
        let (instructions, rest) = bytes.as_chunks::<8>();
        assert!(rest.is_empty() && !instructions.is_empty());
        let read =
            |&[a, b, jt, jf, k @ ..]: &[u8; 8]| (u16::from_ne_bytes([a, b]), jt, jf, u32::from_ne_bytes(k));
        instructions.iter().map(read).collect()
    }

    /// What the program answers (seccomp(2)) to a call of this machine's own kind.
    fn run(program: &[Instruction], call: ScmpSyscall, arguments: &[u64; 6]) -> u32 {
        // struct seccomp_data: number, architecture, instruction pointer, arguments.
        let mut data = Vec::from(i32::from(call).to_ne_bytes());
        // AUDIT_ARCH_X86_64 or AUDIT_ARCH_AARCH64
        let kind: u32 = if cfg!(target_arch = "x86_64") {
            0xc000_003e
        } else {
            0xc000_00b7
        };
        data.extend(kind.to_ne_bytes());
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let (mut at, mut a) = (0, 0);
        loop {
            let (operation, jt, jf, k) = program[at];
            at += 1;
            let jump = |holds| usize::from(if holds { jt } else { jf });
            match operation {
                0x20 => {
                    let from = k as usize;
                    a = u32::from_ne_bytes(data[from..from + 4].try_into().expect("four bytes"));
                }
                0x54 => a &= k,
                0x05 => at += k as usize,
                0x15 => at += jump(a == k),
                0x25 => at += jump(a > k),
                0x35 => at += jump(a >= k),
                0x06 => return k,
                other => panic!("an instruction {other:#x} that libseccomp did not use so far"),
            }
        }
    }

    /// Threads, timers, files, names and TCP on a runtime as the programs use it.
    fn works() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(async {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("file");
            tokio::fs::write(&path, "x").await.expect("written");
            tokio::fs::rename(&path, path.with_extension("new"))
                .await
                .expect("renamed");
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
                .await
                .expect("a port");
            let address = listener.local_addr().expect("an address").to_string();
            let found = crate::dial::resolve(&address).await.expect("a literal");
            let (accepted, connected) =
                tokio::join!(listener.accept(), crate::dial::connect(&address, &found));
            accepted.expect("accepted");
            connected.expect("connected");
            crate::dial::resolve("localhost:1").await.expect("a name");
            let _ =
                tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a signal");
            tokio::spawn(async { crate::Key::generate().expect("a key") })
                .await
                .expect("a task");
        });
    }

    fn refuses() {
        use nix::errno::Errno;
        use nix::sched::{CloneFlags, setns, unshare};
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
        let denied = Command::new("/bin/true")
            .spawn()
            .expect_err("no program is executed");
        assert_eq!(denied.raw_os_error(), Some(EPERM), "{denied}");
        assert_eq!(unshare(CloneFlags::CLONE_NEWUSER), Err(Errno::EPERM));
        let no_namespace = tempfile::tempfile().expect("a file"); // the kernel itself would say EINVAL
        assert_eq!(setns(no_namespace, CloneFlags::empty()), Err(Errno::EPERM));
        let mounted = nix::mount::mount(
            Some("none"),
            "/tmp",
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        );
        assert_eq!(mounted, Err(Errno::EPERM));
        for family in [AddressFamily::Netlink, AddressFamily::Packet, AddressFamily::Alg] {
            let opened = socket(family, SockType::Raw, SockFlag::empty(), None);
            assert_eq!(opened.err(), Some(Errno::EPERM), "{family:?}");
        }
        assert_eq!(prctl::set_dumpable(true), Err(Errno::EPERM));
        assert_eq!(prctl::get_dumpable(), Err(Errno::EPERM));
        assert_eq!(
            nix::sys::signal::kill(nix::unistd::getppid(), None),
            Err(Errno::EPERM)
        );
    }
}
