//! A disk in memory that can lose power.
//!
//! It keeps apart what was synced and what was only written. [`SimFileSystem::crash`] keeps of the latter whatever a
//! chooser picks: any subset of the writes to a file, each torn at sectors, and any subset of the renames, creations
//! and removals in a folder. A chooser that walks all choices makes an enumeration, a seeded one makes a simulation.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{File, FileSystem, Lock, OpenMode};

/// A disk writes this many bytes as one; a torn write ends at a multiple of it.
const SECTOR_BYTES: usize = 512;

/// Picks a number below its argument.
pub type Chooser<'a> = &'a mut dyn FnMut(usize) -> usize;

/// A chooser that follows a seed (SplitMix64: Steele, Lea, Flood 2014).
pub fn seeded_chooser(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |below| {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        let picked = mixed % (below.max(1) as u64);
        usize::try_from(picked).expect("below a usize")
    }
}

/// What goes wrong with the disk from now on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Whatever needs space fails with ENOSPC.
    Full,
    /// Writes and syncs fail with EIO.
    WriteError,
    /// Reads fail with EIO.
    ReadError,
}

/// A disk in memory. Clones share it, so a restarted program finds what the last one left.
#[derive(Clone, Default)]
pub struct SimFileSystem(Arc<Mutex<Disk>>);

#[derive(Default, Clone)]
struct Disk {
    inodes: Vec<Inode>,
    directories: BTreeMap<PathBuf, Directory>,
    locked: BTreeMap<PathBuf, u64>,
    fault: Fault,
    /// After so many more changes, this goes wrong.
    fuse: Option<(u64, Fault)>,
    capacity: Option<u64>,
    syncs: u64,
    boots: u64,
}

#[derive(Default, Clone)]
struct Inode {
    durable: Vec<u8>,
    current: Vec<u8>,
    pending: Vec<Pending>,
}

#[derive(Clone)]
enum Pending {
    Write { offset: usize, data: Vec<u8> },
    SetLen(usize),
}

impl Pending {
    /// Whether both are writes to the same place within one sector.
    fn replaces(&self, next: &Self) -> bool {
        match (self, next) {
            (
                Pending::Write { offset, data },
                Pending::Write {
                    offset: next_offset,
                    data: next_data,
                },
            ) => {
                let sector = |end: usize| end / SECTOR_BYTES;
                (offset, data.len()) == (next_offset, next_data.len())
                    && !data.is_empty()
                    && sector(*offset) == sector(offset + data.len() - 1)
            }
            _ => false,
        }
    }
}

#[derive(Default, Clone)]
struct Directory {
    durable: BTreeMap<String, usize>,
    current: BTreeMap<String, usize>,
    pending: Vec<NameChange>,
}

#[derive(Clone)]
enum NameChange {
    Link { name: String, inode: usize },
    Unlink { name: String },
    Rename { from: String, to: String, inode: usize },
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            NameChange::Link { name, inode } => drop(names.insert(name.clone(), *inode)),
            NameChange::Unlink { name } => drop(names.remove(name)),
            NameChange::Rename { from, to, inode } => {
                names.remove(from);
                names.insert(to.clone(), *inode);
            }
        }
    }
}

impl fmt::Debug for SimFileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFileSystem").finish_non_exhaustive()
    }
}

impl SimFileSystem {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// For a program that begins now.
    pub fn mounted(&self) -> Mounted {
        Mounted {
            system: self.clone(),
            boot: self.disk().boots,
        }
    }

    /// Loses power: of what was not synced, the chooser's part stays. Open files and locks of before are dead.
    pub fn crash(&self, choose: Chooser<'_>) {
        let mut disk = self.disk();
        for inode in &mut disk.inodes {
            inode.crash(choose);
        }
        for directory in disk.directories.values_mut() {
            let mut names = std::mem::take(&mut directory.durable);
            for change in directory.pending.drain(..) {
                if choose(2) == 1 {
                    change.apply(&mut names);
                }
            }
            directory.durable = names.clone();
            directory.current = names;
        }
        disk.locked.clear();
        disk.boots += 1;
        disk.fault = Fault::None;
        disk.fuse = None;
    }

