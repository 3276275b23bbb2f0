//! What is ours in a task's tree: the stage, the topmost layer, `/dev`.

use super::*;

/// What a program may expect in `/dev`: (name, major, minor). No terminal, no disk, no memory.
const DEVICES: [(&str, u32, u32); 5] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
];

const DEVICE_LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Exchanges the host's tree for a small one of ours, with a complete procfs in it: without one, the
/// kernel refuses the task's own.
pub(super) fn enter_stage(tree: &Tree<'_>) -> Result<(), SetupError> {
    let stage = tmpfs(tree.base, 8 << 20, "0755", NO_GAIN, &[]).step("make the stage")?;
    attach(stage.as_fd(), CWD, "stage").step("enter the stage")?;
    rustix::process::fchdir(&stage).step("enter the stage")?;
    let owner = Owner::become_id(tree.base);
    for folder in ["proc", "l", "r", "s", "void"] {
        mkdirat(CWD, folder, Mode::from_raw_mode(0o755)).step("make the stage")?;
    }
    File::create("empty").step("make the stage")?;
    drop(owner);
    let proc = new_proc(&[]).step("mount a complete /proc")?;
    attach(proc.as_fd(), CWD, "proc").step("mount a complete /proc")?;
    pivot_root(".", ".").step("leave the host's tree")?;
    unmount(".", UnmountFlags::DETACH).step("leave the host's tree")?;
    rustix::process::chdir("/").step("enter the stage")
}

/// The topmost layer, ours: the places that mounts go to, as folders whatever the image has there,
/// and the three files by which a host's name service would show.
pub(super) fn build_skeleton(tree: &Tree<'_>) -> io::Result<&'static str> {
    let places = ["/dev", "/proc", "/etc", "/run/secrets"].map(str::to_owned);
    let declared = tmpfs_places(tree.tmpfs).into_iter().map(|place| place.path);
    for place in places.into_iter().chain(declared) {
        std::fs::create_dir_all(format!("s{place}"))?;
    }
    let name = tree.hostname;
    std::fs::write("s/etc/hostname", format!("{name}\n"))?;
    std::fs::write(
        "s/etc/hosts",
        format!("127.0.0.1\tlocalhost {name}\n::1\tlocalhost {name}\n"),
    )?;
    std::fs::write("s/etc/resolv.conf", "# this task has a loopback network only\n")?;
    Ok("/s")
}

/// Makes each folder of a path that starts with `/`; nothing when it is of a longer name only.
pub(super) fn make_folders(top: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    for (end, _) in path
        .match_indices('/')
        .skip(1)
        .chain([(path.len(), "")])
        .filter(|_| path.starts_with('/'))
    {
        match mkdirat(top, &path[1..end], Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

pub(super) fn fill_dev(dev: BorrowedFd<'_>) -> io::Result<()> {
    for (name, _, _) in DEVICES {
        openat(
            dev,
            name,
            OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o644),
        )?;
    }
    for (name, target) in DEVICE_LINKS {
        symlinkat(target, dev, name)?;
    }
    mkdirat(dev, "shm", Mode::from_raw_mode(0o755))?;
    Ok(())
}

/// The host's harmless devices, each checked to be what its name says.
pub(super) fn open_devices() -> Result<Vec<(&'static str, OwnedFd)>, SetupError> {
    let mut devices = Vec::new();
    for (name, major, minor) in DEVICES {
        let mount = clone_tree(CWD, &format!("/dev/{name}")).step("open a device")?;
        let facts = mount
            .try_clone()
            .and_then(|fd| File::from(fd).metadata())
            .step("check a device")?;
        if !facts.file_type().is_char_device() || facts.rdev() != libc::makedev(major, minor) {
            return Err(io::Error::other(format!("/dev/{name} is not what it should be")))
                .step("check a device");
        }
        mount_setattr(mount.as_fd(), MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, None).step("seal a device")?;
        devices.push((name, mount));
    }
    Ok(devices)
}
