//! The chain of the audit log: each record's hash covers the record before it, so one hash stands for all that led to it.
//!
//! Managers append and operators check with the same few lines. They find what was rewritten, left out or moved; whoever
//! may write the log could still write another one, so a head that was kept elsewhere is what proves that nobody did.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use sha2::{Digest as _, Sha256};

use crate::wire::{AuditAction, AuditHead, AuditRecord};

/// Separates these hashes from all others, and this encoding from later ones.
const DOMAIN: &[u8] = b"bulkhead audit record 1";

/// The end of a part of the log: its newest record's number and hash. The default is before the first record.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Head {
    /// Number of the newest record; 0: there is none.
    pub sequence: u64,
    /// Its hash.
    pub hash: [u8; 32],
}

/// Where a log is not what was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Broken {
    /// Records are missing, or in another order.
    #[error("record {expected} is due, and {found} comes")]
    Order {
        /// The number that follows.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// The record, or one before it, is not the one that was written.
    #[error("the hash of record {0} does not fit what it and the records before it say")]
    Hash(u64),
}

impl Head {
    /// Appends a record: numbers it and gives it its hash.
    pub fn append(&mut self, mut record: AuditRecord) -> AuditRecord {
        record.sequence = self.sequence + 1;
        let hash = hash(&self.hash, &record);
        record.hash = hash.to_vec();
        *self = Head {
            sequence: record.sequence,
            hash,
        };
        record
    }

    /// Goes on to the record that follows.
    ///
    /// # Errors
    /// [`Broken`]; the head stays where it was.
    pub fn follow(&mut self, record: &AuditRecord) -> Result<(), Broken> {
        let expected = self.sequence.saturating_add(1);
        if record.sequence != expected {
            return Err(Broken::Order {
                expected,
                found: record.sequence,
            });
        }
        let hash = hash(&self.hash, record);
        if record.hash != hash {
            return Err(Broken::Hash(record.sequence));
        }
        *self = Head {
            sequence: record.sequence,
            hash,
        };
        Ok(())
    }

    /// The head as messages carry it.
    pub fn to_wire(self) -> AuditHead {
        AuditHead {
            sequence: self.sequence,
            hash: self.hash.to_vec(),
        }
    }

    /// A head from outside; none where it is malformed.
    pub fn from_wire(head: &AuditHead) -> Option<Self> {
        Some(Head {
            sequence: head.sequence,
            hash: head.hash.as_slice().try_into().ok()?,
        })
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.sequence, HEXLOWER.encode(&self.hash))
    }
}

/// A text that is no head.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a head is a number, a colon and 64 hexadecimal digits")]
pub struct ParseHeadError;

impl FromStr for Head {
    type Err = ParseHeadError;

    fn from_str(text: &str) -> Result<Self, ParseHeadError> {
        let (sequence, hash) = text.split_once(':').ok_or(ParseHeadError)?;
        let hash = HEXLOWER.decode(hash.as_bytes()).map_err(|_| ParseHeadError)?;
        Ok(Head {
            sequence: sequence.parse().map_err(|_| ParseHeadError)?,
            hash: hash.try_into().map_err(|_| ParseHeadError)?,
        })
    }
}

