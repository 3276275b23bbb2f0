//! What members say to each other, as bytes. Entries stay the bytes that their proposer encoded.
//!
//! Decoding is total: whatever came gives a message or [`Malformed`], and nothing is allocated that the bytes do not
//! hold. The transport bounds the bytes.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_proto::NodeId;
use bytes::Bytes;
use openraft::EntryPayload;
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendError, TransferLeaderError, TransferLeaderRequest,
    VoteRequest, VoteResponse,
};
use prost::Message as _;

use crate::state_machine::SnapshotMeta;
use crate::{Command, Entry, LogId, Member, Membership, StoredMembership, TypeConfig, Vote, log_id};

/// What an append answers: the last entry that matches, or why not.
pub(super) type AppendResult = Result<Option<LogId>, StreamAppendError<TypeConfig>>;
/// What a request to take over answers.
pub(super) type TransferResult = Result<(), TransferLeaderError<TypeConfig>>;

/// Bytes that are no message of the expected kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a message of this kind")]
pub(crate) struct Malformed;

impl From<prost::DecodeError> for Malformed {
    fn from(_: prost::DecodeError) -> Self {
        Malformed // what exactly is wrong with a peer's bytes helps only an attacker
    }
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireLogId {
    #[prost(uint64, tag = "1")]
    term: u64,
    #[prost(uint64, tag = "2")]
    index: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireVote {
    #[prost(uint64, tag = "1")]
    term: u64,
    #[prost(uint64, tag = "2")]
    member: u64,
    #[prost(bool, tag = "3")]
    committed: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireConfig {
    #[prost(uint64, repeated, tag = "1")]
    voters: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireMember {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(bytes = "vec", tag = "2")]
    node: Vec<u8>,
    #[prost(string, tag = "3")]
    address: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireMembership {
    #[prost(message, repeated, tag = "1")]
    configs: Vec<WireConfig>,
    #[prost(message, repeated, tag = "2")]
    members: Vec<WireMember>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireEntry {
    #[prost(message, required, tag = "1")]
    id: WireLogId,
    /// Neither of both: a blank entry.
    #[prost(bytes = "bytes", optional, tag = "2")]
    command: Option<Bytes>,
    #[prost(message, optional, tag = "3")]
    membership: Option<WireMembership>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireAppend {
    #[prost(message, required, tag = "1")]
    vote: WireVote,
    #[prost(message, optional, tag = "2")]
    previous: Option<WireLogId>,
    #[prost(message, repeated, tag = "3")]
    entries: Vec<WireEntry>,
    #[prost(message, optional, tag = "4")]
    committed: Option<WireLogId>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireAppended {
    #[prost(message, optional, tag = "1")]
    matched: Option<WireLogId>,
    #[prost(message, optional, tag = "2")]
    conflict: Option<WireLogId>,
    #[prost(message, optional, tag = "3")]
    higher: Option<WireVote>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireVoteRequest {
    #[prost(message, required, tag = "1")]
    vote: WireVote,
    #[prost(message, optional, tag = "2")]
    last: Option<WireLogId>,
    #[prost(bool, tag = "3")]
    transfer: bool,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireVoteResponse {
    #[prost(message, required, tag = "1")]
    vote: WireVote,
    #[prost(message, optional, tag = "2")]
    last: Option<WireLogId>,
    #[prost(bool, tag = "3")]
    granted: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireSnapshot {
    #[prost(message, required, tag = "1")]
    vote: WireVote,
    #[prost(message, optional, tag = "2")]
    last: Option<WireLogId>,
    #[prost(message, optional, tag = "3")]
    membership_id: Option<WireLogId>,
    #[prost(message, required, tag = "4")]
    membership: WireMembership,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireInstalled {
    #[prost(message, required, tag = "1")]
    vote: WireVote,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireTransfer {
    #[prost(message, required, tag = "1")]
    from: WireVote,
    #[prost(uint64, tag = "2")]
    to: u64,
    #[prost(message, optional, tag = "3")]
    last: Option<WireLogId>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct WireTransferred {
    #[prost(bool, tag = "1")]
    accepted: bool,
    /// Where it was refused because of the vote; else because of the log.
    #[prost(message, optional, tag = "2")]
    expected_vote: Option<WireVote>,
    #[prost(message, optional, tag = "3")]
    actual_vote: Option<WireVote>,
    #[prost(message, optional, tag = "4")]
    expected_log: Option<WireLogId>,
    #[prost(message, optional, tag = "5")]
    actual_log: Option<WireLogId>,
}

fn from_log_id(id: LogId) -> WireLogId {
    WireLogId {
        term: id.committed_leader_id().term,
        index: id.index,
    }
}

fn to_log_id(id: WireLogId) -> LogId {
    log_id(id.term, id.index)
}

fn from_vote(vote: &Vote) -> WireVote {
    WireVote {
        term: vote.leader_id().term,
        member: vote.leader_id().voted_for,
        committed: vote.is_committed(),
    }
}

fn to_vote(vote: WireVote) -> Vote {
    if vote.committed {
        Vote::new_committed(vote.term, vote.member)
    } else {
        Vote::new(vote.term, vote.member)
    }
}

fn from_membership(membership: &Membership) -> WireMembership {
    let configs = membership.get_joint_config().iter();
    WireMembership {
        configs: configs
            .map(|voters| WireConfig {
                voters: voters.iter().copied().collect(),
            })
            .collect(),
        members: membership
            .nodes()
            .map(|(id, member)| WireMember {
                id: *id,
                node: member.node.to_wire(),
                address: member.address.clone(),
            })
            .collect(),
    }
}

fn to_membership(membership: WireMembership) -> Result<Membership, Malformed> {
    if membership.configs.is_empty() && membership.members.is_empty() {
        return Ok(Membership::default());
    }
    let configs: Vec<BTreeSet<u64>> = membership
        .configs
        .into_iter()
        .map(|config| config.voters.into_iter().collect())
        .collect();
    let members: BTreeMap<u64, Member> = membership
        .members
        .into_iter()
        .map(|member| {
            let node = NodeId::try_from(member.node.as_slice()).map_err(|_| Malformed)?;
            let address = member.address;
            Ok((member.id, Member { node, address }))
        })
        .collect::<Result<_, Malformed>>()?;
    Membership::new(configs, members).map_err(|_| Malformed)
}

fn from_entry(entry: Entry) -> WireEntry {
    let id = from_log_id(entry.log_id);
    let (command, membership) = match entry.payload {
        EntryPayload::Blank => (None, None),
        EntryPayload::Normal(Command(bytes)) => (Some(bytes), None),
        EntryPayload::Membership(membership) => (None, Some(from_membership(&membership))),
    };
    WireEntry {
        id,
        command,
        membership,
    }
}

fn to_entry(entry: WireEntry) -> Result<Entry, Malformed> {
    let payload = match (entry.command, entry.membership) {
        (None, None) => EntryPayload::Blank,
        (Some(bytes), None) => EntryPayload::Normal(Command(bytes)),
        (None, Some(membership)) => EntryPayload::Membership(to_membership(membership)?),
        (Some(_), Some(_)) => return Err(Malformed),
    };
    let log_id = to_log_id(entry.id);
    Ok(Entry { log_id, payload })
}

pub(super) fn encode_append(request: AppendEntriesRequest<TypeConfig>) -> Vec<u8> {
    WireAppend {
        vote: from_vote(&request.vote),
        previous: request.prev_log_id.map(from_log_id),
        entries: request.entries.into_iter().map(from_entry).collect(),
        committed: request.leader_commit.map(from_log_id),
    }
    .encode_to_vec()
}

pub(super) fn decode_append(bytes: Bytes) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let wire = WireAppend::decode(bytes)?; // commands are slices of it, not copies
    Ok(AppendEntriesRequest {
        vote: to_vote(wire.vote),
        prev_log_id: wire.previous.map(to_log_id),
        entries: wire.entries.into_iter().map(to_entry).collect::<Result<_, _>>()?,
        leader_commit: wire.committed.map(to_log_id),
    })
}

pub(super) fn encode_appended(result: AppendResult) -> Vec<u8> {
    let wire = match result {
        Ok(matched) => WireAppended {
            matched: matched.map(from_log_id),
            ..Default::default()
        },
        Err(StreamAppendError::Conflict(id)) => WireAppended {
            conflict: Some(from_log_id(id)),
            ..Default::default()
        },
        Err(StreamAppendError::HigherVote(vote)) => WireAppended {
            higher: Some(from_vote(&vote)),
            ..Default::default()
        },
    };
    wire.encode_to_vec()
}

pub(super) fn decode_appended(bytes: &[u8]) -> Result<AppendResult, Malformed> {
    let wire = WireAppended::decode(bytes)?;
    match (wire.matched, wire.conflict, wire.higher) {
        (matched, None, None) => Ok(Ok(matched.map(to_log_id))),
        (None, Some(id), None) => Ok(Err(StreamAppendError::Conflict(to_log_id(id)))),
        (None, None, Some(vote)) => Ok(Err(StreamAppendError::HigherVote(to_vote(vote)))),
        _ => Err(Malformed),
    }
}

pub(super) fn encode_vote(request: &VoteRequest<TypeConfig>) -> Vec<u8> {
    WireVoteRequest {
        vote: from_vote(&request.vote),
        last: request.last_log_id.map(from_log_id),
        transfer: request.leadership_transfer,
    }
    .encode_to_vec()
}

pub(super) fn decode_vote(bytes: &[u8]) -> Result<VoteRequest<TypeConfig>, Malformed> {
    let wire = WireVoteRequest::decode(bytes)?;
    Ok(VoteRequest {
        vote: to_vote(wire.vote),
        last_log_id: wire.last.map(to_log_id),
        leadership_transfer: wire.transfer,
    })
}

pub(super) fn encode_voted(response: &VoteResponse<TypeConfig>) -> Vec<u8> {
    WireVoteResponse {
        vote: from_vote(&response.vote),
        last: response.last_log_id.map(from_log_id),
        granted: response.vote_granted,
    }
    .encode_to_vec()
}

pub(super) fn decode_voted(bytes: &[u8]) -> Result<VoteResponse<TypeConfig>, Malformed> {
    let wire = WireVoteResponse::decode(bytes)?;
    Ok(VoteResponse::new(
        to_vote(wire.vote),
        wire.last.map(to_log_id),
        wire.granted,
    ))
}

/// The first message of a snapshot; chunks of the state follow.
pub(super) fn encode_snapshot(vote: &Vote, meta: &SnapshotMeta) -> Vec<u8> {
    WireSnapshot {
        vote: from_vote(vote),
        last: meta.last_log_id.map(from_log_id),
        membership_id: meta.last_membership.log_id().map(from_log_id),
        membership: from_membership(meta.last_membership.membership()),
    }
    .encode_to_vec()
}

pub(super) fn decode_snapshot(bytes: &[u8]) -> Result<(Vote, SnapshotMeta), Malformed> {
    let wire = WireSnapshot::decode(bytes)?;
    let membership = to_membership(wire.membership)?;
    let meta = SnapshotMeta {
        last_log_id: wire.last.map(to_log_id),
        last_membership: StoredMembership::new(wire.membership_id.map(to_log_id), membership),
    };
    Ok((to_vote(wire.vote), meta))
}

pub(super) fn encode_installed(response: &SnapshotResponse<TypeConfig>) -> Vec<u8> {
    WireInstalled {
        vote: from_vote(&response.vote),
    }
    .encode_to_vec()
}

pub(super) fn decode_installed(bytes: &[u8]) -> Result<SnapshotResponse<TypeConfig>, Malformed> {
    Ok(SnapshotResponse::new(to_vote(WireInstalled::decode(bytes)?.vote)))
}

pub(super) fn encode_transfer(request: &TransferLeaderRequest<TypeConfig>) -> Vec<u8> {
    WireTransfer {
        from: from_vote(request.from_leader()),
        to: *request.to_node_id(),
        last: request.last_log_id().copied().map(from_log_id),
    }
    .encode_to_vec()
}

pub(super) fn decode_transfer(bytes: &[u8]) -> Result<TransferLeaderRequest<TypeConfig>, Malformed> {
    let wire = WireTransfer::decode(bytes)?;
    Ok(TransferLeaderRequest::new(
        to_vote(wire.from),
        wire.to,
        wire.last.map(to_log_id),
    ))
}

pub(super) fn encode_transferred(result: &TransferResult) -> Vec<u8> {
    let wire = match result {
        Ok(()) => WireTransferred {
            accepted: true,
            ..Default::default()
        },
        Err(TransferLeaderError::VoteChanged { expected, actual }) => WireTransferred {
            expected_vote: Some(from_vote(expected)),
            actual_vote: Some(from_vote(actual)),
            ..Default::default()
        },
        Err(TransferLeaderError::LogNotFlushed { expected, actual }) => WireTransferred {
            expected_log: expected.map(from_log_id),
            actual_log: actual.map(from_log_id),
            ..Default::default()
        },
    };
    wire.encode_to_vec()
}

pub(super) fn decode_transferred(bytes: &[u8]) -> Result<TransferResult, Malformed> {
    let wire = WireTransferred::decode(bytes)?;
    Ok(match (wire.accepted, wire.expected_vote, wire.actual_vote) {
        (true, None, None) => Ok(()),
        (false, Some(expected), Some(actual)) => Err(TransferLeaderError::VoteChanged {
            expected: to_vote(expected),
            actual: to_vote(actual),
        }),
        (false, None, None) => Err(TransferLeaderError::LogNotFlushed {
            expected: wire.expected_log.map(to_log_id),
            actual: wire.actual_log.map(to_log_id),
        }),
        _ => return Err(Malformed),
    })
}

/// For tests with damaged bytes: reads them as each kind of message. What is one reads the same once it is written again.
pub fn read_every_message(bytes: &[u8]) {
    if let Ok(request) = decode_append(bytes.to_vec().into()) {
        let entries = request.entries.len();
        let again = decode_append(encode_append(request).into());
        assert_eq!(again.map(|again| again.entries.len()), Ok(entries));
    }
    if let Ok(result) = decode_appended(bytes) {
        assert_eq!(decode_appended(&encode_appended(result.clone())), Ok(result));
    }
    if let Ok(request) = decode_vote(bytes) {
        assert_eq!(decode_vote(&encode_vote(&request)), Ok(request));
    }
    if let Ok(response) = decode_voted(bytes) {
        assert_eq!(decode_voted(&encode_voted(&response)), Ok(response));
    }
    if let Ok((vote, meta)) = decode_snapshot(bytes) {
        assert_eq!(decode_snapshot(&encode_snapshot(&vote, &meta)), Ok((vote, meta)));
    }
    if let Ok(response) = decode_installed(bytes) {
        assert_eq!(decode_installed(&encode_installed(&response)), Ok(response));
    }
    if let Ok(request) = decode_transfer(bytes) {
        assert_eq!(decode_transfer(&encode_transfer(&request)), Ok(request));
    }
    if let Ok(result) = decode_transferred(bytes) {
        assert_eq!(decode_transferred(&encode_transferred(&result)), Ok(result));
    }
}

/// Some messages, for such tests to begin with.
pub fn some_of_each_message() -> Vec<Vec<u8>> {
    let at = to_log_id(WireLogId { term: 3, index: 9 });
    let entry = Entry {
        log_id: at,
        payload: EntryPayload::Normal(Command(Bytes::from_static(b"transaction"))),
    };
    let append = AppendEntriesRequest {
        vote: Vote::new_committed(3, 1),
        prev_log_id: None,
        entries: vec![entry],
        leader_commit: Some(at),
    };
    let transfer = TransferLeaderRequest::new(Vote::new_committed(3, 1), 2, Some(at));
    vec![
        encode_append(append),
        encode_appended(Ok(Some(at))),
        encode_vote(&VoteRequest::new(Vote::new(4, 2), Some(at))),
        encode_snapshot(&Vote::new(4, 2), &SnapshotMeta::default()),
        encode_transfer(&transfer),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn membership() -> Membership {
        let members = (1..=4u64).map(|id| {
            let node = NodeId::from_bytes([u8::try_from(id).expect("small"); 16]);
            let address = format!("m{id}:7443");
            (id, Member { node, address })
        });
        let configs = vec![BTreeSet::from([1, 2]), BTreeSet::from([1, 2, 3])];
        Membership::new(configs, members.collect::<BTreeMap<_, _>>()).expect("every voter has a node")
    }

    fn entries() -> Vec<Entry> {
        let payloads = [
            EntryPayload::Blank,
            EntryPayload::Normal(Command(Bytes::from_static(b"transaction"))),
            EntryPayload::Normal(Command(Bytes::new())),
            EntryPayload::Membership(membership()),
        ];
        let ids = (7..).map(|index| log_id(3, index));
        ids.zip(payloads)
            .map(|(log_id, payload)| Entry { log_id, payload })
            .collect()
    }

    #[test]
    fn every_message_reads_as_it_was_written() {
        for previous in [None, Some(log_id(2, 6))] {
            let request = AppendEntriesRequest {
                vote: Vote::new_committed(3, 1),
                prev_log_id: previous,
                entries: entries(),
                leader_commit: Some(log_id(2, 5)),
            };
            let read = decode_append(encode_append(request.clone()).into()).expect("own encoding");
            assert_eq!(
                (read.vote, read.prev_log_id, read.entries, read.leader_commit),
                (request.vote, previous, request.entries, request.leader_commit)
            );
        }
        let appended: [AppendResult; 4] = [
            Ok(None),
            Ok(Some(log_id(0, 0))),
            Err(StreamAppendError::Conflict(log_id(1, 2))),
            Err(StreamAppendError::HigherVote(Vote::new(4, 2))),
        ];
        for result in appended {
            assert_eq!(decode_appended(&encode_appended(result.clone())), Ok(result));
        }
        let mut vote = VoteRequest::new(Vote::new(4, 2), Some(log_id(3, 9)));
        vote.leadership_transfer = true;
        assert_eq!(decode_vote(&encode_vote(&vote)), Ok(vote));
        for granted in [true, false] {
            let voted = VoteResponse::new(Vote::new(4, 2), None, granted);
            assert_eq!(decode_voted(&encode_voted(&voted)), Ok(voted));
        }
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(3, 9)),
            last_membership: StoredMembership::new(Some(log_id(1, 1)), membership()),
        };
        for meta in [meta, SnapshotMeta::default()] {
            let vote = Vote::new_committed(3, 1);
            assert_eq!(decode_snapshot(&encode_snapshot(&vote, &meta)), Ok((vote, meta)));
        }
        let transfer = TransferLeaderRequest::new(Vote::new_committed(3, 1), 2, Some(log_id(3, 9)));
        assert_eq!(decode_transfer(&encode_transfer(&transfer)), Ok(transfer));
        let transferred: [TransferResult; 3] = [
            Ok(()),
            Err(TransferLeaderError::VoteChanged {
                expected: Vote::new_committed(3, 1),
                actual: Vote::new(4, 2),
            }),
            Err(TransferLeaderError::LogNotFlushed {
                expected: Some(log_id(3, 9)),
                actual: None,
            }),
        ];
        for result in transferred {
            assert_eq!(decode_transferred(&encode_transferred(&result)), Ok(result));
        }
        let installed = SnapshotResponse::new(Vote::new_committed(3, 1));
        assert_eq!(decode_installed(&encode_installed(&installed)), Ok(installed));
    }

    #[test]
    fn a_membership_whose_voter_has_no_address_is_refused() {
        let mut wire = from_membership(&membership());
        wire.members.remove(0);
        assert_eq!(to_membership(wire), Err(Malformed));
        let mut wire = from_membership(&membership());
        wire.members[0].node.pop();
        assert_eq!(to_membership(wire), Err(Malformed));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            read_every_message(&bytes);
        }
    }
}
