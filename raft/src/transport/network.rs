//! What this member asks of the others. Every call has a deadline.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::RaftMessage;
use bulkhead_proto::wire::raft_client::RaftClient;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _, stream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderRequest, VoteRequest, VoteResponse,
};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::message::{self, Malformed, TransferResult};
use super::{APPEND_WAIT, Binding, CHUNK_WAIT, InFlight, Witness, votes};
use crate::state::{State, chunks};
use crate::state_machine::Snapshot;
use crate::{Member, TypeConfig, Vote};

/// Why a member cannot be dialled at all: an address that is none, say.
#[derive(Debug, thiserror::Error)]
#[error("cannot dial the member: {0}")]
pub struct DialError(pub String);

/// How members are reached: channels that expect exactly this node's certificate.
pub trait Dial: Send + Sync + 'static {
    /// A channel to a member; lazy, and connecting again by itself.
    ///
    /// # Errors
    /// [`DialError`].
    fn channel(&self, id: u64, member: &Member) -> Result<Channel, DialError>;
}

/// The other members, over gRPC.
pub struct Network<D> {
    dial: Arc<D>,
    binding: Binding,
    witness: Witness,
}

impl<D> std::fmt::Debug for Network<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network")
            .field("binding", &self.binding)
            .finish_non_exhaustive()
    }
}

impl<D: Dial> Network<D> {
    /// Reaches members by these channels, as this member.
    pub fn new(dial: D, binding: Binding, witness: Witness) -> Self {
        Self {
            dial: Arc::new(dial),
            binding,
            witness,
        }
    }
}

impl<D: Dial> RaftNetworkFactory<TypeConfig> for Network<D> {
    type Network = Peer<D>;

    async fn new_client(&mut self, target: u64, member: &Member) -> Peer<D> {
        Peer {
            dial: self.dial.clone(),
            binding: self.binding,
            witness: self.witness.clone(),
            target,
            member: member.clone(),
        }
    }
}

/// One other member.
pub struct Peer<D> {
    dial: Arc<D>,
    binding: Binding,
    witness: Witness,
    target: u64,
    member: Member,
}

impl<D> std::fmt::Debug for Peer<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

impl<D: Dial> Peer<D> {
    /// Each call asks for the channel, which is another one once this member's credentials changed.
    fn client(&self) -> RpcResult<RaftClient<Channel>> {
        let channel = self.dial.channel(self.target, &self.member);
        let channel = channel.map_err(|error| Unreachable::new(&error))?;
        Ok(RaftClient::new(channel)
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES))
    }

    fn seal(&self, payload: Vec<u8>) -> RaftMessage {
        self.binding.seal(self.target, payload, &self.witness)
    }

    /// What an answer holds, once it was looked at for what it says of this member's own store.
    fn open<T>(
        &self,
        answer: &RaftMessage,
        decode: impl FnOnce(&[u8]) -> Result<T, Malformed>,
    ) -> RpcResult<T> {
        self.witness
            .heard(answer)
            .map_err(|found| Unreachable::new(&found))?;
        decode(&answer.payload).map_err(garbled)
    }

    fn late(&self, action: RPCTypes, limit: Duration) -> Timeout<TypeConfig> {
        Timeout {
            action,
            id: self.binding.member,
            target: self.target,
            timeout: limit,
        }
    }

    /// One call with one answer.
    async fn call<T, F>(
        &self,
        action: RPCTypes,
        option: &RPCOption,
        call: F,
        decode: fn(&[u8]) -> Result<T, Malformed>,
    ) -> RpcResult<T>
    where
        F: AsyncFnOnce(RaftClient<Channel>) -> Result<tonic::Response<RaftMessage>, Status>,
    {
        let limit = option.hard_ttl();
        let client = self.client()?;
        let answer = timeout(limit, call(client))
            .await
            .map_err(|_| self.late(action, limit))?
            .map_err(failed)?;
        self.open(&answer.into_inner(), decode)
    }
}

/// A member that cannot be reached, or refuses, is asked again after a pause; other failures at once.
fn failed(status: Status) -> RPCError<TypeConfig> {
    match status.code() {
        Code::Cancelled | Code::DeadlineExceeded | Code::Aborted => NetworkError::new(&status).into(),
        _ => Unreachable::new(&status).into(),
    }
}

fn garbled(error: Malformed) -> RPCError<TypeConfig> {
    NetworkError::new(&error).into()
}

/// The answers of one append stream, up to the first that ends it.
struct Answers<'a, D> {
    peer: &'a Peer<D>,
    messages: Streaming<RaftMessage>,
    in_flight: Arc<InFlight>,
}

