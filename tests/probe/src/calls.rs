//! System calls that a task must not be able to make, and what came of trying.

use crate::json::{object, string};
use std::io;

type Attempt = (&'static str, fn() -> i64);

macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {
        // SAFETY: each call below is given null, empty or invalid arguments, or is refused; should one be
        // allowed after all, then it fails on them or changes only this process.
        unsafe { libc::syscall($number $(, $argument as libc::c_long)*) as i64 }
    };
}

const ATTEMPTS: &[Attempt] = &[
    ("acct", || call!(libc::SYS_acct, 0)),
    ("add_key", || call!(libc::SYS_add_key, 0, 0, 0, 0, 0)),
    ("bpf", || call!(libc::SYS_bpf, 0, 0, 0)),
    ("chroot", || call!(libc::SYS_chroot, c"/".as_ptr())),
    ("clock_settime", || call!(libc::SYS_clock_settime, 0, 0)),
    ("clone_newuser", || {
        call!(libc::SYS_clone, 0x1000_0000 | libc::SIGCHLD, 0, 0, 0, 0)
    }),
    ("clone3", || call!(libc::SYS_clone3, 0, 0)),
    ("delete_module", || call!(libc::SYS_delete_module, 0, 0)),
    ("finit_module", || call!(libc::SYS_finit_module, -1, 0, 0)),
    ("fsmount", || call!(libc::SYS_fsmount, -1, 0, 0)),
    ("fsopen", || call!(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0)),
    ("init_module", || call!(libc::SYS_init_module, 0, 0, 0)),
    ("io_uring_setup", || call!(libc::SYS_io_uring_setup, 1, 0)),
    ("ioctl_tioclinux", || call!(libc::SYS_ioctl, 0, 0x541c, 0)),
    ("ioctl_tiocsti", || call!(libc::SYS_ioctl, 0, 0x5412, 0)),
    ("ioctl_tiocsti_high", || {
        call!(libc::SYS_ioctl, 0, 0x5412_i64 | 1 << 32, 0)
    }),
    ("kcmp", || call!(libc::SYS_kcmp, 1, 1, 0, 0, 0)),
    ("kexec_load", || call!(libc::SYS_kexec_load, 0, 0, 0, 0)),
    ("keyctl", || call!(libc::SYS_keyctl, 0, -3, 0)),
    ("migrate_pages", || call!(libc::SYS_migrate_pages, 0, 0, 0, 0)),
    ("mknod_device", || {
        call!(
            libc::SYS_mknodat,
            libc::AT_FDCWD,
            c"/tmp/disk".as_ptr(),
            libc::S_IFBLK | 0o600,
            1 << 8
        )
    }),
    ("mount", || {
        call!(
            libc::SYS_mount,
            c"none".as_ptr(),
            c"/tmp".as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            0
        )
    }),
    ("mount_setattr", || call!(libc::SYS_mount_setattr, -1, 0, 0, 0, 0)),
    ("move_mount", || call!(libc::SYS_move_mount, -1, 0, -1, 0, 0)),
    ("move_pages", || call!(libc::SYS_move_pages, 0, 0, 0, 0, 0, 0)),
    ("name_to_handle_at", || {
        call!(libc::SYS_name_to_handle_at, -1, 0, 0, 0, 0)
    }),
    ("open_by_handle_at", || {
        call!(libc::SYS_open_by_handle_at, -1, 0, 0)
    }),
    ("open_tree", || call!(libc::SYS_open_tree, -1, c"/".as_ptr(), 1)),
    ("perf_event_open", || {
        call!(libc::SYS_perf_event_open, 0, 0, -1, -1, 0)
    }),
    ("personality", || call!(libc::SYS_personality, 0x0040_0000)),
    ("pidfd_getfd", || call!(libc::SYS_pidfd_getfd, -1, 0, 0)),
    ("pivot_root", || {
        call!(libc::SYS_pivot_root, c"/".as_ptr(), c"/".as_ptr())
    }),
    ("process_vm_readv", || {
        call!(libc::SYS_process_vm_readv, 1, 0, 0, 0, 0, 0)
    }),
    ("ptrace", || call!(libc::SYS_ptrace, 0, 0, 0, 0)),
    ("quotactl", || call!(libc::SYS_quotactl, 0, 0, 0, 0)),
    ("reboot", || call!(libc::SYS_reboot, 0, 0, 0, 0)),
    ("request_key", || call!(libc::SYS_request_key, 0, 0, 0, 0)),
    ("sethostname", || call!(libc::SYS_sethostname, c"x".as_ptr(), 1)),
    ("setns", || call!(libc::SYS_setns, -1, 0)),
    ("settimeofday", || call!(libc::SYS_settimeofday, 0, 0)),
    ("socket_alg", || call!(libc::SYS_socket, 38, 5, 0)),
    ("socket_alg_high", || {
        call!(libc::SYS_socket, 38_i64 | 1 << 32, 5, 0)
    }),
    ("socket_audit", || call!(libc::SYS_socket, 16, 3, 9)),
    ("socket_packet", || call!(libc::SYS_socket, 17, 3, 0)),
    ("socket_raw", || call!(libc::SYS_socket, 2, 3, 1)),
    ("socket_vsock", || call!(libc::SYS_socket, 40, 1, 0)),
    ("swapon", || call!(libc::SYS_swapon, 0, 0)),
    ("syslog", || call!(libc::SYS_syslog, 3, 0, 0)),
    ("umount2", || call!(libc::SYS_umount2, c"/tmp".as_ptr(), 2)),
    ("unknown", || call!(999_999)),
    ("unshare_mount", || call!(libc::SYS_unshare, libc::CLONE_NEWNS)),
    ("unshare_user", || call!(libc::SYS_unshare, libc::CLONE_NEWUSER)),
    ("userfaultfd", || call!(libc::SYS_userfaultfd, 0)),
    ("vhangup", || call!(libc::SYS_vhangup)),
];

