//! What members remember of each other's stores, so that one whose store was put back from a copy finds out before it votes
//! or acknowledges again.
//!
//! Every message tells what of its sender's store is durable, and what the sender remembers of everybody's. A member that is
//! told that it had voted in a later term, or held a later entry, than its store knows of was rolled back: it takes no
//! further message. What nobody who is there remembers cannot be found out; the leader spreads what it knows, so one that
//! was in contact with it suffices.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::wire::{RaftMessage, StoreMark, StoreMarks};
use prost::Message as _;
use tokio::sync::watch;

use crate::file_system::{File, FileSystem, OpenMode};
use crate::log_store::Durable;

/// Members that are remembered at most: more than ever vote, with those that were replaced.
const MEMBERS: usize = 64;
/// Bytes of the file: the marks of that many members fit.
const FILE_BYTES: usize = 4096;

/// This member's store is older than what another member remembers of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the store was put back from a copy: member {by} remembers a vote in term {} and entry {} of term {}, and the store goes to \
     term {} and entry {} of term {}",
    known.vote_term, known.last_index, known.last_term, own.vote_term, own.last_index, own.last_term
)]
pub struct RolledBack {
    /// Who remembers more.
    by: u64,
    /// What it remembers.
    known: StoreMark,
    /// What there is.
    own: StoreMark,
}

/// What one member remembers of all. Clones are handles to the same memory.
#[derive(Debug, Clone, Default)]
pub struct Witness(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    memory: Mutex<Memory>,
    rolled_back: watch::Sender<Option<RolledBack>>,
    file: Option<Box<dyn File>>,
}

#[derive(Debug, Default)]
struct Memory {
    own: Option<Own>,
    others: BTreeMap<u64, StoreMark>,
    /// Not in the file yet.
    changed: bool,
}

#[derive(Debug)]
struct Own {
    durable: Durable,
    /// The most that was durable since the start: a follower's log may get shorter for a moment.
    highest: StoreMark,
}

impl Own {
    fn highest(&mut self) -> StoreMark {
        raise(&mut self.highest, &self.durable.now());
        self.highest
    }
}

impl Memory {
    fn remember(&mut self, mark: &StoreMark) {
        let full = self.others.len() >= MEMBERS;
        if full && !self.others.contains_key(&mark.member) {
            // Who takes part holds the newest entries: the oldest mark is of the longest gone.
            let gone = self.others.values().min_by_key(|it| last(it)).map(|it| it.member);
            gone.map(|gone| self.others.remove(&gone));
        }
        let known = self.others.entry(mark.member).or_insert(StoreMark {
            member: mark.member,
            ..StoreMark::default()
        });
        self.changed |= raise(known, mark);
    }
}

/// Takes over what is later; whether something was.
fn raise(known: &mut StoreMark, mark: &StoreMark) -> bool {
    let before = *known;
    known.vote_term = known.vote_term.max(mark.vote_term);
    if last(mark) > last(known) {
        (known.last_term, known.last_index) = last(mark);
    }
    *known != before
}

/// The last entry, in the order of logs: a later term counts more than a longer log.
fn last(mark: &StoreMark) -> (u64, u64) {
    (mark.last_term, mark.last_index)
}

impl Witness {
    /// A memory that is kept in a file; the file is made where there is none. One that is damaged is begun anew: it
    /// is written without being flushed, and may be lost with the power.
    ///
    /// # Errors
    /// The disk's own.
    pub fn open(fs: &dyn FileSystem, path: &Path) -> io::Result<Self> {
        let (file, others) = match fs.open(path, OpenMode::Write) {
            Ok(file) => {
                let others = read(&*file)?;
                (file, others)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let file = fs.open(path, OpenMode::CreateNew)?;
                file.write_all_at(&[0; FILE_BYTES], 0)?;
                file.sync_data()?;
                (file, BTreeMap::new())
            }
            Err(error) => return Err(error),
        };
        Ok(Self(Arc::new(Inner {
            memory: Mutex::new(Memory {
                others,
                ..Memory::default()
            }),
            rolled_back: watch::Sender::default(),
            file: Some(file),
        })))
    }

