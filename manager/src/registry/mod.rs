//! The cluster's own image store: blobs on every manager that needs them, and the proof that an image is whole.
//!
//! A blob is acknowledged to its sender when it stands on this manager; an image is committed only when a majority of
//! the managers hold all of its blobs. The others take them from a peer at the first need.

mod collect;
mod image;
mod store;
mod transfer;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::{
    BlobChunk, FetchBlobRequest, HasBlobRequest, HasBlobResponse, OfferBlobRequest, OfferBlobResponse,
    OfferHeader, PushBlobRequest, PushBlobResponse, offer_blob_request,
};
use bulkhead_proto::{Code, Digest, MemberId, limits};
use futures::stream::{BoxStream, FuturesUnordered};
use futures::{Stream, StreamExt as _};
use tonic::transport::Channel;
use tonic::{Request, Status};

pub use collect::collect_loop;
pub use image::{Described, ImageError, describe};
pub use store::{BlobError, BlobReader, BlobStore, Incoming};

use crate::refusal::refuse;

/// Digests of one question: an image's manifest, config and layers, with room.
const QUESTION: usize = limits::IMAGE_LAYERS + 8;
/// One blob reaches a peer, or comes from it, within this time. A gibibyte at 20 MiB/s takes 51 s.
const TRANSFER: Duration = Duration::from_secs(300);
/// A peer answers a question within this time.
const ANSWER: Duration = Duration::from_secs(5);

/// The other managers, as they can be called now.
pub trait Peers: Send + Sync {
    /// Every manager but this one, reachable or not: a majority is counted over all of them.
    fn others(&self) -> Vec<(MemberId, Channel)>;
}

/// The image store of one manager.
#[derive(Clone)]
pub struct Registry {
    store: BlobStore,
    peers: Arc<dyn Peers>,
    /// One pull for each digest at a time: fifty workers that start one service do not copy its layers fifty times.
    pulls: Arc<Mutex<BTreeMap<Digest, Weak<tokio::sync::Mutex<()>>>>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Registry").field(&self.store).finish()
    }
}

/// Fewer than a majority of the managers hold an image's blobs.
#[derive(Debug, thiserror::Error)]
#[error("{holding} of {managers} managers hold the image's blobs; {needed} are needed")]
pub struct NoMajority {
    /// This manager and those that confirmed.
    pub holding: usize,
    /// All managers.
    pub managers: usize,
    /// A majority of them.
    pub needed: usize,
}

impl Registry {
    /// Opens the store under this manager's data folder.
    pub fn open(folder: &Path, peers: Arc<dyn Peers>) -> Result<Self, BlobError> {
        Ok(Self {
            store: BlobStore::open(folder)?,
            peers,
            pulls: Arc::default(),
        })
    }

    /// The blobs on this manager.
    pub fn store(&self) -> &BlobStore {
        &self.store
    }

    /// `Control.PushBlob`.
    pub async fn push(
        &self,
        parts: impl Stream<Item = Result<PushBlobRequest, Status>> + Send + Unpin,
    ) -> Result<PushBlobResponse, Status> {
        let existed = transfer::receive(&self.store, parts).await?;
        Ok(PushBlobResponse { existed })
    }

    /// `Peer.OfferBlob`.
    pub async fn offer(
        &self,
        parts: impl Stream<Item = Result<OfferBlobRequest, Status>> + Send + Unpin,
    ) -> Result<OfferBlobResponse, Status> {
        transfer::receive(&self.store, parts).await?;
        Ok(OfferBlobResponse {})
    }

    /// `Peer.HasBlob`. What is answered with yes stays for the grace of an unreferenced blob at least.
    pub async fn has(&self, request: HasBlobRequest) -> Result<HasBlobResponse, Status> {
        if request.digests.len() > QUESTION {
            return Err(over_limit(format!(
                "a question names at most {QUESTION} blobs, this one {}",
                request.digests.len()
            )));
        }
        let digests: Vec<Digest> = request
            .digests
            .iter()
            .map(|it| digest(it))
            .collect::<Result<_, _>>()?;
        let store = self.store.clone();
        let has = blocking(move || digests.iter().map(|it| store.touch(it).is_some()).collect()).await;
        Ok(HasBlobResponse { has })
    }

