//! Which system calls a task may make.
//!
//! Two filters; the kernel takes the stricter answer. The *list* allows calls by name: everything
//! else that the library knows fails with EPERM, and what is newer than both fails with
//! ENOSYS, so that a C library falls back instead of giving up. Other ABIs of the same
//! processor are killed. The *arguments* filter is a few instructions of our own, because the
//! library's comparisons are on 64 bits where the kernel reads 32: `TIOCSTI | 1 << 32` is
//! TIOCSTI.
//!
//! Compiling takes milliseconds, so it happens once, in the launcher; supervisors inherit the result.

use super::sys;
use libc::sock_filter;
use libseccomp::{ScmpAction, ScmpArch, ScmpFilterContext, ScmpSyscall};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Read, Seek};

/// Files and folders: the sandbox's mounts, ids and Landlock decide which.
const FILES: &str = "access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat
    faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchown fchownat fcntl fdatasync fgetxattr flistxattr
    flock fremovexattr fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl lchown lgetxattr link linkat
    listxattr llistxattr lremovexattr lseek lsetxattr lstat mkdir mkdirat mknod mknodat newfstatat open openat
    openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv
    removexattr rename renameat renameat2 rmdir sendfile setxattr splice stat statfs statx symlink symlinkat sync
    sync_file_range syncfs tee truncate umask unlink unlinkat utime utimensat utimes vmsplice write writev";
/// Memory of its own. `memfd_secret` and protection keys only ever hide it better.
const MEMORY: &str =
    "brk get_mempolicy madvise mbind memfd_create memfd_secret mincore mlock mlock2 mlockall mmap
    mprotect mremap msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_madvise
    process_mrelease remap_file_pages set_mempolicy set_mempolicy_home_node";
/// Processes and threads inside its own process namespace; `clone` is bounded by [`ARGUMENTS`].
const PROCESSES: &str =
    "arch_prctl capget capset clone execve execveat exit exit_group fork futex futex_waitv
    get_robust_list get_thread_area getcpu getegid geteuid getgid getgroups getpgid getpgrp getpid getppid
    getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid ioprio_get ioprio_set kill
    membarrier modify_ldt nice personality pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall rseq
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups setpgid
    setpriority setregid setresgid setresuid setreuid setrlimit setsid setuid sysinfo tgkill times tkill uname
    vfork wait4 waitid";
/// Signals, timers and clocks, reading only where a clock is the host's.
const SIGNALS_AND_TIME: &str =
    "alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep
    pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_tgsigqueueinfo setitimer sigaltstack signalfd signalfd4 time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime";
/// Sockets of the families in [`ARGUMENTS`], in a network that is the task's alone, and waiting for them.
const SOCKETS: &str = "accept accept4 bind connect epoll_create epoll_create1 epoll_ctl epoll_ctl_old
    epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 getpeername getsockname getsockopt listen
    pipe pipe2 poll ppoll pselect6 recvfrom recvmmsg recvmsg select sendmmsg sendmsg sendto setsockopt
    shutdown socket socketpair";
/// System V and POSIX queues, in its own IPC namespace.
const QUEUES: &str = "mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget
    msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget";
/// Old asynchronous I/O, used by databases. Its successor, io_uring, is refused: it makes calls that no
/// filter sees.
const ASYNC_IO: &str = "io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit";
/// Randomness, and locking itself in further.
const OTHERS: &str = "getrandom landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp";

/// Namespace flags of `clone`: a task gets no second user namespace to become root in, and
/// through it no more of the kernel.
const NAMESPACE_FLAGS: u32 = 0x7e02_0080;
const AF_NETLINK: u32 = 16;

struct ArgumentRule {
    call: libc::c_long,
    /// Only when the low half of this argument has this value.
    when: Option<(u32, u32)>,
    argument: u32,
    check: Check,
}

