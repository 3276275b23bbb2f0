//! What other members ask of this one.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::limits;
use bulkhead_proto::wire::{RaftMessage, raft_server};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use openraft::raft::AppendEntriesRequest;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tonic::{Extensions, Request, Response, Status, Streaming};

use super::message::{self, Malformed};
use super::{Binding, CHUNK_WAIT, SNAPSHOT_BYTES, Witness, is_gapless, votes};
use crate::state::Decoder;
use crate::state_machine::Snapshot;
use crate::{Raft, Replica, TypeConfig, Vote};

/// Who may speak for a member: decided from what the handshake proved.
pub trait BindPeer: Send + Sync + 'static {
    /// Whether the caller is this member. A learner whose state is still empty knows nobody: then any manager of the
    /// cluster that is not on the tombstone list may.
    fn speaks_for(&self, extensions: &Extensions, member: u64) -> bool;
}

/// The Raft methods of this manager.
#[derive(Clone)]
pub struct RaftService {
    raft: Raft,
    binding: Binding,
    peers: Arc<dyn BindPeer>,
    witness: Witness,
    /// One snapshot at a time: it is decoded in memory.
    installing: Arc<Semaphore>,
}

impl std::fmt::Debug for RaftService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftService")
            .field("binding", &self.binding)
            .finish_non_exhaustive()
    }
}

impl RaftService {
    /// Answers for this replica.
    pub fn new(replica: &Replica, binding: Binding, peers: Arc<dyn BindPeer>, witness: Witness) -> Self {
        Self {
            raft: replica.raft().clone(),
            binding,
            peers,
            witness,
            installing: Arc::new(Semaphore::new(1)),
        }
    }

    /// The gRPC server of it, with the limits of messages.
    pub fn into_server(self) -> raft_server::RaftServer<Self> {
        raft_server::RaftServer::new(self)
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    /// Opens a request of one message: checks whose it is, decodes it, and gives the sender.
    fn open<T>(
        &self,
        request: Request<RaftMessage>,
        decode: impl FnOnce(&[u8]) -> Result<T, Malformed>,
    ) -> Result<(u64, T), Status> {
        let (_, extensions, message) = request.into_parts();
        self.check(&extensions, &message)?;
        Ok((message.from, decode(&message.payload).map_err(malformed)?))
    }

    fn check(&self, extensions: &Extensions, message: &RaftMessage) -> Result<(), Status> {
        if !self.binding.accepts(message) {
            return Err(Status::failed_precondition(
                "the message is for another cluster, epoch or member",
            ));
        }
        if !self.peers.speaks_for(extensions, message.from) {
            return Err(Status::permission_denied(
                "the caller's certificate does not speak for this member",
            ));
        }
        self.witness
            .heard(message)
            .map_err(|found| Status::failed_precondition(found.to_string()))
    }

    fn answer(&self, to: u64, payload: Vec<u8>) -> Response<RaftMessage> {
        Response::new(self.binding.seal(to, payload, &self.witness))
    }
}

fn malformed(error: Malformed) -> Status {
    Status::invalid_argument(error.to_string())
}

fn stopped() -> Status {
    Status::unavailable("this replica stopped")
}

/// A vote names its candidate or leader: nobody asks for another.
fn own(vote: &Vote, from: u64) -> Result<(), Status> {
    if vote.leader_id().voted_for == from {
        Ok(())
    } else {
        Err(Status::permission_denied(
            "the message names another leader than its sender",
        ))
    }
}

/// An append that a leader may send.
fn opened(payload: Bytes, from: u64) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
    let append = message::decode_append(payload).map_err(malformed)?;
    own(&append.vote, from)?;
    match is_gapless(&append) {
        true => Ok(append),
        false => Err(Status::failed_precondition(
            "the entries of an append do not follow each other: some were purged meanwhile",
        )),
    }
}

/// The requests of one append stream, up to the first that is refused; why is left in `refusal`.
struct Requests {
    service: RaftService,
    extensions: Extensions,
    messages: Streaming<RaftMessage>,
    refusal: Arc<Mutex<Option<Status>>>,
}

impl Requests {
    async fn next(mut self) -> Option<(AppendEntriesRequest<TypeConfig>, Self)> {
        let message = match self.messages.message().await {
            Ok(message) => message?,
            Err(_) => return None, // the caller is gone; nobody reads an answer
        };
        let opened = self.service.check(&self.extensions, &message).and_then(|()| {
            let from = message.from;
            opened(message.payload, from)
        });
        match opened {
            Ok(request) => Some((request, self)),
            Err(status) => {
                *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
                None
            }
        }
    }
}

