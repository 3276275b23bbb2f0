//! The file tree of a task.
//!
//! [`Stage::build`] runs in the supervisor, as host root in a mount namespace of its own: only there
//! can layers be id-mapped and secrets be kept from swap. It ends inside a small memory
//! file system that holds nothing of the host. [`Stage::assemble`] runs in the task's own process
//! and namespaces: it mounts the overlay with the task's ids, so that the kernel's overlay acts
//! with no power over host files. Everything in between travels as descriptors, and every
//! place inside the image is opened below the image's root, without following links: nothing
//! that an image brings can move a mount elsewhere.

use super::sys::mount_setattr;
use super::{SetupError, Step};
use crate::message::{RefusalCode, Tmpfs};
use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2, symlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    mount, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::pivot_root;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use zeroize::Zeroize;

const NO_GAIN: u64 = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
const DATA_ONLY: u64 = NO_GAIN | MOUNT_ATTR_NOEXEC;

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
/// Files of procfs that tell about the host, its boot or its other users; hidden by an empty one of ours.
const HIDDEN_FILES: [&str; 13] = [
    "cmdline",
    "interrupts",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "latency_stats",
    "modules",
    "sched_debug",
    "sysrq-trigger",
    "timer_list",
    "timer_stats",
];
/// The same for folders.
const HIDDEN_FOLDERS: [&str; 3] = ["acpi", "asound", "scsi"];
/// `/dev/shm`, which also counts towards the task's memory limit.
const SHM_BYTES: u64 = 64 << 20;
/// `/tmp` unless the spec says otherwise.
const TMP_BYTES: u64 = 64 << 20;
/// Files in one tmpfs: kernel memory that its size does not count.
const TMPFS_FILES: u32 = 65_536;

/// What the file tree is made of.
#[derive(Debug)]
pub(crate) struct Tree<'a> {
    /// Layer folders below the current one, which is the launcher's state folder; topmost first.
    pub layers: &'a [String],
    /// How the layers' ids appear.
    pub mapping: BorrowedFd<'a>,
    /// The host id of the task's user 0.
    pub base: u32,
    /// The task's host name.
    pub hostname: &'a str,
    /// Writable places.
    pub tmpfs: &'a [Tmpfs],
    /// Names and lengths of the secrets.
    pub secrets: &'a [(String, u32)],
}

/// Mounts that wait for the task's process.
#[derive(Debug)]
pub(crate) struct Stage {
    lower: String,
    devices: Vec<(&'static str, OwnedFd)>,
    dev: OwnedFd,
    writable: Vec<(String, OwnedFd)>,
    secrets: Option<OwnedFd>,
}

impl Stage {
    /// Leaves the host's mounts and prepares the task's. `values` yields the secrets' bytes.
    pub(crate) fn build(tree: &Tree<'_>, values: Option<&mut dyn Read>) -> Result<Stage, SetupError> {
        unshare(CloneFlags::CLONE_NEWNS).step("leave the host's mounts")?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .step("separate the mounts")?;
        let devices = open_devices()?;
        let mut layers = Vec::new();
        for layer in tree.layers {
            let mount = clone_tree(CWD, layer).step_as(RefusalCode::UnknownLayer, "open a layer")?;
            mount_setattr(mount.as_fd(), MOUNT_ATTR_RDONLY | NO_GAIN, Some(tree.mapping))
                .step_as(RefusalCode::Unsupported, "map the ids of a layer")?;
            layers.push(mount);
        }

        enter_stage(tree)?;
        let owner = Owner::become_id(tree.base);
        let skeleton = build_skeleton(tree).step("make the skeleton of the root")?;
        let dev = tmpfs(tree.base, 1 << 16, "0755", DATA_ONLY, &[]).step("make /dev")?;
        fill_dev(dev.as_fd()).step("fill /dev")?;
        drop(owner);

        let mut lower = vec![skeleton.to_owned()];
        for (number, layer) in layers.iter().enumerate() {
            let place = format!("l/{number}");
            let owner = Owner::become_id(tree.base);
            mkdirat(CWD, &place, Mode::from_raw_mode(0o755)).step("place a layer")?;
            drop(owner);
            attach(layer.as_fd(), CWD, &place).step("place a layer")?;
            lower.push(format!("/{place}"));
        }
        let mut writable = vec![(
            "dev/shm".to_owned(),
            tmpfs(tree.base, SHM_BYTES, "1777", DATA_ONLY, &[]).step("make /dev/shm")?,
        )];
        let places = tmpfs_places(tree.tmpfs);
        for place in &places {
            let made = tmpfs(tree.base, place.size_bytes, "1777", DATA_ONLY, &[]).step("make a tmpfs")?;
            let owner = Owner::become_id(tree.base);
            let inner = places.iter().map(|p| p.path.as_str()).chain(["/run/secrets"]);
            for path in inner.filter_map(|path| path.strip_prefix(&place.path)) {
                make_folders(made.as_fd(), path).step("make a place inside a tmpfs")?;
            }
            drop(owner);
            writable.push((place.path.trim_start_matches('/').to_owned(), made));
        }
        let secrets = match values {
            Some(values) => Some(place_secrets(tree, values)?),
            None => None,
        };
        let stage = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).step("seal the stage")?;
        mount_setattr(stage.as_fd(), MOUNT_ATTR_RDONLY | DATA_ONLY, None).step("seal the stage")?;
        let lower = lower.join(":");
        Ok(Stage {
            lower,
            devices,
            dev,
            writable,
            secrets,
        })
    }