/// What the low half of an argument must be.
enum Check {
    OneOf(&'static [u32]),
    NoneOf(&'static [u32]),
    NoBits(u32),
}

/// What must hold of arguments, all compared on the 32 bits that the kernel reads.
const ARGUMENTS: &[ArgumentRule] = &[
    // Typing into, and driving, a terminal that somebody else reads (CVE-2017-5226).
    rule(libc::SYS_ioctl, 1, Check::NoneOf(&[0x5412, 0x541c])),
    // Unix, IPv4, IPv6 and routing information. Each other family is kernel code that few
    // programs need and many escapes used (AF_ALG, AF_PACKET, AF_VSOCK).
    rule(libc::SYS_socket, 0, Check::OneOf(&[1, 2, 10, AF_NETLINK])),
    rule(libc::SYS_socketpair, 0, Check::OneOf(&[1])),
    ArgumentRule {
        call: libc::SYS_socket,
        when: Some((0, AF_NETLINK)),
        argument: 2,
        check: Check::OneOf(&[0]),
    },
    rule(libc::SYS_clone, 0, Check::NoBits(NAMESPACE_FLAGS)),
    // Linux, its 32-bit variant, without address randomisation for debuggers; or only asking.
    rule(
        libc::SYS_personality,
        0,
        Check::OneOf(&[0, 8, 0x20000, 0x20008, u32::MAX]),
    ),
];

const fn rule(call: libc::c_long, argument: u32, check: Check) -> ArgumentRule {
    ArgumentRule {
        call,
        when: None,
        argument,
        check,
    }
}

/// Both filters, compiled.
#[derive(Clone)]
pub(crate) struct Filters {
    arguments: Vec<sock_filter>,
    list: Vec<sock_filter>,
}

impl std::fmt::Debug for Filters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Filters({} + {} instructions)",
            self.arguments.len(),
            self.list.len()
        )
    }
}

impl Filters {
    /// The filters of a task.
    pub(crate) fn for_tasks() -> io::Result<Filters> {
        let lists = [
            FILES,
            MEMORY,
            PROCESSES,
            SIGNALS_AND_TIME,
            SOCKETS,
            QUEUES,
            ASYNC_IO,
            OTHERS,
        ];
        Ok(Filters {
            arguments: compile_arguments(ARGUMENTS),
            list: compile_list(&lists.join(" "))?,
        })
    }

    /// A list alone, for a process of ours that parses what a stranger wrote.
    pub(crate) fn from_list(names: &str) -> io::Result<Filters> {
        Ok(Filters {
            arguments: vec![op(RETURN, 0, 0, ALLOW)],
            list: compile_list(names)?,
        })
    }

    /// Confines this thread. Needs no_new_privs; the list comes last, as it forbids loading more after it only
    /// to those that it allows.
    pub(crate) fn load(&self) -> io::Result<()> {
        sys::load_filter(&self.arguments)?;
        sys::load_filter(&self.list)
    }

    /// As bytes, to hand to supervisors.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let count = u32::try_from(self.arguments.len()).expect("a filter is short");
        let mut bytes = count.to_le_bytes().to_vec();
        for one in self.arguments.iter().chain(&self.list) {
            bytes.extend(one.code.to_le_bytes());
            bytes.extend([one.jt, one.jf]);
            bytes.extend(one.k.to_le_bytes());
        }
        bytes
    }

    /// The inverse of [`Filters::to_bytes`].
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Filters> {
        let (count, rest) = bytes.split_first_chunk()?;
        let mut arguments: Vec<sock_filter> = rest
            .chunks_exact(8)
            .map(|c| sock_filter {
                code: u16::from_le_bytes([c[0], c[1]]),
                jt: c[2],
                jf: c[3],
                k: u32::from_le_bytes([c[4], c[5], c[6], c[7]]),
            })
            .collect();
        let count = u32::from_le_bytes(*count) as usize;
        if count > arguments.len() {
            return None;
        }
        let list = arguments.split_off(count);
        Some(Filters { arguments, list })
    }
}