    /// Ends the program that has it open. What it wrote stays as it was with the system: there, and durable or not.
    pub fn kill(&self) {
        let mut disk = self.disk();
        disk.locked.clear();
        disk.boots += 1;
        disk.fault = Fault::None;
        disk.fuse = None;
    }

    /// Sets what goes wrong from now on; a crash ends it.
    pub fn set_fault(&self, fault: Fault) {
        let mut disk = self.disk();
        disk.fault = fault;
        disk.fuse = None;
    }

    /// Sets what goes wrong after so many more changes and syncs: each point of a run can be made its last.
    pub fn set_fault_after(&self, changes: u64, fault: Fault) {
        let mut disk = self.disk();
        disk.fault = Fault::None;
        disk.fuse = Some((changes, fault));
    }

    /// Another disk with the same content, durable and not, so that many crashes of one moment can be looked at.
    pub fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.disk().clone())))
    }

    /// Bounds the disk: writes that would need more fail with ENOSPC.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.disk().capacity = bytes;
    }

    /// How many file syncs there were: what group commit is measured by.
    pub fn syncs(&self) -> u64 {
        self.disk().syncs
    }

    /// Flips one bit of a file, durably, as a decaying disk does.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`], or [`io::ErrorKind::UnexpectedEof`] past the end.
    pub fn flip_bit(&self, path: &Path, bit: u64) -> io::Result<()> {
        let mut disk = self.disk();
        let inode = disk.find(path)?;
        let inode = &mut disk.inodes[inode];
        let at = usize::try_from(bit / 8).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        for copy in [&mut inode.current, &mut inode.durable] {
            *copy.get_mut(at).ok_or(io::ErrorKind::UnexpectedEof)? ^= 1 << (bit % 8);
        }
        Ok(())
    }
}

impl Inode {
    /// Any subset of the unsynced writes, each cut to a range of whole sectors, in any size between.
    fn crash(&mut self, choose: Chooser<'_>) {
        let mut kept = std::mem::take(&mut self.durable);
        let pending = std::mem::take(&mut self.pending);
        for same in pending.chunk_by(Pending::replaces) {
            // Of writes to the same place within a sector, which was the last to arrive is all that matters.
            let Some(pending) = (match same {
                [one] => Some(one.clone()),
                many => choose(many.len() + 1)
                    .checked_sub(1)
                    .map(|last| many[last].clone()),
            }) else {
                continue;
            };
            if same.len() > 1 {
                if let Pending::Write { offset, data } = pending {
                    write(&mut kept, offset, &data);
                }
                continue;
            }
            match pending {
                Pending::Write { offset, data } => {
                    if let Some(range) = surviving(offset, data.len(), choose) {
                        write(&mut kept, offset + range.start, &data[range]);
                    }
                }
                Pending::SetLen(bytes) => {
                    if choose(2) == 1 {
                        kept.resize(bytes, 0);
                    }
                }
            }
        }
        self.durable = kept.clone();
        self.current = kept;
    }
}

/// Which part of a write of `bytes` at `offset` reached the disk: nothing, all, a head, or a tail of whole sectors.
fn surviving(offset: usize, bytes: usize, choose: Chooser<'_>) -> Option<Range<usize>> {
    // Places inside the write where a sector ends.
    let first = SECTOR_BYTES - offset % SECTOR_BYTES;
    let cuts: Vec<usize> = (first..bytes).step_by(SECTOR_BYTES).collect();
    match choose(if cuts.is_empty() { 2 } else { 4 }) {
        0 => None,
        1 => Some(0..bytes),
        2 => Some(0..cuts[choose(cuts.len())]),
        _ => Some(cuts[choose(cuts.len())]..bytes),
    }
}

