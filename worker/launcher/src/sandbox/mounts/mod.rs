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

mod primitive;
mod secrets;
mod skeleton;

use primitive::*;
pub(crate) use primitive::{Owner, new_proc, tmpfs_noswap};
pub(crate) use secrets::hand_over_secrets;
use secrets::place_secrets;
use skeleton::*;

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

/// Covers a place of procfs, when there is such a one, with a read-only piece of the stage.
fn cover_below(proc: &OwnedFd, name: &str, cover: &str) -> io::Result<()> {
    match open_below(proc, name) {
        Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(place) => attach_to(&clone_tree(CWD, cover)?, &place),
    }
}