/// Each attempt's name with the error's name, `allowed`, or the signal that ended it.
pub fn refused() -> String {
    let mut results: Vec<(&str, String)> = ATTEMPTS
        .iter()
        .map(|(name, attempt)| {
            let outcome = if attempt() < 0 {
                error_name(&io::Error::last_os_error())
            } else {
                "allowed".to_owned()
            };
            (*name, string(&outcome))
        })
        .collect();
    // Other doors to the same kernel: these end the process, so a copy goes through them.
    #[cfg(target_arch = "x86_64")]
    results.extend([
        (
            "abi_x32",
            string(&in_a_copy(|| call!(0x4000_0000 + libc::SYS_getpid))),
        ),
        ("abi_i386", string(&in_a_copy(getpid_i386))),
    ]);
    object(results)
}

fn error_name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "EPERM".to_owned(),
        Some(libc::ENOSYS) => "ENOSYS".to_owned(),
        Some(libc::EACCES) => "EACCES".to_owned(),
        Some(number) => format!("error {number}"),
        None => "unknown".to_owned(),
    }
}

#[cfg(target_arch = "x86_64")]
fn getpid_i386() -> i64 {
    let result: i64;
    // SAFETY: the 32-bit entry with getpid (20) reads no memory; the registers it may change are named.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("rax") 20_i64 => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    result
}

fn in_a_copy(attempt: impl Fn() -> i64) -> String {
    // SAFETY: this program has one thread here, so the copy may run anything.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let allowed = attempt() >= 0;
        // SAFETY: `_exit` has no conditions.
        unsafe { libc::_exit(if allowed { 0 } else { 1 }) }
    }
    let mut status = 0;
    // SAFETY: `status` is valid for the kernel to write.
    unsafe { libc::waitpid(child, &mut status, 0) };
    match (
        libc::WIFSIGNALED(status),
        libc::WTERMSIG(status),
        libc::WEXITSTATUS(status),
    ) {
        (true, signal, _) => format!("signal {signal}"),
        (false, _, 0) => "allowed".to_owned(),
        _ => "failed".to_owned(),
    }
}

/// Makes processes that make processes, then tells how many there could be.
pub fn fork_bomb() {
    let mut made = 0;
    loop {
        // SAFETY: the copy only sleeps.
        match unsafe { libc::fork() } {
            0 => loop {
                std::thread::sleep(std::time::Duration::from_secs(3_600));
            },
            -1 => break,
            _ => made += 1,
        }
    }
    println!("{made} processes, then: {}", io::Error::last_os_error());
    std::process::exit(3)
}