/// SHA-256 of the domain, the hash before, and every field in the order of its number: integers as eight bytes, little end
/// first; texts and bytes after their length, as such an integer. So no two records are the same bytes.
fn hash(before: &[u8; 32], record: &AuditRecord) -> [u8; 32] {
    // Named one by one: a field that is added does not build until it is covered here.
    let AuditRecord {
        sequence,
        index,
        at,
        action,
        actor,
        actor_name,
        request_id,
        object,
        name,
        role,
        related,
        related_name,
        key_id,
        until,
        address,
        detail,
        count,
        hash: _,
    } = record;
    let mut hasher = Sha256::new();
    hasher.update(DOMAIN);
    hasher.update(before);
    let reference = |reference: &Option<crate::wire::ObjectRef>| match reference {
        Some(it) => (i64::from(it.kind), it.id.clone()),
        None => (0, Vec::new()),
    };
    let (object_kind, object_id) = reference(object);
    let (related_kind, related_id) = reference(related);
    let mut number = |value: [u8; 8]| hasher.update(value);
    number(sequence.to_le_bytes());
    number(index.to_le_bytes());
    number(at.to_le_bytes());
    number(i64::from(*action).to_le_bytes());
    number(object_kind.to_le_bytes());
    number(i64::from(*role).to_le_bytes());
    number(related_kind.to_le_bytes());
    number(until.to_le_bytes());
    number(count.to_le_bytes());
    for bytes in [
        actor.as_bytes(),
        actor_name.as_bytes(),
        request_id,
        &object_id,
        name.as_bytes(),
        &related_id,
        related_name.as_bytes(),
        key_id,
        address.as_bytes(),
        detail.as_bytes(),
    ] {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    hasher.finalize().into()
}

/// The action's word, as people and scripts read it.
pub fn word(action: AuditAction) -> &'static str {
    match action {
        AuditAction::Unspecified => "unknown",
        AuditAction::Create => "create",
        AuditAction::Change => "change",
        AuditAction::Remove => "remove",
        AuditAction::Join => "join",
        AuditAction::Issue => "issue",
        AuditAction::Renew => "renew",
        AuditAction::Quarantine => "quarantine",
        AuditAction::Rotate => "rotate",
        AuditAction::KeyRing => "key-ring",
        AuditAction::Voters => "voters",
        AuditAction::Grant => "grant",
        AuditAction::Access => "access",
        AuditAction::Refuse => "refuse",
        AuditAction::Unlock => "unlock",
        AuditAction::Role => "role",
        AuditAction::Clone => "clone",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ObjectRef, Role};
    use prost::Message as _;

    fn record(n: u64) -> AuditRecord {
        AuditRecord {
            index: 10 + n,
            at: 1_000,
            action: AuditAction::Join.into(),
            actor: "ticket/x".into(),
            actor_name: "n".into(),
            request_id: vec![3; 16],
            object: Some(ObjectRef {
                kind: 2,
                id: vec![4; 16],
            }),
            name: "worker-1".into(),
            role: Role::Worker.into(),
            related: Some(ObjectRef {
                kind: 3,
                id: vec![5; 16],
            }),
            related_name: "t".into(),
            key_id: vec![6; 32],
            until: 2_000,
            address: "10.0.0.1".into(),
            detail: "d".into(),
            count: 1,
            ..Default::default()
        }
    }

    fn log(length: u64) -> (Vec<AuditRecord>, Head) {
        let mut head = Head::default();
        let records = (0..length).map(|n| head.append(record(n))).collect();
        (records, head)
    }

    fn check(records: &[AuditRecord]) -> Result<Head, Broken> {
        let mut head = Head::default();
        records.iter().try_for_each(|it| head.follow(it))?;
        Ok(head)
    }

    #[test]
    fn what_was_appended_is_followed_to_the_same_head() {
        let (records, head) = log(5);
        assert_eq!(check(&records), Ok(head));
        assert_eq!(head.sequence, 5);
        assert_eq!(head.to_string().parse(), Ok(head));
        assert_eq!(Head::from_wire(&head.to_wire()), Some(head));
    }

    /// The encoding is an interface: a head that was kept years ago must still be found.
    #[test]
    fn the_hash_stays_what_it_is() {
        let (_, head) = log(1);
        assert_eq!(
            head.to_string(),
            "1:c7ce1d42eeafcd9d5eeeffb6009d6380f45bdac152a0e596f766f994ba0ccf7f"
        );
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found() {
        let (records, head) = log(4);
        for at in 0..records.len() {
            let bytes = records[at].encode_to_vec();
            for bit in 0..bytes.len() * 8 {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                // What does not decode is found before it is hashed.
                let Ok(damaged) = AuditRecord::decode(bytes.as_slice()) else {
                    continue;
                };
                if damaged == records[at] {
                    continue; // a flip in the encoding of what the message does not have
                }
                let mut log = records.clone();
                log[at] = damaged;
                assert_ne!(check(&log), Ok(head), "record {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn what_is_left_out_moved_or_repeated_is_found() {
        let (records, _) = log(4);
        let order = |expected, found| Err(Broken::Order { expected, found });
        let without = [&records[..1], &records[2..]].concat();
        assert_eq!(check(&without), order(2, 3));
        let mut moved = records.clone();
        moved.swap(1, 2);
        assert_eq!(check(&moved), order(2, 3));
        let repeated = [&records[..2], &records[1..]].concat();
        assert_eq!(check(&repeated), order(3, 2));
        let mut renumbered = without;
        renumbered[1].sequence = 2;
        assert_eq!(check(&renumbered), Err(Broken::Hash(2)));
    }

    #[test]
    fn what_is_no_head_is_refused() {
        let whole = Head::default().to_string();
        for text in [
            "",
            "1",
            "1:",
            "1:zz",
            "x:00",
            &whole[..whole.len() - 1],
            &whole.replace(':', " "),
        ] {
            assert_eq!(text.parse::<Head>(), Err(ParseHeadError), "{text}");
        }
    }
}
