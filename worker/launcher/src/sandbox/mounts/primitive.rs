//! Single mounts, made and placed through descriptors.

use super::*;

pub(super) const NO_GAIN: u64 = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
pub(super) const DATA_ONLY: u64 = NO_GAIN | MOUNT_ATTR_NOEXEC;
/// Files in one tmpfs: kernel memory that its size does not count.
const TMPFS_FILES: u32 = 65_536;

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

pub(super) fn tmpfs(
    base: u32,
    size: u64,
    mode: &str,
    attributes: u64,
    flags: &[&str],
) -> io::Result<OwnedFd> {
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

pub(super) fn clone_tree(folder: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    Ok(open_tree(folder, path, flags)?)
}

pub(super) fn attach(mount: BorrowedFd<'_>, folder: BorrowedFd<'_>, path: &str) -> io::Result<()> {
    Ok(move_mount(
        mount,
        "",
        folder,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

/// Opens a place below `root`, following no link whatsoever.
pub(super) fn open_below(root: &OwnedFd, path: &str) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(
        root,
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )
}

pub(super) fn attach_to(mount: &OwnedFd, place: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", place, "", flags)?)
}

pub(super) fn attach_below(root: &OwnedFd, mount: &OwnedFd, path: &str) -> io::Result<()> {
    attach_to(mount, &open_below(root, path)?)
}

/// Memory that is never swapped, on kernels before 6.4; it has no size limit, but what goes in is
/// known and it is sealed after.
pub(super) fn ramfs(base: u32) -> io::Result<OwnedFd> {
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