    /// `Peer.PullBlob`: a blob of this manager.
    pub async fn pull(
        &self,
        request: FetchBlobRequest,
    ) -> Result<BoxStream<'static, Result<BlobChunk, Status>>, Status> {
        transfer::send(&self.store, digest(&request.digest)?, request.offset).await
    }

    /// `Dispatcher.FetchBlob`: a blob of the cluster, taken from a peer first where it is not here. Whether the caller
    /// may have it is decided before.
    pub async fn fetch(
        &self,
        request: FetchBlobRequest,
    ) -> Result<BoxStream<'static, Result<BlobChunk, Status>>, Status> {
        let digest = digest(&request.digest)?;
        self.ensure(digest).await.map_err(|error| status(&error))?;
        transfer::send(&self.store, digest, request.offset).await
    }

    /// Reads and checks an image whose manifest has this digest; takes what is missing here from peers.
    pub async fn describe(&self, manifest: Digest, size: u64) -> Result<Described, ImageError> {
        if size > limits::MANIFEST_BYTES as u64 {
            return Err(ImageError::TooLarge {
                what: "manifest",
                size,
            });
        }
        let content = self.small(manifest, size).await?;
        let parsed = image::Manifest::parse(&content)?;
        let config = self.small(parsed.config, parsed.config_size).await?;
        let described = describe(manifest, &content, &config)?;
        for (layer, size) in &described.blobs {
            self.present(*layer, *size).await?;
        }
        Ok(described)
    }

    async fn small(&self, digest: Digest, size: u64) -> Result<Vec<u8>, ImageError> {
        self.present(digest, size).await?;
        let store = self.store.clone();
        Ok(blocking(move || store.read_small(digest, limits::MANIFEST_BYTES)).await?)
    }

    /// The blob is here and has the size that its descriptor says.
    async fn present(&self, digest: Digest, size: u64) -> Result<(), ImageError> {
        self.ensure(digest).await?;
        let store = self.store.clone();
        match blocking(move || store.touch(&digest)).await {
            Some(found) if found == size => Ok(()),
            Some(found) => Err(ImageError::Size {
                digest,
                said: size,
                found,
            }),
            None => Err(BlobError::Absent(digest).into()),
        }
    }

    /// The blob is on this manager when this returns.
    pub async fn ensure(&self, digest: Digest) -> Result<(), BlobError> {
        let store = self.store.clone();
        if blocking(move || store.touch(&digest)).await.is_some() {
            return Ok(());
        }
        let turn = self.turn(digest);
        let _turn = turn.lock().await;
        let store = self.store.clone();
        if blocking(move || store.touch(&digest)).await.is_some() {
            return Ok(());
        }
        for (member, channel) in self.peers.others() {
            match tokio::time::timeout(TRANSFER, transfer::take(&self.store, digest, channel)).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => {
                    tracing::debug!(%digest, %member, error = %error.message(), "blob not taken from peer")
                }
                Err(_) => tracing::warn!(%digest, %member, "blob not taken from peer in time"),
            }
        }
        Err(BlobError::Absent(digest))
    }

    fn turn(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut pulls = self.pulls.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = pulls.get(&digest).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(tokio::sync::Mutex::new(()));
        pulls.insert(digest, Arc::downgrade(&turn));
        turn
    }

    /// A majority of the managers holds these blobs when this returns. All of them must be here.
    pub async fn replicate(&self, blobs: &[(Digest, u64)]) -> Result<(), NoMajority> {
        let others = self.peers.others();
        let managers = others.len() + 1;
        let needed = managers / 2 + 1;
        let mut holding = 1;
        let mut copies: FuturesUnordered<_> = others
            .into_iter()
            .map(|(member, channel)| async move { (member, self.copy(blobs, channel).await) })
            .collect();
        // Whoever is still under way when the majority stands is given up: it pulls what it needs.
        while holding < needed {
            match copies.next().await {
                Some((_, Ok(()))) => holding += 1,
                Some((member, Err(error))) => {
                    tracing::warn!(%member, error = %error.message(), "image not copied to peer");
                }
                None => {
                    return Err(NoMajority {
                        holding,
                        managers,
                        needed,
                    });
                }
            }
        }
        Ok(())
    }

    async fn copy(&self, blobs: &[(Digest, u64)], channel: Channel) -> Result<(), Status> {
        let mut peer = PeerClient::new(channel);
        let digests = blobs
            .iter()
            .map(|(digest, _)| digest.as_bytes().to_vec())
            .collect();
        let mut question = Request::new(HasBlobRequest { digests });
        question.set_timeout(ANSWER);
        let answer = tokio::time::timeout(ANSWER, peer.has_blob(question)).await;
        let has = answer
            .map_err(|_| Status::deadline_exceeded("no answer in time"))??
            .into_inner()
            .has;
        for ((digest, size), has) in blobs.iter().zip(has.into_iter().chain(std::iter::repeat(false))) {
            if has {
                continue;
            }
            let chunks = transfer::chunks(&self.store, *digest, 0)
                .await
                .map_err(|error| status(&error))?;
            let header = OfferBlobRequest {
                message: Some(offer_blob_request::Message::Header(OfferHeader {
                    digest: digest.as_bytes().to_vec(),
                    size: *size,
                })),
            };
            // A chunk that cannot be read ends the stream early, and the receiver refuses what is incomplete.
            let data = chunks
                .take_while(|chunk| futures::future::ready(chunk.is_ok()))
                .filter_map(|chunk| {
                    futures::future::ready(chunk.ok().map(|data| OfferBlobRequest {
                        message: Some(offer_blob_request::Message::Data(data)),
                    }))
                });
            let parts = futures::stream::iter([header]).chain(data);
            tokio::time::timeout(TRANSFER, peer.offer_blob(parts))
                .await
                .map_err(|_| Status::deadline_exceeded("the copy took too long"))??;
        }
        Ok(())
    }
}

