//! What a frame's record holds: operations on the log, in the order in which they happened.
//!
//! Written by hand rather than derived: an entry goes from the caller into the buffer that is sealed and written, with
//! one copy. Numbers are little endian. Every length is checked before it is believed.
//!
//! ```text
//! vote        01 term:8 member:8 committed:1
//! committed   02 log id
//! entry       03 term:8 index:8 kind:1 length:4 payload   (kind 0 blank, 1 command, 2 membership)
//! truncate    04 log id     what follows this entry is cut
//! purge       05 log id     up to and with this entry
//! checkpoint  06 vote, log id × 3 (committed, purged, last): how things stood before; opens each segment
//! log id      00 | 01 term:8 index:8;   vote in a checkpoint: 00 | 01 term:8 member:8 committed:1
//! ```

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::NodeId;
use bytes::Bytes;
use openraft::EntryPayload;
use openraft::impls::leader_id_std::LeaderId;

use crate::type_config::{Command, Entry, LogId, Member, Membership, Vote, log_id};

/// One step of the log.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// The member voted.
    Vote(Vote),
    /// Entries up to this one are known to be committed.
    Committed(Option<LogId>),
    /// The log grew by one entry.
    Append(Entry),
    /// What follows this entry is gone.
    TruncateAfter(Option<LogId>),
    /// Everything up to this entry is gone.
    Purge(LogId),
    /// How the log stood before this frame.
    Checkpoint(Checkpoint),
}

/// What a reader must know when the frames before are gone.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Checkpoint {
    /// The last vote.
    pub vote: Option<Vote>,
    /// The last entry known to be committed.
    pub committed: Option<LogId>,
    /// The last entry purged.
    pub purged: Option<LogId>,
    /// The last entry, purged or not.
    pub last: Option<LogId>,
}

/// A record that opened, yet reads as nothing that this program writes: one of a later version, or a bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the record holds something that this program does not know")]
pub struct RecordError;

/// Appends a vote.
pub fn put_vote_op(buffer: &mut Vec<u8>, vote: &Vote) {
    buffer.push(1);
    put_vote(buffer, vote);
}

/// Appends what is known to be committed.
pub fn put_committed(buffer: &mut Vec<u8>, committed: Option<&LogId>) {
    buffer.push(2);
    put_log_id(buffer, committed);
}

/// Appends an entry.
pub fn put_entry_op(buffer: &mut Vec<u8>, entry: &Entry) {
    buffer.push(3);
    put_entry(buffer, entry);
}

/// Appends a truncation.
pub fn put_truncate(buffer: &mut Vec<u8>, last: Option<&LogId>) {
    buffer.push(4);
    put_log_id(buffer, last);
}

/// Appends a purge.
pub fn put_purge(buffer: &mut Vec<u8>, upto: &LogId) {
    buffer.push(5);
    put_log_id(buffer, Some(upto));
}

/// Appends a checkpoint.
pub fn put_checkpoint(buffer: &mut Vec<u8>, checkpoint: &Checkpoint) {
    buffer.push(6);
    match &checkpoint.vote {
        None => buffer.push(0),
        Some(vote) => {
            buffer.push(1);
            put_vote(buffer, vote);
        }
    }
    for id in [checkpoint.committed, checkpoint.purged, checkpoint.last] {
        put_log_id(buffer, id.as_ref());
    }
}

fn put_vote(buffer: &mut Vec<u8>, vote: &Vote) {
    put_u64(buffer, vote.leader_id.term);
    put_u64(buffer, vote.leader_id.voted_for);
    buffer.push(u8::from(vote.committed));
}

pub(crate) fn put_log_id(buffer: &mut Vec<u8>, id: Option<&LogId>) {
    match id {
        None => buffer.push(0),
        Some(id) => {
            buffer.push(1);
            put_u64(buffer, id.leader_id.term);
            put_u64(buffer, id.index);
        }
    }
}

pub(crate) fn put_entry(buffer: &mut Vec<u8>, entry: &Entry) {
    put_u64(buffer, entry.log_id.leader_id.term);
    put_u64(buffer, entry.log_id.index);
    match &entry.payload {
        EntryPayload::Blank => {
            buffer.push(0);
            put_u32(buffer, 0);
        }
        EntryPayload::Normal(Command(command)) => {
            buffer.push(1);
            put_u32(buffer, command.len());
            buffer.extend_from_slice(command);
        }
        EntryPayload::Membership(membership) => {
            buffer.push(2);
            let at = buffer.len();
            put_u32(buffer, 0);
            put_membership(buffer, membership);
            let length = length(buffer.len() - at - 4);
            buffer[at..at + 4].copy_from_slice(&length);
        }
    }
}