#[tonic::async_trait]
impl raft_server::Raft for RaftService {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<RaftMessage, Status>> + Send>>;

    async fn append(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let (_, extensions, mut messages) = request.into_parts();
        // The first message says who it is; openraft opens no stream without one.
        let Some(first) = timeout(CHUNK_WAIT, messages.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no append came"))??
        else {
            return Ok(Response::new(Box::pin(stream::empty())));
        };
        self.check(&extensions, &first)?;
        let to = first.from;
        let opened = opened(first.payload, to)?;
        let refusal = Arc::new(Mutex::new(None));
        let rest = Requests {
            service: self.clone(),
            extensions,
            messages,
            refusal: refusal.clone(),
        };
        let requests = stream::once(async move { opened }).chain(stream::unfold(rest, Requests::next));
        let (binding, witness) = (self.binding, self.witness.clone());
        let answers = self.raft.stream_append(requests).map(move |result| match result {
            Ok(result) => Ok(binding.seal(to, message::encode_appended(result), &witness)),
            Err(_) => Err(stopped()),
        });
        let refused = stream::once(async move {
            let refusal = refusal.lock().unwrap_or_else(PoisonError::into_inner).take();
            refusal.map(Err)
        });
        Ok(Response::new(Box::pin(
            answers.chain(refused.filter_map(|refusal| async move { refusal })),
        )))
    }

    async fn vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let (from, vote) = self.open(request, message::decode_vote)?;
        own(&vote.vote, from)?;
        let voted = self.raft.vote(votes::asked(vote)).await.map_err(|_| stopped())?;
        Ok(self.answer(from, message::encode_voted(&voted)))
    }

    async fn pre_vote(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let (from, vote) = self.open(request, message::decode_vote)?;
        own(&vote.vote, from)?;
        let voted = self
            .raft
            .pre_vote(votes::asked(vote))
            .await
            .map_err(|_| stopped())?;
        Ok(self.answer(from, message::encode_voted(&voted)))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<RaftMessage>>,
    ) -> Result<Response<RaftMessage>, Status> {
        let _one = self
            .installing
            .try_acquire()
            .map_err(|_| Status::resource_exhausted("a snapshot is being installed already"))?;
        let (_, extensions, mut messages) = request.into_parts();
        let mut next = async || {
            let message = timeout(CHUNK_WAIT, messages.message())
                .await
                .map_err(|_| Status::deadline_exceeded("the next chunk of the snapshot did not come"))??;
            message
                .map(|message| self.check(&extensions, &message).map(|()| message))
                .transpose()
        };
        let missing = || Status::invalid_argument("the snapshot has no head");
        let refused = |error: crate::state::SnapshotError| Status::invalid_argument(error.to_string());
        let head = next().await?.ok_or_else(missing)?;
        let from = head.from;
        let (vote, meta) = message::decode_snapshot(&head.payload).map_err(malformed)?;
        own(&vote, from)?;
        let mut decoder = Decoder::new(&next().await?.ok_or_else(missing)?.payload).map_err(refused)?;
        let mut bytes = 0_usize;
        while let Some(chunk) = next().await? {
            bytes += chunk.payload.len();
            if bytes > SNAPSHOT_BYTES {
                return Err(Status::resource_exhausted(
                    "the snapshot is larger than any state",
                ));
            }
            decoder.push(&chunk.payload).map_err(refused)?;
        }
        let snapshot = Snapshot {
            meta,
            snapshot: decoder.finish().map_err(refused)?,
        };
        if snapshot.meta.last_log_id.map(|id| id.index) != Some(snapshot.snapshot.index()) {
            return Err(Status::invalid_argument("the snapshot's head and state differ"));
        }
        let installed = self.raft.install_full_snapshot(vote, snapshot).await;
        let installed = installed.map_err(|_| stopped())?;
        Ok(self.answer(from, message::encode_installed(&installed)))
    }

    async fn transfer_leader(&self, request: Request<RaftMessage>) -> Result<Response<RaftMessage>, Status> {
        let (from, transfer) = self.open(request, message::decode_transfer)?;
        own(transfer.from_leader(), from)?;
        let answer = self.raft.handle_transfer_leader(transfer).await;
        let answer = answer.map_err(|_| stopped())?;
        Ok(self.answer(from, message::encode_transferred(&answer)))
    }
}