impl<D: Dial> Answers<'_, D> {
    async fn next(&mut self) -> Option<RpcResult<StreamAppendResult<TypeConfig>>> {
        self.in_flight.asked();
        loop {
            let message = tokio::select! {
                biased;
                message = self.messages.message() => message,
                () = self.in_flight.overdue() => {
                    return Some(Err(self.peer.late(RPCTypes::AppendEntries, APPEND_WAIT).into()));
                }
            };
            let answer = match message {
                Ok(message) => self.peer.open(&message?, message::decode_appended),
                Err(status) => Err(failed(status)),
            };
            match &answer {
                Ok(said) if !self.in_flight.answered(said) => {}
                _ => return Some(answer),
            }
        }
    }
}

impl<D: Dial> RaftNetworkV2<TypeConfig> for Peer<D> {
    type SnapshotData = State;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let mut answers = self
            .stream_append(Box::pin(stream::once(async { request })), option)
            .await?;
        match answers.next().await {
            Some(Ok(Ok(_))) => Ok(AppendEntriesResponse::Success),
            Some(Ok(Err(StreamAppendError::Conflict(_)))) => Ok(AppendEntriesResponse::Conflict),
            Some(Ok(Err(StreamAppendError::HigherVote(vote)))) => Ok(AppendEntriesResponse::HigherVote(vote)),
            Some(Err(error)) => Err(error),
            None => Err(garbled(Malformed)),
        }
    }

    /// Pipelined: requests go out as they are made, whatever answers are still under way.
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        Box::pin(async move {
            // Asked for before anything is dialled: after a failure, consensus waits in its stream of requests. A peer that
            // cannot be reached would otherwise be dialled thousands of times a second.
            let in_flight = Arc::new(InFlight::default());
            let mut input = in_flight.requests(input);
            let Some(first) = input.next().await else {
                return Ok(stream::empty().boxed());
            };
            let (binding, target, witness) = (self.binding, self.target, self.witness.clone());
            let requests = stream::once(async { first })
                .chain(input)
                .map(move |request| binding.seal(target, message::encode_append(request), &witness));
            let mut client = self.client()?;
            let opened = client.append(requests);
            // The peer answers the call itself once it has the first request; idle until then is not late.
            let messages = tokio::select! {
                biased;
                opened = opened => opened.map_err(failed)?.into_inner(),
                () = in_flight.overdue() => {
                    return Err(self.late(RPCTypes::AppendEntries, APPEND_WAIT).into());
                }
            };
            let answers = Answers {
                peer: &*self,
                messages,
                in_flight,
            };
            // A refused append ends the stream: what was pipelined behind it is refused as well.
            let answers = stream::unfold(Some(answers), |answers| async move {
                let mut answers = answers?;
                let answer = answers.next().await?;
                let more = matches!(answer, Ok(Ok(_))).then_some(answers);
                Some((answer, more))
            });
            Ok(answers.boxed())
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let message = self.seal(message::encode_vote(&request));
        let call = async |mut client: RaftClient<Channel>| client.vote(message).await;
        self.call(RPCTypes::Vote, &option, call, message::decode_voted)
            .await
            .map(|answer| votes::answered(request.vote, answer))
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let message = self.seal(message::encode_vote(&request));
        let call = async |mut client: RaftClient<Channel>| client.pre_vote(message).await;
        self.call(RPCTypes::Vote, &option, call, message::decode_voted)
            .await
            .map(|answer| votes::answered(request.vote, answer))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let taken = Arc::new(AtomicU64::new(0));
        let head = message::encode_snapshot(&vote, &snapshot.meta);
        let (binding, target, counter) = (self.binding, self.target, taken.clone());
        let witness = self.witness.clone();
        // Encoded chunk by chunk as the peer takes them.
        let messages = std::iter::once(head)
            .chain(chunks(&snapshot.snapshot))
            .map(move |payload| {
                counter.fetch_add(1, Ordering::Relaxed);
                binding.seal(target, payload, &witness)
            });
        let mut client = self.client()?;
        let mut sending = pin!(client.install_snapshot(stream::iter(messages)));
        let mut cancel = pin!(cancel);
        let mut deadline = pin!(sleep(option.hard_ttl()));
        loop {
            let before = taken.load(Ordering::Relaxed);
            tokio::select! {
                biased;
                answer = &mut sending => {
                    let answer = answer.map_err(failed)?.into_inner();
                    return Ok(self.open(&answer, message::decode_installed)?);
                }
                closed = &mut cancel => return Err(closed.into()),
                () = &mut deadline => {
                    return Err(self.late(RPCTypes::InstallSnapshot, option.hard_ttl()).into());
                }
                () = sleep(CHUNK_WAIT) => {
                    if taken.load(Ordering::Relaxed) == before {
                        return Err(self.late(RPCTypes::InstallSnapshot, CHUNK_WAIT).into());
                    }
                }
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<TransferResult> {
        let message = self.seal(message::encode_transfer(&request));
        let call = async |mut client: RaftClient<Channel>| client.transfer_leader(message).await;
        self.call(
            RPCTypes::TransferLeader,
            &option,
            call,
            message::decode_transferred,
        )
        .await
    }
}