    /// Writes down what was learnt since the last time. Without a flush: it outlives the process at once, and the machine
    /// after the kernel's writeback.
    ///
    /// # Errors
    /// The disk's own; it is tried again the next time.
    pub fn keep(&self) -> io::Result<()> {
        let Some(file) = &self.0.file else {
            return Ok(());
        };
        let marks = {
            let mut memory = self.memory();
            if !std::mem::take(&mut memory.changed) {
                return Ok(());
            }
            memory.others.values().copied().collect()
        };
        let written = file.write_all_at(&encode(marks), 0);
        if written.is_err() {
            self.memory().changed = true;
        }
        written
    }

    /// Resolves once this member's store turns out to be older than what others remember of it.
    pub async fn rolled_back(&self) -> RolledBack {
        let mut seen = self.0.rolled_back.subscribe();
        let found = seen.wait_for(Option::is_some).await;
        match found.map(|found| found.clone()) {
            Ok(Some(found)) => found,
            Ok(None) | Err(_) => std::future::pending().await, // the sender is this memory's own
        }
    }

    /// This member's store, opened: from now on it is told of, and held against what others remember.
    pub(crate) fn opened(&self, member: u64, durable: Durable) {
        let mut memory = self.memory();
        memory.others.remove(&member);
        memory.own = Some(Own {
            highest: StoreMark {
                member,
                ..durable.now()
            },
            durable,
        });
    }

    /// What a message tells: what of this store is durable, and what is remembered of all others.
    pub(super) fn tell(&self, message: &mut RaftMessage) {
        let mut memory = self.memory();
        message.held = memory.own.as_mut().map(Own::highest);
        message.known = memory.others.values().copied().collect();
    }

