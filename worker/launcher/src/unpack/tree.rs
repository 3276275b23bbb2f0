//! The digest of an unpacked tree, and its removal.

use super::Limits;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, readlinkat, statat, unlinkat};
use sha2::{Digest, Sha256};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

/// SHA-256 over names, kinds, modes, owners, link targets and contents, in the order of names. Each part
/// has its length before it, so that no two trees give the same bytes.
pub fn digest(trees: &[BorrowedFd<'_>], limits: &Limits) -> io::Result<String> {
    let mut hash = Sha256::new();
    for tree in trees {
        digest_folder(&mut hash, *tree, limits.depth)?;
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn part(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn digest_folder(hash: &mut Sha256, folder: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    let own = rustix::fs::fstat(folder)?;
    hash.update(
        [own.st_mode, own.st_uid, own.st_gid]
            .map(u32::to_le_bytes)
            .concat(),
    );
    for name in names(folder)? {
        part(hash, name.as_bytes());
        let facts = statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        hash.update(
            [facts.st_mode, facts.st_uid, facts.st_gid]
                .map(u32::to_le_bytes)
                .concat(),
        );
        match FileType::from_raw_mode(facts.st_mode) {
            FileType::Directory => {
                let below = depth
                    .checked_sub(1)
                    .ok_or_else(|| io::Error::other("a tree too deep"))?;
                digest_folder(hash, open_folder(folder, &name)?.as_fd(), below)?;
            }
            FileType::RegularFile => {
                hash.update(facts.st_size.to_le_bytes());
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                digest_content(hash, File::from(openat(folder, &name, flags, Mode::empty())?))?;
            }
            FileType::Symlink => part(hash, readlinkat(folder, &name, Vec::new())?.as_bytes()),
            _ => hash.update(facts.st_rdev.to_le_bytes()),
        }
    }
    part(hash, b""); // the end of this folder: no name is empty
    Ok(())
}

fn digest_content(hash: &mut Sha256, mut file: File) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// Removes everything in a folder.
pub fn empty(folder: BorrowedFd<'_>) -> io::Result<()> {
    for name in names(folder)? {
        let facts = statat(folder, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(facts.st_mode) == FileType::Directory {
            empty(open_folder(folder, &name)?.as_fd())?;
            unlinkat(folder, &name, AtFlags::REMOVEDIR)?;
        } else {
            unlinkat(folder, &name, AtFlags::empty())?;
        }
    }
    Ok(())
}

fn open_folder(folder: BorrowedFd<'_>, name: &CString) -> io::Result<rustix::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(folder, name, flags, Mode::empty())?)
}

fn names(folder: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
