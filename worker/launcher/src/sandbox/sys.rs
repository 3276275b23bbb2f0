//! The system calls for which no safe wrapper exists. All of the crate's unsafe code is here.
//!
//! Each function does one thing and is safe to call; what it relies on is beside each block.
#![expect(
    unsafe_code,
    reason = "system calls without a safe wrapper; each block states its conditions"
)]

use std::ffi::{CString, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// Where a spawned program finds its message socket.
pub(crate) const CHANNEL: RawFd = 3;

/// A process that was started, and the handle by which it is signalled and awaited: a number
/// may be reused, a handle cannot.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its number, for files named by it.
    pub pid: u32,
    /// Its handle.
    pub handle: OwnedFd,
}

/// The two sides of [`fork`].
#[derive(Debug)]
pub(crate) enum Fork {
    /// In the caller.
    Parent(Process),
    /// In the new process.
    Child,
}

struct Exec {
    program: RawFd,
    channel: RawFd,
    argv: *const *const libc::c_char,
    env: *const *const libc::c_char,
    error: libc::c_int,
}

/// Runs in the new process, on its own stack but in the caller's memory, while the caller waits.
extern "C" fn exec_child(context: *mut c_void) -> libc::c_int {
    // SAFETY: `context` is the `Exec` on the stack of `spawn`, which is suspended until this process
    // executes or exits. Only async-signal-safe calls follow, and no memory is allocated.
    unsafe {
        let exec = &mut *context.cast::<Exec>();
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        let placed = if exec.channel == CHANNEL {
            libc::fcntl(CHANNEL, libc::F_SETFD, 0)
        } else {
            libc::dup2(exec.channel, CHANNEL)
        };
        if placed >= 0 {
            libc::syscall(
                libc::SYS_execveat,
                exec.program,
                c"".as_ptr(),
                exec.argv,
                exec.env,
                libc::AT_EMPTY_PATH,
            );
        }
        exec.error = *libc::__errno_location();
        libc::_exit(127)
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// Executes `program` (a descriptor) as a new process with `channel` as its descriptor 3.
///
/// The new process borrows the caller's memory until it executes (`CLONE_VM | CLONE_VFORK`): a plain
/// fork copies page tables, ten times the cost for a large caller.
pub(crate) fn spawn(
    program: BorrowedFd<'_>,
    channel: BorrowedFd<'_>,
    argv: &[CString],
    env: &[CString],
) -> io::Result<Process> {
    let (argv, env) = (pointers(argv), pointers(env));
    let mut exec = Exec {
        program: program.as_raw_fd(),
        channel: channel.as_raw_fd(),
        argv: argv.as_ptr(),
        env: env.as_ptr(),
        error: 0,
    };
    let mut stack = vec![0u128; 64 * 1024 / 16];
    let mut handle: libc::c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the stack is 64 KiB, 16-byte aligned, owned here, and its end is passed; `exec` and the
    // strings that it points to outlive the call, because CLONE_VFORK suspends this thread until the
    // child has executed or exited; `handle` is valid for the kernel to write.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(stack.len());
        libc::clone(
            exec_child,
            top.cast(),
            flags,
            (&raw mut exec).cast(),
            &raw mut handle,
        )
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: CLONE_PIDFD stored a new descriptor that nobody else owns.
    let handle = unsafe { OwnedFd::from_raw_fd(handle) };
    if exec.error != 0 {
        return Err(io::Error::from_raw_os_error(exec.error));
    }
    Ok(Process {
        pid: pid.cast_unsigned(),
        handle,
    })
}

/// Copies this process, the copy in the new namespaces that `namespaces` (CLONE_NEW*) names.
///
/// For single-threaded processes only: in the copy of another, locks could be held by threads that
/// do not exist there. The supervisor and the unpacker are; this refuses to run elsewhere.
pub(crate) fn fork(namespaces: libc::c_int) -> io::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    assert_eq!(threads, 1, "only a single-threaded process may be copied");
    let mut handle: libc::c_int = -1;
    // SAFETY: all-zero is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((namespaces | libc::CLONE_PIDFD).cast_unsigned());
    args.pidfd = (&raw mut handle).addr() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: without CLONE_VM the child has its own copy of all memory and continues on a copy of this
    // stack; there is one thread, so no lock is held by another; `args` has the size that is passed.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        _ => {
            let pid = u32::try_from(pid).expect("process ids fit");
            // SAFETY: CLONE_PIDFD stored a new descriptor that nobody else owns.
            let handle = unsafe { OwnedFd::from_raw_fd(handle) };
            Ok(Fork::Parent(Process { pid, handle }))
        }
    }
}

