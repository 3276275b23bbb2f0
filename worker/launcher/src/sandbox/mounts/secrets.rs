//! Secrets in memory that is never swapped.

use super::*;

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

/// Moves the secrets from the stream into memory that is never swapped; the buffer between is wiped.
pub(super) fn place_secrets(tree: &Tree<'_>, values: &mut dyn Read) -> Result<OwnedFd, SetupError> {
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