/// configurations:4 (voters:4 (id:8)…)… members:4 (id:8 node:16 length:4 address)…
pub(crate) fn put_membership(buffer: &mut Vec<u8>, membership: &Membership) {
    let configurations = membership.get_joint_config();
    put_u32(buffer, configurations.len());
    for voters in configurations {
        put_u32(buffer, voters.len());
        voters.iter().for_each(|id| put_u64(buffer, *id));
    }
    put_u32(buffer, membership.nodes().count());
    for (id, member) in membership.nodes() {
        put_u64(buffer, *id);
        buffer.extend_from_slice(member.node.as_bytes());
        put_u32(buffer, member.address.len());
        buffer.extend_from_slice(member.address.as_bytes());
    }
}

fn put_u64(buffer: &mut Vec<u8>, number: u64) {
    buffer.extend_from_slice(&number.to_le_bytes());
}

fn put_u32(buffer: &mut Vec<u8>, number: usize) {
    buffer.extend_from_slice(&length(number));
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes)
        .expect("transactions and memberships are far below 4 GiB")
        .to_le_bytes()
}

/// Reads the operations of a record, in order; ends after the first that cannot be read.
pub fn ops(record: &[u8]) -> impl Iterator<Item = Result<Op, RecordError>> + '_ {
    let mut input = Input(record);
    std::iter::from_fn(move || {
        (!input.0.is_empty()).then(|| {
            let op = input.op();
            if op.is_err() {
                input.0 = &[];
            }
            op
        })
    })
}