/// Ends this process without running anything registered for its exit: in a copy made by
/// [`fork`], that belongs to the original.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no conditions.
    unsafe { libc::_exit(code) }
}

/// The message socket that [`spawn`] placed. `None` when this process was not started so, or at
/// the second call.
pub fn take_channel() -> Option<OwnedFd> {
    static TAKEN: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    // SAFETY: F_GETFD only reads a flag, of whatever descriptor there is.
    let open = unsafe { libc::fcntl(CHANNEL, libc::F_GETFD) } >= 0;
    if !open || TAKEN.swap(true, std::sync::atomic::Ordering::SeqCst) {
        return None;
    }
    // SAFETY: it is open, nothing in this program owns number 3 before this call (the caller is the first
    // thing that `main` does), and the flag makes this the only owner.
    Some(unsafe { OwnedFd::from_raw_fd(CHANNEL) })
}

/// Changes the attributes of the mount that `mount` is the root of; with `users`, also maps its ids
/// through that user namespace.
pub(crate) fn mount_setattr(
    mount: BorrowedFd<'_>,
    set: u64,
    users: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set | users.map_or(0, |_| libc::MOUNT_ATTR_IDMAP),
        attr_clr: 0,
        propagation: 0,
        userns_fd: users.map_or(0, |fd| u64::from(fd.as_raw_fd().cast_unsigned())),
    };
    // SAFETY: the path is an empty C string (with AT_EMPTY_PATH), `attributes` is valid for reads of the size passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Puts a compiled seccomp filter on this thread, for ever. Needs no_new_privs.
pub(crate) fn load_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let program = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads `len` instructions from `filter`, which the slice guarantees, and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Closes every descriptor above 2, `keep` excepted, which closes by itself when a program is
/// executed. The caller must not use another descriptor afterwards; values that own one
/// must be forgotten, not dropped.
pub(crate) fn close_all_but(keep: BorrowedFd<'_>) -> io::Result<()> {
    let keep = keep.as_raw_fd().cast_unsigned();
    // SAFETY: closing descriptors touches no memory. The caller (the last steps before an exec, which
    // never returns into code that owns descriptors) gives up the values that own them.
    let result = unsafe {
        let below = if keep > 3 {
            libc::syscall(libc::SYS_close_range, 3, keep - 1, 0)
        } else {
            0
        };
        below | libc::syscall(libc::SYS_close_range, keep + 1, u32::MAX, 0)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Starts with an empty session keyring instead of the launcher's.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    // SAFETY: KEYCTL_JOIN_SESSION_KEYRING with a null name creates an anonymous keyring; no memory is read.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, 0) };
    if result >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives back the default action to SIGPIPE, which the language's runtime ignores and an executed
/// program would inherit.
pub(crate) fn default_sigpipe() {
    // SAFETY: SIG_DFL is a valid disposition; no handler is installed.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Brings the loopback interface of the current network namespace up.
pub(crate) fn loopback_up(socket: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    request.ifr_ifru.ifru_flags =
        libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).expect("two low bits");
    // SAFETY: SIOCSIFFLAGS reads one ifreq, and the name within it ends with a zero.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The version of Landlock, 0 when the kernel has none.
pub(crate) fn landlock_abi() -> u32 {
    // SAFETY: with the VERSION flag, attributes are null and of size zero, and nothing is created.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<c_void>(), 0, 1) };
    u32::try_from(version).unwrap_or(0)
}