fn write(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

impl Disk {
    fn directory(&mut self, path: &Path) -> io::Result<&mut Directory> {
        self.directories
            .get_mut(path)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn find(&mut self, path: &Path) -> io::Result<usize> {
        let (parent, name) = split(path)?;
        self.directory(&parent)?
            .current
            .get(&name)
            .copied()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn change_name(&mut self, parent: &Path, change: NameChange) -> io::Result<()> {
        self.check_write(0)?;
        let directory = self.directory(parent)?;
        change.apply(&mut directory.current);
        directory.pending.push(change);
        Ok(())
    }

    fn used(&self) -> u64 {
        self.inodes.iter().map(|inode| inode.current.len() as u64).sum()
    }

    fn check_write(&mut self, growth: u64) -> io::Result<()> {
        match &mut self.fuse {
            Some((0, fault)) => self.fault = *fault,
            Some((left, _)) => *left -= 1,
            None => {}
        }
        let full = self
            .capacity
            .is_some_and(|capacity| growth > 0 && self.used() + growth > capacity);
        match self.fault {
            Fault::WriteError => Err(rustix::io::Errno::IO.into()),
            Fault::Full if growth > 0 => Err(rustix::io::Errno::NOSPC.into()),
            _ if full => Err(rustix::io::Errno::NOSPC.into()),
            _ => Ok(()),
        }
    }
}

fn split(path: &Path) -> io::Result<(PathBuf, String)> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or(io::ErrorKind::InvalidInput)?;
    Ok((parent.to_owned(), name.to_owned()))
}

impl FileSystem for SimFileSystem {
    fn create_directory(&self, path: &Path) -> io::Result<()> {
        self.disk().directories.entry(path.to_owned()).or_default();
        Ok(())
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>> {
        let mut disk = self.disk();
        let boot = disk.boots;
        let inode = match (disk.find(path), mode) {
            (Ok(_), OpenMode::CreateNew) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Ok(inode), _) => inode,
            (Err(error), OpenMode::CreateNew) if error.kind() == io::ErrorKind::NotFound => {
                let (parent, name) = split(path)?;
                let inode = disk.inodes.len();
                disk.change_name(&parent, NameChange::Link { name, inode })?;
                disk.inodes.push(Inode::default());
                inode
            }
            (Err(error), _) => return Err(error),
        };
        Ok(Box::new(SimFile {
            system: self.clone(),
            inode,
            boot,
            writable: mode != OpenMode::Read,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        let inode = disk.find(from)?;
        let ((from_parent, from), (to_parent, to)) = (split(from)?, split(to)?);
        if from_parent != to_parent {
            return Err(io::ErrorKind::CrossesDevices.into()); // we never do; a crash in between would need its own rules
        }
        disk.change_name(&from_parent, NameChange::Rename { from, to, inode })
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.find(path)?;
        let (parent, name) = split(path)?;
        disk.change_name(&parent, NameChange::Unlink { name })
    }

    /// At once durable: nothing that is done to whole folders is relied on after a crash.
    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        self.disk()
            .directories
            .retain(|path, _| !path.starts_with(folder));
        Ok(())
    }

    /// As [`SimFileSystem::remove_folder`].
    fn rename_folder(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        if let Some(directory) = disk.directories.remove(from) {
            disk.directories.insert(to.to_owned(), directory);
        }
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        Ok(self
            .disk()
            .directory(directory)?
            .current
            .keys()
            .cloned()
            .collect())
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        let mut disk = self.disk();
        disk.check_write(0)?;
        let directory = disk.directory(directory)?;
        directory.durable = directory.current.clone();
        directory.pending.clear();
        Ok(())
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        let disk = self.disk();
        Ok(match (disk.fault, disk.capacity) {
            (Fault::Full, _) => 0,
            (_, Some(capacity)) => capacity.saturating_sub(disk.used()),
            (_, None) => u64::MAX,
        })
    }

    fn lock(&self, directory: &Path) -> io::Result<Box<dyn Lock>> {
        let mut disk = self.disk();
        let boot = disk.boots;
        if disk.locked.contains_key(directory) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        disk.locked.insert(directory.to_owned(), boot);
        Ok(Box::new(SimLock {
            system: self.clone(),
            directory: directory.to_owned(),
            boot,
        }))
    }
}

/// The disk as one life of a program sees it: what is left of that program when it was killed, or its machine lost power, finds it
/// gone.
#[derive(Debug)]
pub struct Mounted {
    system: SimFileSystem,
    boot: u64,
}

impl Mounted {
    fn alive(&self) -> io::Result<&SimFileSystem> {
        match self.system.disk().boots == self.boot {
            true => Ok(&self.system),
            false => Err(rustix::io::Errno::STALE.into()),
        }
    }
}

impl FileSystem for Mounted {
    fn create_directory(&self, path: &Path) -> io::Result<()> {
        self.alive()?.create_directory(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Box<dyn File>> {
        self.alive()?.open(path, mode)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.alive()?.rename(from, to)
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        self.alive()?.unlink(path)
    }

    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        self.alive()?.remove_folder(folder)
    }

    fn rename_folder(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.alive()?.rename_folder(from, to)
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<String>> {
        self.alive()?.list(directory)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        self.alive()?.sync_directory(directory)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.alive()?.free_bytes(path)
    }

    fn lock(&self, directory: &Path) -> io::Result<Box<dyn Lock>> {
        self.alive()?.lock(directory)
    }
}

struct SimFile {
    system: SimFileSystem,
    inode: usize,
    boot: u64,
    writable: bool,
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFile")
            .field("inode", &self.inode)
            .finish_non_exhaustive()
    }
}

impl SimFile {
    /// The disk, unless power was lost since the file was opened: a dead program's writes go nowhere.
    fn alive(&self) -> io::Result<MutexGuard<'_, Disk>> {
        let disk = self.system.disk();
        if disk.boots == self.boot {
            Ok(disk)
        } else {
            Err(rustix::io::Errno::STALE.into())
        }
    }

    fn change(&self, pending: Pending) -> io::Result<()> {
        let mut disk = self.alive()?;
        if !self.writable {
            return Err(rustix::io::Errno::BADF.into());
        }
        let bytes = disk.inodes[self.inode].current.len();
        let end = match &pending {
            Pending::Write { offset, data } => offset + data.len(),
            Pending::SetLen(end) => *end,
        };
        disk.check_write(end.saturating_sub(bytes) as u64)?;
        let inode = &mut disk.inodes[self.inode];
        match &pending {
            Pending::Write { offset, data } => write(&mut inode.current, *offset, data),
            Pending::SetLen(end) => inode.current.resize(*end, 0),
        }
        inode.pending.push(pending);
        Ok(())
    }
}

fn index(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl File for SimFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let disk = self.alive()?;
        if disk.fault == Fault::ReadError {
            return Err(rustix::io::Errno::IO.into());
        }
        let from = index(offset)?;
        let content = disk.inodes[self.inode].current.get(from..from + buffer.len());
        buffer.copy_from_slice(content.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.change(Pending::Write {
            offset: index(offset)?,
            data: data.to_vec(),
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.alive()?;
        disk.check_write(0)?;
        disk.syncs += 1;
        let inode = &mut disk.inodes[self.inode];
        inode.durable = inode.current.clone();
        inode.pending.clear();
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change(Pending::SetLen(index(bytes)?))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.alive()?.inodes[self.inode].current.len() as u64)
    }
}

struct SimLock {
    system: SimFileSystem,
    directory: PathBuf,
    boot: u64,
}

impl fmt::Debug for SimLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimLock")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl Lock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut disk = self.system.disk();
        if disk.locked.get(&self.directory) == Some(&self.boot) {
            disk.locked.remove(&self.directory);
        }
    }
}
