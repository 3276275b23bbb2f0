//! Writes an archive's entries into a layer folder, and its whiteouts into a second one.
//!
//! Every place is opened from the layer's root without following links, so that a link which
//! the archive made leads nowhere. Whiteouts (`.wh.NAME`, `.wh..wh..opq`) become character devices
//! 0:0, the overlay's own mark, in a folder `mask` that is stacked directly below the layer: there
//! both kinds mean the same, no extended attribute is needed, and the layer may have an entry
//! of the same name.

use super::tar::{Archive, Entry, Kind, TarError};
use super::{Limits, Totals};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, openat2};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The highest id that a task has.
const MAX_ID: u64 = 65_535;
/// Times beyond this (in the year 2242) count as this.
const MAX_TIME: u64 = 1 << 33;

const REFUSED_NAME: TarError = TarError::Malformed("a name that is absolute, has .., or is over its limits");

/// Extracts a whole archive.
pub fn extract<R: Read>(
    archive: &mut Archive<R>,
    root: BorrowedFd<'_>,
    mask: BorrowedFd<'_>,
    limits: &Limits,
) -> Result<Totals, TarError> {
    let mut extraction = Extraction {
        root,
        limits,
        folders: BTreeSet::new(),
        masked: BTreeSet::new(),
        totals: Totals::default(),
    };
    while let Some(entry) = archive.next_entry()? {
        extraction.entry(archive, &entry)?;
    }
    extraction.totals.masks = !extraction.masked.is_empty();
    write_masks(mask, &extraction.masked)?;
    Ok(extraction.totals)
}

struct Extraction<'a> {
    root: BorrowedFd<'a>,
    limits: &'a Limits,
    /// Folders that had an entry of their own; others were made because something is in them.
    folders: BTreeSet<Vec<u8>>,
    masked: BTreeSet<Vec<u8>>,
    totals: Totals,
}

impl Extraction<'_> {
    fn entry<R: Read>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> Result<(), TarError> {
        self.totals.entries += 1;
        if self.totals.entries > self.limits.entries {
            return Err(TarError::Malformed("more entries than a layer may have"));
        }
        let path = normalise(&entry.path, self.limits)?;
        let (parent, name) = split(&path);
        if let Some(hidden) = whiteout(parent, name)? {
            self.masked.insert(hidden);
            return Ok(());
        }
        if entry.uid > MAX_ID || entry.gid > MAX_ID {
            return Err(TarError::Malformed("an owner above id 65535"));
        }
        let owner = (id(entry.uid), id(entry.gid));
        let folder = self.parent(parent)?;
        match &entry.kind {
            Kind::Folder => self.folder(&folder, &path, name, entry, owner),
            Kind::File(size) => {
                self.totals.bytes += size;
                if self.totals.bytes > self.limits.bytes {
                    return Err(TarError::Malformed("more bytes than a layer may have"));
                }
                write_file(archive, &folder, name, entry, owner)
            }
            Kind::Symlink(target) => {
                if target.is_empty() || target.len() > self.limits.path_bytes {
                    return Err(REFUSED_NAME);
                }
                once(rustix::fs::symlinkat(target.as_slice(), &folder, name))?;
                let (uid, gid) = (Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)));
                failed(rustix::fs::chownat(
                    &folder,
                    name,
                    uid,
                    gid,
                    AtFlags::SYMLINK_NOFOLLOW,
                ))
            }
            Kind::Hardlink(target) => {
                let target = normalise(target, self.limits)?;
                let (target_parent, target_name) = split(&target);
                let from = open_folder(self.root, target_parent).map_err(|_| missing_link())?;
                let facts = rustix::fs::statat(&from, target_name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|_| missing_link())?;
                if FileType::from_raw_mode(facts.st_mode) != FileType::RegularFile {
                    return Err(TarError::Malformed("a hard link to something that is not a file"));
                }
                once(rustix::fs::linkat(
                    &from,
                    target_name,
                    &folder,
                    name,
                    AtFlags::empty(),
                ))
            }
        }
    }

    fn folder(
        &mut self,
        parent: &OwnedFd,
        path: &[u8],
        name: &[u8],
        entry: &Entry,
        (uid, gid): (u32, u32),
    ) -> Result<(), TarError> {
        if !self.folders.insert(path.to_vec()) {
            return Err(TarError::Malformed("one name twice"));
        }
        if !name.is_empty() {
            match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return failed(Err(error)),
            }
        }
        // Opened without following links: what exists by this name is a folder, or is refused.
        let folder = open_folder(parent.as_fd(), name).map_err(|_| TarError::Malformed("one name twice"))?;
        failed(rustix::fs::fchown(
            &folder,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
        ))?;
        failed(rustix::fs::fchmod(
            &folder,
            Mode::from_raw_mode(entry.mode & 0o1777),
        ))
    }

    /// Opens the folder that an entry is in, making what is missing of it.
    fn parent(&mut self, path: &[u8]) -> Result<OwnedFd, TarError> {
        if let Ok(folder) = open_folder(self.root, path) {
            return Ok(folder);
        }
        let mut folder = failed(open_folder(self.root, b""))?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => self.totals.entries += 1,
                Err(Errno::EXIST) => {}
                Err(error) => return failed(Err(error)),
            }
            folder = open_folder(folder.as_fd(), name)
                .map_err(|_| TarError::Malformed("an entry inside something that is not a folder"))?;
        }
        Ok(folder)
    }
}