/// Bytes still to be read.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    fn op(&mut self) -> Result<Op, RecordError> {
        Ok(match self.u8()? {
            1 => Op::Vote(self.vote()?),
            2 => Op::Committed(self.log_id()?),
            3 => Op::Append(self.entry()?),
            4 => Op::TruncateAfter(self.log_id()?),
            5 => Op::Purge(self.log_id()?.ok_or(RecordError)?),
            6 => Op::Checkpoint(Checkpoint {
                vote: self.flag()?.then(|| self.vote()).transpose()?,
                committed: self.log_id()?,
                purged: self.log_id()?,
                last: self.log_id()?,
            }),
            _ => return Err(RecordError),
        })
    }

    pub(crate) fn entry(&mut self) -> Result<Entry, RecordError> {
        let log_id = log_id(self.u64()?, self.u64()?);
        let kind = self.u8()?;
        let payload = self.run()?;
        let payload = match kind {
            0 if payload.is_empty() => EntryPayload::Blank,
            1 => EntryPayload::Normal(Command(Bytes::copy_from_slice(payload))),
            2 => {
                let mut input = Input(payload);
                let membership = input.membership()?;
                input.end()?;
                EntryPayload::Membership(membership)
            }
            _ => return Err(RecordError),
        };
        Ok(Entry { log_id, payload })
    }

    pub(crate) fn membership(&mut self) -> Result<Membership, RecordError> {
        let mut configurations = Vec::new();
        for _ in 0..self.u32()? {
            let mut voters = BTreeSet::new();
            for _ in 0..self.u32()? {
                voters.insert(self.u64()?);
            }
            configurations.push(voters);
        }
        let mut members = BTreeMap::new();
        for _ in 0..self.u32()? {
            let id = self.u64()?;
            let node = NodeId::from_bytes(self.array()?);
            let address = str::from_utf8(self.run()?).map_err(|_| RecordError)?.to_owned();
            members.insert(id, Member { node, address });
        }
        Membership::new(configurations, members).map_err(|_| RecordError)
    }

    fn vote(&mut self) -> Result<Vote, RecordError> {
        Ok(Vote {
            leader_id: LeaderId {
                term: self.u64()?,
                voted_for: self.u64()?,
            },
            committed: self.flag()?,
        })
    }

    pub(crate) fn log_id(&mut self) -> Result<Option<LogId>, RecordError> {
        self.flag()?
            .then(|| Ok(log_id(self.u64()?, self.u64()?)))
            .transpose()
    }

    pub(crate) fn end(&self) -> Result<(), RecordError> {
        self.0.is_empty().then_some(()).ok_or(RecordError)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(RecordError)?;
        self.0 = rest;
        Ok(*head)
    }

    /// Bytes with their length before them.
    fn run(&mut self) -> Result<&'a [u8], RecordError> {
        let bytes = usize::try_from(self.u32()?).map_err(|_| RecordError)?;
        let (head, rest) = self.0.split_at_checked(bytes).ok_or(RecordError)?;
        self.0 = rest;
        Ok(head)
    }

    fn u8(&mut self) -> Result<u8, RecordError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn flag(&mut self) -> Result<bool, RecordError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(RecordError),
        }
    }

    fn u32(&mut self) -> Result<u32, RecordError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, RecordError> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn membership() -> Membership {
        let member = |byte| Member {
            node: NodeId::from_bytes([byte; 16]),
            address: format!("127.0.0.{byte}:7443"),
        };
        let members: BTreeMap<u64, Member> = (1..=3).map(|id| (u64::from(id), member(id))).collect();
        Membership::new(vec![BTreeSet::from([1, 2]), BTreeSet::from([2])], members).expect("valid")
    }

    fn all_ops() -> Vec<Op> {
        let vote = Vote {
            leader_id: LeaderId {
                term: 3,
                voted_for: 2,
            },
            committed: true,
        };
        let entry = |index, payload| {
            Op::Append(Entry {
                log_id: log_id(3, index),
                payload,
            })
        };
        vec![
            Op::Checkpoint(Checkpoint::default()),
            Op::Checkpoint(Checkpoint {
                vote: Some(vote),
                committed: Some(log_id(1, 2)),
                purged: None,
                last: Some(log_id(3, 4)),
            }),
            Op::Vote(vote),
            Op::Committed(None),
            Op::Committed(Some(log_id(1, 9))),
            entry(10, EntryPayload::Blank),
            entry(11, EntryPayload::Normal(Command(Bytes::from_static(b"change")))),
            entry(12, EntryPayload::Membership(membership())),
            Op::TruncateAfter(None),
            Op::TruncateAfter(Some(log_id(2, 8))),
            Op::Purge(log_id(1, 1)),
        ]
    }

    fn encode(all: &[Op]) -> Vec<u8> {
        let mut buffer = Vec::new();
        for op in all {
            match op {
                Op::Vote(vote) => put_vote_op(&mut buffer, vote),
                Op::Committed(id) => put_committed(&mut buffer, id.as_ref()),
                Op::Append(entry) => put_entry_op(&mut buffer, entry),
                Op::TruncateAfter(id) => put_truncate(&mut buffer, id.as_ref()),
                Op::Purge(id) => put_purge(&mut buffer, id),
                Op::Checkpoint(checkpoint) => put_checkpoint(&mut buffer, checkpoint),
            }
        }
        buffer
    }

    #[test]
    fn every_operation_reads_as_it_was_written() {
        let read: Result<Vec<Op>, _> = ops(&encode(&all_ops())).collect();
        assert_eq!(read, Ok(all_ops()));
    }

    #[test]
    fn a_cut_record_is_refused_or_a_prefix() {
        let all = all_ops();
        let bytes = encode(&all);
        for cut in 0..bytes.len() {
            let read: Vec<_> = ops(&bytes[..cut]).collect();
            let good = read.iter().filter_map(|op| op.as_ref().ok()).count();
            assert!(read.iter().flatten().eq(&all[..good]), "cut at {cut}");
            assert!(read.len() - good <= 1, "cut at {cut}");
        }
        assert_eq!(ops(&[9]).collect::<Vec<_>>(), [Err(RecordError)]);
    }

    #[test]
    fn the_format_on_disk_stays_what_it_is() {
        let hex: String = encode(&all_ops())
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "060000000006010300000000000000020000000000000001010100000000000000020000000000000000010300000000\
             000000040000000000000001030000000000000002000000000000000102000201010000000000000009000000000000\
             000303000000000000000a0000000000000000000000000303000000000000000b000000000000000106000000636861\
             6e67650303000000000000000c0000000000000002a60000000200000002000000010000000000000002000000000000\
             00010000000200000000000000030000000100000000000000010101010101010101010101010101010e000000313237\
             2e302e302e313a373434330200000000000000020202020202020202020202020202020e0000003132372e302e302e32\
             3a373434330300000000000000030303030303030303030303030303030e0000003132372e302e302e333a3734343304\
             00040102000000000000000800000000000000050101000000000000000100000000000000"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(0_u8..8, 0..100)) {
            ops(&bytes).for_each(drop);
        }
    }
}