/// A filter that allows the calls named and nothing else; names that this processor or the library
/// does not know are left out, which refuses them.
fn compile_list(names: &str) -> io::Result<Vec<sock_filter>> {
    let mut filter = ScmpFilterContext::new(ScmpAction::Errno(libc::ENOSYS)).map_err(io::Error::other)?;
    filter
        .set_act_badarch(ScmpAction::KillProcess)
        .map_err(io::Error::other)?;
    filter.set_ctl_optimize(2).map_err(io::Error::other)?; // a binary tree: a dozen comparisons instead of hundreds
    let allowed: Vec<ScmpSyscall> = names.split_whitespace().filter_map(native).collect();
    for call in &allowed {
        filter
            .add_rule(ScmpAction::Allow, *call)
            .map_err(io::Error::other)?;
    }
    let clone3 = native("clone3"); // ENOSYS, so that libraries use `clone`, whose flags can be checked
    for number in 0..1_000 {
        let call = ScmpSyscall::from_raw_syscall(number);
        let known = call.get_name_by_arch(ScmpArch::native()).is_ok();
        if known && !allowed.contains(&call) && Some(call) != clone3 {
            filter
                .add_rule(ScmpAction::Errno(libc::EPERM), call)
                .map_err(io::Error::other)?;
        }
    }
    let mut bytes = Vec::new();
    let mut file = File::from(memfd_create("filter", MemfdFlags::CLOEXEC)?);
    filter.export_bpf(&file).map_err(io::Error::other)?;
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    let instruction = |c: &[u8]| sock_filter {
        code: u16::from_ne_bytes([c[0], c[1]]),
        jt: c[2],
        jf: c[3],
        k: u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
    };
    Ok(bytes.chunks_exact(8).map(instruction).collect())
}

fn native(name: &str) -> Option<ScmpSyscall> {
    let call = ScmpSyscall::from_name(name).ok()?;
    (call.as_raw_syscall() >= 0).then_some(call)
}

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_BITS: u16 = 0x45; // BPF_JMP | BPF_JSET | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const ALLOW: u32 = 0x7fff_0000;
const REFUSE: u32 = 0x0005_0000 | libc::EPERM as u32;
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

/// Offset of an argument's low half in the kernel's description of the call (little endian).
fn low_half(argument: u32) -> u32 {
    16 + 8 * argument
}

fn op(code: u16, jt: usize, jf: usize, k: u32) -> sock_filter {
    let jump = |distance| u8::try_from(distance).expect("rules are short");
    sock_filter {
        code,
        jt: jump(jt),
        jf: jump(jf),
        k,
    }
}