    /// Takes in what a message tells. To be asked before anything else is made of it.
    pub(super) fn heard(&self, message: &RaftMessage) -> Result<(), RolledBack> {
        if let Some(found) = &*self.0.rolled_back.borrow() {
            return Err(found.clone());
        }
        let mut memory = self.memory();
        let own = memory.own.as_mut().map(Own::highest);
        for mark in message.known.iter().take(MEMBERS) {
            match own {
                Some(own) if own.member == mark.member => {
                    if mark.vote_term > own.vote_term || last(mark) > last(&own) {
                        let found = RolledBack {
                            by: message.from,
                            known: *mark,
                            own,
                        };
                        self.0.rolled_back.send_replace(Some(found.clone()));
                        return Err(found);
                    }
                }
                _ => memory.remember(mark),
            }
        }
        if let Some(held) = &message.held {
            memory.remember(&StoreMark {
                member: message.from,
                ..*held
            });
        }
        Ok(())
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn encode(marks: Vec<StoreMark>) -> Vec<u8> {
    let content = StoreMarks { marks }.encode_to_vec();
    let mut bytes = crc32c::crc32c(&content).to_le_bytes().to_vec();
    bytes.extend(u32::try_from(content.len()).unwrap_or(0).to_le_bytes());
    bytes.extend(content);
    bytes
}

fn read(file: &dyn File) -> io::Result<BTreeMap<u64, StoreMark>> {
    let mut bytes = vec![0; FILE_BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            file.write_all_at(&[0; FILE_BYTES], 0)?;
            return Ok(BTreeMap::new());
        }
        read => read?,
    }
    let Some(marks) = decode(&bytes) else {
        tracing::warn!("what was remembered of the other managers' stores is damaged; it is begun anew");
        return Ok(BTreeMap::new());
    };
    Ok(marks.into_iter().map(|mark| (mark.member, mark)).collect())
}

fn decode(bytes: &[u8]) -> Option<Vec<StoreMark>> {
    let (sum, rest) = bytes.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let content = rest.get(..usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    if crc32c::crc32c(content).to_le_bytes() != *sum {
        return None;
    }
    Some(StoreMarks::decode(content).ok()?.marks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_system::SimFileSystem;

    fn mark(member: u64, vote_term: u64, last: (u64, u64)) -> StoreMark {
        StoreMark {
            member,
            vote_term,
            last_term: last.0,
            last_index: last.1,
        }
    }

    /// A member whose store goes so far.
    fn member(id: u64, vote_term: u64, last: (u64, u64)) -> (Witness, Durable) {
        let (witness, durable) = (Witness::default(), Durable::default());
        durable.set(vote_term, last);
        witness.opened(id, durable.clone());
        (witness, durable)
    }

    fn message(from: u64, witness: &Witness) -> RaftMessage {
        let mut message = RaftMessage {
            from,
            ..RaftMessage::default()
        };
        witness.tell(&mut message);
        message
    }

    #[test]
    fn a_member_put_back_finds_out_from_whoever_heard_of_it_even_by_others() {
        let (leader, _) = member(1, 5, (5, 900));
        let (follower, _) = member(2, 5, (5, 900));
        let (other, _) = member(3, 5, (5, 900));
        leader.heard(&message(2, &follower)).expect("as it is");
        other.heard(&message(1, &leader)).expect("as it is");
        for (store, vote, last) in [
            ("the same", 5, (5, 900)),
            ("one that went on", 6, (6, 10)),
            ("one with a shorter log of a later term", 5, (6, 10)),
        ] {
            let (again, _) = member(2, vote, last);
            again.heard(&message(1, &leader)).expect(store);
        }
        for (store, vote, last) in [
            ("an older entry", 5, (5, 899)),
            ("an older term", 5, (4, 2_000)),
            ("an older vote", 4, (5, 900)),
            ("an empty one", 0, (0, 0)),
        ] {
            for by in [(1, &leader), (3, &other)] {
                let (again, _) = member(2, vote, last);
                let found = again.heard(&message(by.0, by.1)).expect_err(store);
                assert_eq!((found.by, found.own), (by.0, mark(2, vote, last)));
                // From then on it takes nothing, also of who remembers nothing.
                again.heard(&message(9, &Witness::default())).expect_err(store);
            }
        }
    }

    #[test]
    fn a_log_that_gets_shorter_for_a_moment_is_no_older_store() {
        let (leader, _) = member(1, 5, (5, 900));
        let (follower, durable) = member(2, 5, (3, 1_000));
        leader.heard(&message(2, &follower)).expect("as it is");
        durable.set(5, (2, 980)); // what an old leader sent is cut
        follower
            .heard(&message(1, &leader))
            .expect("it had that in this life");
        assert_eq!(message(2, &follower).held, Some(mark(2, 5, (3, 1_000))));
    }

    #[test]
    fn what_is_remembered_outlives_the_program_and_a_damaged_file_is_begun_anew() {
        let fs = SimFileSystem::new();
        let path = Path::new("/data/members");
        fs.create_directory(Path::new("/data")).expect("a folder");
        let open = || Witness::open(&fs, path).expect("a file");
        let known = |witness: &Witness| message(1, witness).known;
        let first = open();
        first
            .heard(&message(2, &member(2, 5, (5, 7)).0))
            .expect("as it is");
        first.keep().expect("written");
        drop(first);
        assert_eq!(known(&open()), [mark(2, 5, (5, 7))]);
        let file = fs.open(path, OpenMode::Write).expect("there");
        file.write_all_at(&[0xff; 3], 9).expect("written");
        assert_eq!(known(&open()), []);
    }

    #[test]
    fn only_so_many_members_are_remembered_and_the_newest_stay() {
        let witness = Witness::default();
        for id in 1..=200 {
            let (other, _) = member(id, u64::MAX, (u64::MAX, u64::MAX));
            witness.heard(&message(id, &other)).expect("as it is");
        }
        let known = message(1, &witness).known;
        assert_eq!(
            (known.len(), known[0].member),
            (MEMBERS, 200 - MEMBERS as u64 + 1)
        );
        assert!(encode(known).len() <= FILE_BYTES, "all fit into the file");
    }

    #[test]
    fn a_member_that_takes_part_is_remembered_however_many_come_and_go() {
        let witness = Witness::default();
        for id in 2..=200 {
            for (who, entry) in [(1, id), (id, id - 1)] {
                let (other, _) = member(who, 1, (1, entry));
                witness.heard(&message(who, &other)).expect("as it is");
            }
        }
        let known = message(9, &witness).known;
        assert!(known.contains(&mark(1, 1, (1, 200))), "{known:?}");
    }
}
