//! Which user and group ids a task's processes have on the host.
//!
//! Every task gets a range of 65,536 ids that no account, no other task and no other launcher of
//! this host uses. Ranges are claimed in blocks by a file under `/run`, which the host's
//! launchers share and a reboot clears, together with all tasks. Within its blocks
//! a launcher hands out the range that was freed longest ago, so that a stray file
//! or process of an old task meets a new one as late as possible.

use crate::message::{Refusal, RefusalCode};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Ids in one range: what an image may use, 0 to 65,535.
pub(crate) const RANGE_SIZE: u32 = 65_536;
/// The first id: above what distributions and directory services hand out.
const FIRST: u32 = 0x7000_0000;
/// Ranges that one claim covers. Fewer make more files, more leave fewer launchers room on one host.
const BLOCK: u32 = 32;
/// Blocks on one host: 2,048 ranges, up to 0x7800_0000.
const BLOCKS: u32 = 64;

/// Owns the files of unpacked layers. No process but the unpacker ever has these ids.
pub(crate) const IMAGE_RANGE: IdRange = IdRange(0);

/// 65,536 consecutive host ids, named by their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IdRange(u32);

impl IdRange {
    /// The host id that the task's id 0 is.
    pub fn base(self) -> u32 {
        FIRST + self.0 * RANGE_SIZE
    }

    fn block(self) -> u32 {
        self.0 / BLOCK
    }
}

/// The ranges of one launcher.
#[derive(Debug)]
pub(crate) struct IdRanges {
    claims: PathBuf,
    owner: String,
    taken: Vec<(u32, u32)>,
    blocks: Vec<u32>,
    free: VecDeque<IdRange>,
}