fn write_file<R: Read>(
    archive: &mut Archive<R>,
    folder: &OwnedFd,
    name: &[u8],
    entry: &Entry,
    (uid, gid): (u32, u32),
) -> Result<(), TarError> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o600));
    let mut file = File::from(opened.map_err(twice)?);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = archive.read_content(&mut buffer)?;
        if read == 0 {
            break;
        }
        file.write_all(&buffer[..read])?;
    }
    failed(rustix::fs::fchown(
        &file,
        Some(Uid::from_raw(uid)),
        Some(Gid::from_raw(gid)),
    ))?;
    // No set-user-id, no set-group-id: no_new_privs ignores them, so nothing can rely on them.
    failed(rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode & 0o777)))?;
    let seconds = i64::try_from(entry.modified.min(MAX_TIME)).expect("below the limit");
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    failed(rustix::fs::futimens(
        &file,
        &Timestamps {
            last_access: time,
            last_modification: time,
        },
    ))
}

/// Makes the marks, each in folders of its own; what is below a hidden name is hidden with it.
fn write_masks(mask: BorrowedFd<'_>, masked: &BTreeSet<Vec<u8>>) -> Result<(), TarError> {
    for path in masked {
        let above = |(end, byte): (usize, &u8)| *byte == b'/' && masked.contains(&path[..end]);
        if path.iter().enumerate().any(above) {
            continue;
        }
        let (parent, name) = split(path);
        let mut folder = failed(open_folder(mask, b""))?;
        for part in parent.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
            match rustix::fs::mkdirat(&folder, part, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => folder = failed(open_folder(folder.as_fd(), part))?,
                Err(error) => return failed(Err(error)),
            }
        }
        failed(rustix::fs::mknodat(
            &folder,
            name,
            FileType::CharacterDevice,
            Mode::empty(),
            0,
        ))?;
    }
    Ok(())
}

/// A name without `./` before it and `/` after; empty for the root itself.
fn normalise(path: &[u8], limits: &Limits) -> Result<Vec<u8>, TarError> {
    let path = path.strip_prefix(b"./").unwrap_or(path);
    let path = path.strip_suffix(b"/").unwrap_or(path);
    if path.is_empty() || path == b"." {
        return Ok(Vec::new());
    }
    let fine = |part: &[u8]| !part.is_empty() && part.len() <= 255 && part != b"." && part != b"..";
    let clean = !path.iter().any(|byte| matches!(byte, 0 | b'\n'));
    let mut parts = path.split(|byte| *byte == b'/');
    if path.len() > limits.path_bytes || !clean || parts.clone().count() > limits.depth || !parts.all(fine) {
        return Err(REFUSED_NAME);
    }
    Ok(path.to_vec())
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// What a whiteout entry hides.
fn whiteout(parent: &[u8], name: &[u8]) -> Result<Option<Vec<u8>>, TarError> {
    let Some(hidden) = name.strip_prefix(b".wh.") else {
        return Ok(None);
    };
    if name == b".wh..wh..opq" {
        // The root cannot be hidden by a mark inside it; an image that wants that has one layer less.
        return if parent.is_empty() {
            Err(TarError::Malformed("an opaque root"))
        } else {
            Ok(Some(parent.to_vec()))
        };
    }
    if hidden.is_empty() || hidden == b"." || hidden == b".." || hidden.starts_with(b".wh.") {
        return Err(TarError::Malformed("a whiteout of nothing"));
    }
    let parts = [parent, hidden];
    Ok(Some(
        parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(&b'/'),
    ))
}

fn open_folder(top: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let path: &[u8] = if path.is_empty() { b"." } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(
        top,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )
}

fn id(id: u64) -> u32 {
    u32::try_from(id).expect("checked against the highest id")
}

fn missing_link() -> TarError {
    TarError::Malformed("a hard link to nothing in this layer")
}

fn twice(error: Errno) -> TarError {
    if error == Errno::EXIST {
        TarError::Malformed("one name twice")
    } else {
        TarError::Read(error.into())
    }
}

fn once(result: Result<(), Errno>) -> Result<(), TarError> {
    result.map_err(twice)
}

fn failed<T>(result: Result<T, Errno>) -> Result<T, TarError> {
    result.map_err(|error| TarError::Read(error.into()))
}