    /// Puts the task's root together and makes it the root of this process, which is in the
    /// task's namespaces and has their privileges. `proc_is_there` runs while procfs is writable.
    pub(crate) fn assemble(
        &self,
        proc_is_there: impl FnOnce(BorrowedFd<'_>) -> Result<(), SetupError>,
    ) -> Result<(), SetupError> {
        let options = format!("lowerdir={},redirect_dir=nofollow,metacopy=off", self.lower);
        let options = std::ffi::CString::new(options)
            .map_err(io::Error::from)
            .step("name the layers")?;
        mount(
            "overlay",
            "/r",
            "overlay",
            MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
            options.as_c_str(),
        )
        .step("mount the image's layers")?;
        let root = openat(
            CWD,
            "/r",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .step("open the new root")?;

        attach_below(&root, &self.dev, "dev").step("attach /dev")?;
        for (name, device) in &self.devices {
            attach_below(&root, device, &format!("dev/{name}")).step("attach a device")?;
        }
        for (place, mount) in &self.writable {
            attach_below(&root, mount, place).step("attach a tmpfs")?;
        }
        if let Some(secrets) = &self.secrets {
            attach_below(&root, secrets, "run/secrets").step("attach the secrets")?;
        }
        mount_setattr(self.dev.as_fd(), MOUNT_ATTR_RDONLY, None).step("seal /dev")?;

        let proc = new_proc(&[("hidepid", "invisible")]).step("mount /proc")?;
        attach_below(&root, &proc, "proc").step("attach /proc")?;
        proc_is_there(proc.as_fd())?;
        for (names, cover) in [(&HIDDEN_FILES[..], "/empty"), (&HIDDEN_FOLDERS[..], "/void")] {
            for name in names {
                cover_below(&proc, name, cover).step("hide a part of /proc")?;
            }
        }
        mount_setattr(proc.as_fd(), MOUNT_ATTR_RDONLY, None).step("seal /proc")?;

        rustix::process::fchdir(&root).step("enter the new root")?;
        pivot_root(".", ".").step("change the root")?;
        unmount(".", UnmountFlags::DETACH).step("leave the old root")?;
        rustix::process::chdir("/").step("enter the new root")
    }

    /// The folder of the secrets, to give to the task's user.
    pub(crate) fn secrets(&self) -> Option<BorrowedFd<'_>> {
        self.secrets.as_ref().map(AsFd::as_fd)
    }
}

/// Gives the secrets to the user that the task runs as; from here on nobody can change them.
pub(crate) fn hand_over_secrets(
    mount: BorrowedFd<'_>,
    names: &[(String, u32)],
    uid: u32,
    gid: u32,
) -> Result<(), SetupError> {
    let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
    for (name, _) in names {
        rustix::fs::chownat(mount, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .step("give a secret to the task's user")?;
    }
    mount_setattr(mount, MOUNT_ATTR_RDONLY, None).step("seal the secrets")
}

/// The writable places, `/tmp` among them.
pub(crate) fn tmpfs_places(declared: &[Tmpfs]) -> Vec<Tmpfs> {
    let mut all = declared.to_vec();
    if !all.iter().any(|place| place.path == "/tmp") {
        all.push(Tmpfs {
            path: "/tmp".to_owned(),
            size_bytes: TMP_BYTES,
        });
    }
    // Outer before inner, so that neither hides the other.
    all.sort_by(|a, b| a.path.cmp(&b.path));
    all
}

/// A new mount of a kernel file system, attached nowhere.
pub(crate) fn new_proc(options: &[(&str, &str)]) -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value)?;
    }
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Whether tmpfs can be kept from swap here.
pub(crate) fn tmpfs_noswap() -> bool {
    tmpfs(0, 4096, "0700", DATA_ONLY, &["noswap"]).is_ok()
}

