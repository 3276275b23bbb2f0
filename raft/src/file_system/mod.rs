//! The file-system seam: all that the log store and snapshots do to a disk, as one small trait.
//!
//! Calls block. In production one writer thread makes them; a simulation makes them inline on [`SimFileSystem`], whose
//! `crash` keeps any part of what was not synced. Nothing durable may be done past this trait, or no simulation sees it.

mod real;
mod sim;

use std::fmt;
use std::io;
use std::path::Path;

pub use real::RealFileSystem;
pub use sim::{Chooser, Fault, Mounted, SimFileSystem, seeded_chooser};

/// What to do where the file is, or is not, there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// Read only; it must be there.
    Read,
    /// Read and write; it must be there.
    Write,
    /// Read and write; it must not be there. Its name is durable only after [`FileSystem::sync_directory`].
    CreateNew,
}

/// A disk as the replicated store uses it. Paths are below the store's own folder and never come from outside.
pub trait FileSystem: fmt::Debug + Send + Sync + 'static {
    /// Makes a folder, mode 0700; one that is there already is left as it is.
    fn create_directory(&self, path: &Path) -> io::Result<()>;
    /// Opens a file; a new one gets mode 0600.
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>>;
    /// Renames a file over whatever has the new name, atomically; durable after the folder's sync.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file's name; durable after the folder's sync.
    fn unlink(&self, path: &Path) -> io::Result<()>;
    /// Removes a folder with all that is in it; one that is not there is removed already.
    fn remove_folder(&self, folder: &Path) -> io::Result<()>;
    /// Gives a folder another name, which nothing has; one that is not there has no new one either.
    fn rename_folder(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// The names in a folder, sorted.
    fn list(&self, directory: &Path) -> io::Result<Vec<String>>;
    /// Makes the names in a folder durable.
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
    /// Bytes that may still be written where this path is.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
    /// Takes the folder for this process alone, until the lock is dropped.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where another holds it.
    fn lock(&self, directory: &Path) -> io::Result<Box<dyn Lock>>;
}

/// An open file. Positions are the caller's: there is no cursor to share by mistake.
pub trait File: fmt::Debug + Send + Sync {
    /// Fills the buffer from an offset.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where the file ends before.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of the data at an offset; the file grows as needed.
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// Makes content and size durable (`fdatasync`). After an error the state of what was written is unknown, and
    /// a later success says nothing about it: stop using the file.
    fn sync_data(&self) -> io::Result<()>;
    /// Cuts or extends (with zeros) the file.
    fn set_len(&self, bytes: u64) -> io::Result<()>;
    /// The file's size.
    fn len(&self) -> io::Result<u64>;
    /// Whether it has no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// A folder held for this process alone; dropping it lets go.
pub trait Lock: fmt::Debug + Send + Sync {}

/// Replaces a file's content as one step: after a crash there is the old content or the new, never a mixture.
///
/// The new content is written beside it, synced, renamed over it, and the folder synced. What a crash leaves under
/// the temporary name is overwritten by the next call.
pub fn replace_file(fs: &dyn FileSystem, path: &Path, content: &[u8]) -> io::Result<()> {
    let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(".new");
    let temporary = directory.join(name);
    match fs.unlink(&temporary) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let file = fs.open(&temporary, OpenMode::CreateNew)?;
    file.write_all_at(content, 0)?;
    file.sync_data()?;
    fs.rename(&temporary, path)?;
    fs.sync_directory(directory)
}

/// Reads a whole file that may have at most `limit` bytes.
///
/// # Errors
/// [`io::ErrorKind::FileTooLarge`] past the limit.
pub fn read_file(fs: &dyn FileSystem, path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let file = fs.open(path, OpenMode::Read)?;
    let bytes = usize::try_from(file.len()?).ok().filter(|bytes| *bytes <= limit);
    let mut content = vec![0; bytes.ok_or(io::ErrorKind::FileTooLarge)?];
    file.read_exact_at(&mut content, 0)?;
    Ok(content)
}

#[cfg(test)]
pub(crate) mod tests;