impl IdRanges {
    /// Ranges for the launcher of one data folder. `in_use` are those of tasks that still exist;
    /// `taken` are id ranges (first, count) that accounts of this host own.
    pub(crate) fn open(
        claims: &Path,
        data: &Path,
        in_use: &[IdRange],
        taken: Vec<(u32, u32)>,
    ) -> io::Result<IdRanges> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(claims)?;
        let owner = data.to_string_lossy().into_owned();
        let mut ranges = IdRanges {
            claims: claims.to_owned(),
            owner,
            taken,
            blocks: Vec::new(),
            free: VecDeque::new(),
        };
        for block in 0..BLOCKS {
            let used = in_use.iter().any(|range| range.block() == block);
            if ranges.owner_of(block).as_deref() == Some(ranges.owner.as_str())
                || (used && ranges.claim(block)?)
            {
                ranges.add(block, in_use);
            }
        }
        Ok(ranges)
    }

    /// A range that nothing uses. The caller writes it down before using it.
    pub(crate) fn allocate(&mut self) -> Result<IdRange, Refusal> {
        if self.free.is_empty() {
            self.grow().map_err(|error| {
                Refusal::new(
                    RefusalCode::Internal,
                    format!("could not claim an id range: {error}"),
                )
            })?;
        }
        self.free.pop_front().ok_or_else(|| {
            Refusal::new(
                RefusalCode::Busy,
                "all id ranges of this host are in use; remove exited tasks",
            )
        })
    }

    /// Gives a range back, once no process and no mount has its ids any more.
    pub(crate) fn release(&mut self, range: IdRange) {
        self.free.push_back(range);
    }

    fn grow(&mut self) -> io::Result<()> {
        let start = self.owner.bytes().fold(0u32, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u32::from(byte))
        });
        for block in (0..BLOCKS).map(|i| start.wrapping_add(i) % BLOCKS) {
            if !self.blocks.contains(&block) && self.claim(block)? {
                self.add(block, &[]);
                // A block may belong to accounts from end to end; then the next one has to do.
                if !self.free.is_empty() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, block: u32, in_use: &[IdRange]) {
        let ranges = (block * BLOCK..(block + 1) * BLOCK).map(IdRange);
        let usable =
            ranges.filter(|range| *range != IMAGE_RANGE && !in_use.contains(range) && !self.is_taken(*range));
        self.free.extend(usable.collect::<Vec<_>>());
        self.blocks.push(block);
    }

    fn is_taken(&self, range: IdRange) -> bool {
        let (first, end) = (range.base(), range.base() + RANGE_SIZE);
        self.taken
            .iter()
            .any(|&(start, count)| start < end && start.saturating_add(count) > first)
    }

    fn path(&self, block: u32) -> PathBuf {
        self.claims.join(block.to_string())
    }

    fn owner_of(&self, block: u32) -> Option<String> {
        fs::read_to_string(self.path(block)).ok()
    }

    /// Claims a block that is unclaimed, or whose owner's data folder no longer exists.
    fn claim(&self, block: u32) -> io::Result<bool> {
        match self.owner_of(block) {
            Some(owner) if owner == self.owner => return Ok(true),
            Some(owner) if Path::new(&owner).exists() => return Ok(false),
            Some(_) => fs::remove_file(self.path(block))?,
            None => {}
        }
        // Written under another name and linked: a claim is never seen half written.
        let draft = self.claims.join(format!("draft-{}", std::process::id()));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&draft)?;
        file.write_all(self.owner.as_bytes())?;
        let linked = fs::hard_link(&draft, self.path(block));
        fs::remove_file(&draft)?;
        match linked {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Gives up every claim of one data folder. Nothing of its tasks may be left.
pub(crate) fn release_claims(claims: &Path, data: &Path) -> io::Result<()> {
    let owner = data.to_string_lossy();
    for block in 0..BLOCKS {
        let path = claims.join(block.to_string());
        if fs::read_to_string(&path).is_ok_and(|found| found == owner) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// The ids that accounts of this host own, from the texts of `passwd`, `subuid` and `subgid`.
pub(crate) fn taken_by_accounts(passwd: &str, sub_ids: &str) -> Vec<(u32, u32)> {
    let accounts = passwd
        .lines()
        .filter_map(|line| Some((line.split(':').nth(2)?.parse().ok()?, 1)));
    let subordinate = sub_ids.lines().filter_map(|line| {
        let mut fields = line.split(':').skip(1);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    });
    accounts.chain(subordinate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(claims: &Path, data: &Path, in_use: &[IdRange]) -> IdRanges {
        IdRanges::open(claims, data, in_use, Vec::new()).expect("claims folder")
    }

    #[test]
    fn two_launchers_never_share_a_range() {
        let dir = tempfile::tempdir().expect("folder");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).expect("a");
        fs::create_dir(&b).expect("b");
        let claims = dir.path().join("claims");
        let (mut one, mut two) = (open(&claims, &a, &[]), open(&claims, &b, &[]));
        let mut all: Vec<IdRange> = (0..100)
            .flat_map(|_| [one.allocate().expect("range"), two.allocate().expect("range")])
            .collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 200);
        assert!(!all.contains(&IMAGE_RANGE));
    }

    #[test]
    fn a_freed_range_is_reused_last() {
        let dir = tempfile::tempdir().expect("folder");
        let mut ranges = open(&dir.path().join("claims"), dir.path(), &[]);
        let first = ranges.allocate().expect("range");
        ranges.release(first);
        let rest = ranges.free.len();
        let order: Vec<IdRange> = (0..rest).map(|_| ranges.allocate().expect("range")).collect();
        assert_eq!(order.last(), Some(&first));
    }

    #[test]
    fn after_a_restart_ranges_in_use_stay_taken() {
        let dir = tempfile::tempdir().expect("folder");
        let claims = dir.path().join("claims");
        let used = open(&claims, dir.path(), &[]).allocate().expect("range");
        let mut again = open(&claims, dir.path(), &[used]);
        assert!((0..64).all(|_| again.allocate().expect("range") != used));
    }

    #[test]
    fn a_launcher_that_is_gone_leaves_its_ranges() {
        let dir = tempfile::tempdir().expect("folder");
        let (claims, gone) = (dir.path().join("claims"), dir.path().join("gone"));
        let mut old = IdRanges::open(&claims, &gone, &[], Vec::new()).expect("open");
        for block in 0..BLOCKS {
            assert!(old.claim(block).expect("claim"));
            old.add(block, &[]);
        }
        assert!(open(&claims, dir.path(), &[]).allocate().is_ok());
    }

    #[test]
    fn claims_are_given_up_by_their_owner_alone() {
        let dir = tempfile::tempdir().expect("folder");
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).expect("a");
        fs::create_dir(&b).expect("b");
        let claims = dir.path().join("claims");
        let kept = open(&claims, &b, &[]).allocate().expect("range");
        open(&claims, &a, &[]).allocate().expect("range");
        release_claims(&claims, &a).expect("release");
        let left: Vec<_> = fs::read_dir(&claims).expect("claims").flatten().collect();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].file_name().to_string_lossy(), kept.block().to_string());
    }

    #[test]
    fn ids_of_accounts_are_left_alone() {
        let dir = tempfile::tempdir().expect("folder");
        let taken = taken_by_accounts("x:x:1879113000:0::/:/bin/sh\n", "y:1879200000:4000000\nbad\n");
        assert_eq!(taken, [(1_879_113_000, 1), (1_879_200_000, 4_000_000)]);
        let mut ranges =
            IdRanges::open(&dir.path().join("claims"), dir.path(), &[], taken.clone()).expect("open");
        for _ in 0..1_000 {
            let range = ranges.allocate().expect("range");
            let (first, end) = (range.base(), range.base() + RANGE_SIZE);
            assert!(
                taken
                    .iter()
                    .all(|&(start, count)| start >= end || start + count <= first)
            );
        }
    }
}