fn tmpfs(base: u32, size: u64, mode: &str, attributes: u64, flags: &[&str]) -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let (owner, size, files) = (base.to_string(), size.to_string(), TMPFS_FILES.to_string());
    for (key, value) in [
        ("uid", owner.as_str()),
        ("gid", &owner),
        ("size", &size),
        ("nr_inodes", &files),
        ("mode", mode),
    ] {
        fsconfig_set_string(&context, key, value)?;
    }
    for flag in flags {
        fsconfig_set_flag(&context, *flag)?;
    }
    fsconfig_create(&context)?;
    let attributes = u32::try_from(attributes).map_err(|_| Errno::INVAL)?;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attributes),
    )?)
}

fn clone_tree(folder: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    Ok(open_tree(folder, path, flags)?)
}

fn attach(mount: BorrowedFd<'_>, folder: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    Ok(move_mount(
        mount,
        "",
        folder,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

/// Opens a place below `root`, following no link whatsoever.
fn open_below(root: &OwnedFd, path: &str) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(
        root,
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )
}

fn attach_to(mount: &OwnedFd, place: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", place, "", flags)?)
}

fn attach_below(root: &OwnedFd, mount: &OwnedFd, path: &str) -> io::Result<()> {
    attach_to(mount, &open_below(root, path)?)
}

/// Covers a place of procfs, when there is such a one, with a read-only piece of the stage.
fn cover_below(proc: &OwnedFd, name: &str, cover: &str) -> io::Result<()> {
    match open_below(proc, name) {
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(place) => attach_to(&clone_tree(CWD, cover)?, &place),
    }
}

/// The host's harmless devices, each checked to be what its name says.
fn open_devices() -> Result<Vec<(&'static str, OwnedFd)>, SetupError> {
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

/// Exchanges the host's tree for a small one of ours, with a complete procfs in it: without one, the
/// kernel refuses the task's own.
fn enter_stage(tree: &Tree<'_>) -> Result<(), SetupError> {
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
fn build_skeleton(tree: &Tree<'_>) -> io::Result<&'static str> {
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
fn make_folders(top: BorrowedFd<'_>, path: &str) -> io::Result<()> {
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

fn fill_dev(dev: BorrowedFd<'_>) -> io::Result<()> {
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

/// Moves the secrets from the stream into memory that is never swapped; the buffer between is wiped.
fn place_secrets(tree: &Tree<'_>, values: &mut dyn Read) -> Result<OwnedFd, SetupError> {
    let total: u64 = tree
        .secrets
        .iter()
        .map(|(_, size)| u64::from(*size).next_multiple_of(4096))
        .sum();
    let mount = tmpfs(tree.base, total + 65_536, "0755", DATA_ONLY, &["noswap"])
        .or_else(|_| ramfs(tree.base))
        .step("make a place for secrets")?;
    let mut buffer = [0; 8192];
    for (name, size) in tree.secrets {
        let owner = Owner::become_id(tree.base);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file =
            openat(&mount, name.as_str(), flags, Mode::from_raw_mode(0o400)).step("make a secret's file")?;
        drop(owner);
        let (mut file, mut left) = (File::from(file), *size as usize);
        while left > 0 {
            let wanted = left.min(buffer.len());
            let read = values.read(&mut buffer[..wanted]).step("receive a secret")?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).step("receive a secret");
            }
            file.write_all(&buffer[..read]).step("store a secret")?;
            left -= read;
        }
    }
    let excess = values
        .read(&mut buffer[..1])
        .step("receive the end of the secrets")?;
    buffer.zeroize();
    if excess != 0 {
        return Err(io::Error::other("more bytes than declared")).step("receive the secrets");
    }
    Ok(mount)
}

/// Memory that is never swapped, on kernels before 6.4; it has no size limit, but what goes in is
/// known and it is sealed after.
fn ramfs(base: u32) -> io::Result<OwnedFd> {
    let context = fsopen("ramfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "mode", "0755")?;
    fsconfig_create(&context)?;
    let attributes = u32::try_from(DATA_ONLY).map_err(|_| Errno::INVAL)?;
    let mount = fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::from_bits_retain(attributes),
    )?;
    let (uid, gid) = (rustix::fs::Uid::from_raw(base), rustix::fs::Gid::from_raw(base));
    rustix::fs::chownat(&mount, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
    Ok(mount)
}

/// While it lives, files are made as another id: a launcher in a container may not change owners
/// afterwards, but may be someone else.
#[derive(Debug)]
pub(crate) struct Owner(());

impl Owner {
    /// Makes files as `id` until dropped.
    pub(crate) fn become_id(id: u32) -> Owner {
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(id));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(id));
        Owner(())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        nix::unistd::setfsuid(nix::unistd::geteuid());
        nix::unistd::setfsgid(nix::unistd::getegid());
    }
}