/// Runs what blocks beside the runtime's own threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match bulkhead_identity::seam::blocking(work).await {
        Ok(value) => value,
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that shuts down cancels it, and then nobody waits for the answer.
            Err(_) => futures::future::pending().await,
        },
    }
}

/// A digest of a request.
pub fn digest(bytes: &[u8]) -> Result<Digest, Status> {
    let array = bytes.try_into().map_err(|_| {
        refuse(
            Code::Invalid,
            tonic::Code::InvalidArgument,
            format!("a digest has 32 bytes, this one {}", bytes.len()),
            "send the SHA-256 of the blob",
        )
    })?;
    Ok(Digest::from_bytes(array))
}

fn over_limit(message: String) -> Status {
    refuse(
        Code::OverLimit,
        tonic::Code::InvalidArgument,
        message,
        "make it smaller, or split it",
    )
}

/// What a caller learns about a blob that could not be stored or read.
pub fn status(error: &BlobError) -> Status {
    match error {
        BlobError::Absent(digest) => refuse(
            Code::NotFound,
            tonic::Code::NotFound,
            format!("no manager that can be reached has {digest}"),
            "push the image again with `bulkhead image load`",
        ),
        BlobError::TooLarge { .. } => over_limit(error.to_string()),
        BlobError::Damaged(_) => refuse(
            Code::DamagedBlob,
            tonic::Code::DataLoss,
            error.to_string(),
            "send the image again; if it stays so, its source is damaged",
        ),
        BlobError::Offset(_) => refuse(
            Code::Invalid,
            tonic::Code::OutOfRange,
            error.to_string(),
            "fetch the blob from its start",
        ),
        BlobError::Full { .. } => refuse(
            Code::StorageFull,
            tonic::Code::ResourceExhausted,
            error.to_string(),
            "free disk space on the managers, or remove images with `bulkhead image rm`",
        ),
        BlobError::Disk { .. } => crate::refusal::internal("could not use its blob store", error),
    }
}

#[cfg(test)]
mod tests;
