//! Blobs in streams: towards this manager, from it, and from a peer.

use std::time::Duration;

use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::{
    BlobChunk, FetchBlobRequest, OfferBlobRequest, PushBlobRequest, offer_blob_request, push_blob_request,
};
use bulkhead_proto::{Code, Digest, limits};
use futures::stream::{BoxStream, try_unfold};
use futures::{Stream, StreamExt as _};
use tonic::Status;
use tonic::transport::Channel;

use super::{BlobError, BlobStore, blocking, digest, status};
use crate::refusal::refuse;

/// A sender that falls silent for this long is given up: it holds one of few places.
const IDLE: Duration = Duration::from_secs(30);

/// The parts of a blob in a stream of either kind.
pub(super) enum Part {
    Header { digest: Vec<u8>, size: u64 },
    Data(Vec<u8>),
    Empty,
}

impl From<PushBlobRequest> for Part {
    fn from(request: PushBlobRequest) -> Self {
        match request.message {
            Some(push_blob_request::Message::Header(it)) => Part::Header {
                digest: it.digest,
                size: it.size,
            },
            Some(push_blob_request::Message::Data(data)) => Part::Data(data),
            None => Part::Empty,
        }
    }
}

impl From<OfferBlobRequest> for Part {
    fn from(request: OfferBlobRequest) -> Self {
        match request.message {
            Some(offer_blob_request::Message::Header(it)) => Part::Header {
                digest: it.digest,
                size: it.size,
            },
            Some(offer_blob_request::Message::Data(data)) => Part::Data(data),
            None => Part::Empty,
        }
    }
}

fn out_of_order() -> Status {
    refuse(
        Code::Invalid,
        tonic::Code::InvalidArgument,
        "a blob's stream is one header and then its data",
        "send the header first",
    )
}

async fn next<P: Into<Part>>(
    parts: &mut (impl Stream<Item = Result<P, Status>> + Unpin),
) -> Result<Option<Part>, Status> {
    match tokio::time::timeout(IDLE, parts.next()).await {
        Ok(Some(part)) => Ok(Some(part?.into())),
        Ok(None) => Ok(None),
        Err(_) => Err(refuse(
            Code::Unreachable,
            tonic::Code::DeadlineExceeded,
            format!("no data came for {} s", IDLE.as_secs()),
            "send the blob again",
        )),
    }
}

/// Stores the blob of this stream; true if it was here already.
pub(super) async fn receive<P: Into<Part>>(
    store: &BlobStore,
    mut parts: impl Stream<Item = Result<P, Status>> + Unpin,
) -> Result<bool, Status> {
    let Some(Part::Header { digest: bytes, size }) = next(&mut parts).await? else {
        return Err(out_of_order());
    };
    let digest = digest(&bytes)?;
    let here = store.clone();
    match blocking(move || here.touch(&digest)).await {
        Some(found) if found == size => return Ok(true),
        Some(_) => return Err(status(&BlobError::Damaged(digest))),
        None => {}
    }
    let mut incoming = store
        .receive(digest, size)
        .await
        .map_err(|error| status(&error))?;
    while let Some(part) = next(&mut parts).await? {
        let Part::Data(data) = part else {
            return Err(out_of_order());
        };
        incoming = blocking(move || incoming.write(&data).map(|()| incoming))
            .await
            .map_err(|error| status(&error))?;
    }
    blocking(move || incoming.finish())
        .await
        .map_err(|error| status(&error))?;
    Ok(false)
}

/// The content of a stored blob.
pub(super) async fn chunks(
    store: &BlobStore,
    digest: Digest,
    offset: u64,
) -> Result<impl Stream<Item = Result<Vec<u8>, BlobError>> + Send + use<>, BlobError> {
    let store = store.clone();
    let reader = blocking(move || store.read(digest, offset)).await?;
    Ok(try_unfold(reader, |mut reader| async move {
        blocking(move || Ok(reader.next_chunk()?.map(|chunk| (chunk, reader)))).await
    }))
}

/// The content of a stored blob as an answer.
pub(super) async fn send(
    store: &BlobStore,
    digest: Digest,
    offset: u64,
) -> Result<BoxStream<'static, Result<BlobChunk, Status>>, Status> {
    let chunks = chunks(store, digest, offset)
        .await
        .map_err(|error| status(&error))?;
    let answer = chunks.map(|chunk| match chunk {
        Ok(data) => Ok(BlobChunk { data: data.into() }),
        Err(error) => Err(status(&error)),
    });
    Ok(answer.boxed())
}

/// Takes a blob from a peer, which is believed no more than anyone else: the digest decides.
pub(super) async fn take(store: &BlobStore, digest: Digest, channel: Channel) -> Result<(), Status> {
    let mut peer = PeerClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES);
    let request = FetchBlobRequest {
        digest: digest.as_bytes().to_vec(),
        offset: 0,
    };
    let mut chunks = tokio::time::timeout(IDLE, peer.pull_blob(request))
        .await
        .map_err(|_| Status::deadline_exceeded("no answer in time"))??
        .into_inner();
    let mut incoming = store
        .receive_unsized(digest)
        .await
        .map_err(|error| status(&error))?;
    loop {
        let chunk = tokio::time::timeout(IDLE, chunks.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no data came"))??;
        let Some(chunk) = chunk else { break };
        incoming = blocking(move || incoming.write(&chunk.data).map(|()| incoming))
            .await
            .map_err(|error| status(&error))?;
    }
    blocking(move || incoming.finish())
        .await
        .map_err(|error| status(&error))
}