fn compile_arguments(rules: &[ArgumentRule]) -> Vec<sock_filter> {
    // A foreign ABI is the list's to kill.
    let mut program = vec![
        op(LOAD, 0, 0, 4),
        op(JUMP_EQUAL, 1, 0, NATIVE),
        op(RETURN, 0, 0, ALLOW),
    ];
    for rule in rules {
        let number = u32::try_from(rule.call).expect("call numbers are small");
        let mut body = vec![op(LOAD, 0, 0, low_half(rule.argument))];
        match rule.check {
            Check::OneOf(values) => {
                for (i, value) in values.iter().enumerate() {
                    body.push(op(JUMP_EQUAL, values.len() - i, 0, *value));
                }
            }
            Check::NoneOf(values) => {
                for (i, value) in values.iter().enumerate() {
                    let last = i + 1 == values.len();
                    body.push(op(JUMP_EQUAL, values.len() - 1 - i, usize::from(last), *value));
                }
            }
            Check::NoBits(mask) => body.push(op(JUMP_BITS, 0, 1, mask)),
        }
        body.push(op(RETURN, 0, 0, REFUSE));
        if let Some((argument, value)) = rule.when {
            let skip = body.len();
            body.splice(
                0..0,
                [op(LOAD, 0, 0, low_half(argument)), op(JUMP_EQUAL, 0, skip, value)],
            );
        }
        program.extend([op(LOAD, 0, 0, 0), op(JUMP_EQUAL, 0, body.len(), number)]);
        program.extend(body);
    }
    program.push(op(RETURN, 0, 0, ALLOW));
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer, for the few instructions that the compiler above uses.
    fn run(program: &[sock_filter], call: libc::c_long, arguments: [u64; 3]) -> u32 {
        let mut data = Vec::new();
        data.extend(u32::try_from(call).expect("small").to_le_bytes());
        data.extend(NATIVE.to_le_bytes());
        data.extend([0; 8]);
        arguments.iter().for_each(|a| data.extend(a.to_le_bytes()));
        let (mut a, mut at) = (0u32, 0usize);
        loop {
            let one = program[at];
            at += 1;
            let jump = |taken: bool| usize::from(if taken { one.jt } else { one.jf });
            match one.code {
                LOAD => {
                    let k = one.k as usize;
                    a = u32::from_le_bytes(data[k..k + 4].try_into().expect("four bytes"));
                }
                JUMP_EQUAL => at += jump(a == one.k),
                JUMP_BITS => at += jump(a & one.k != 0),
                RETURN => return one.k,
                code => panic!("unexpected instruction {code:#x}"),
            }
        }
    }

    #[test]
    fn arguments_are_compared_as_the_kernel_reads_them() {
        let program = compile_arguments(ARGUMENTS);
        let check = |call, arguments, expected| {
            assert_eq!(
                run(&program, call, arguments),
                expected,
                "call {call} {arguments:x?}"
            );
        };
        check(libc::SYS_read, [0, 0, 0], ALLOW);
        check(libc::SYS_ioctl, [0, 0x5401, 0], ALLOW);
        check(libc::SYS_ioctl, [0, 0x5412, 0], REFUSE);
        check(libc::SYS_ioctl, [0, 0x5412 | 1 << 32, 0], REFUSE);
        check(libc::SYS_ioctl, [0, 0x541c, 0], REFUSE);
        for family in [1, 2, 10, 16] {
            check(libc::SYS_socket, [family, 1, 0], ALLOW);
        }
        for family in [0, 3, 9, 17, 38, 40, 38 | 1 << 32] {
            check(libc::SYS_socket, [family, 1, 0], REFUSE);
        }
        check(libc::SYS_socket, [16, 3, 9], REFUSE);
        check(libc::SYS_socket, [2, 3, 9], ALLOW);
        check(libc::SYS_socketpair, [2, 1, 0], REFUSE);
        check(
            libc::SYS_clone,
            [u64::from(libc::SIGCHLD.cast_unsigned()), 0, 0],
            ALLOW,
        );
        check(libc::SYS_clone, [0x1000_0000, 0, 0], REFUSE);
        check(libc::SYS_personality, [0xffff_ffff, 0, 0], ALLOW);
        check(libc::SYS_personality, [0x0040_0000, 0, 0], REFUSE);
    }

    #[test]
    fn filters_survive_the_way_to_the_supervisor() {
        let filters = Filters::for_tasks().expect("compiles");
        let bytes = filters.to_bytes();
        assert_eq!(Filters::from_bytes(&bytes).expect("parses").to_bytes(), bytes);
        assert!(Filters::from_bytes(&bytes[..3]).is_none());
        assert!(Filters::from_bytes(&u32::MAX.to_le_bytes()).is_none());
    }

    #[test]
    fn the_list_names_only_calls_that_exist() {
        // A typing error would silently refuse a call. Names of other processors are known, too.
        for name in [
            FILES,
            MEMORY,
            PROCESSES,
            SIGNALS_AND_TIME,
            SOCKETS,
            QUEUES,
            ASYNC_IO,
            OTHERS,
        ]
        .iter()
        .flat_map(|list| list.split_whitespace())
        {
            assert!(ScmpSyscall::from_name(name).is_ok(), "{name}");
        }
    }
}
