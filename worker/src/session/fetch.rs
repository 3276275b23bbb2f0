//! Blobs from the manager that the session is with.

use super::Connected;
use crate::agent::{Fetch, Layer};
use crate::image::Ingest;
use bulkhead_proto::{limits, wire};
use std::io;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use wire::dispatcher_client::DispatcherClient;

/// Blobs that come at once. More would only share the same disk and network.
const AT_ONCE: usize = 4;
/// A manager that sends nothing of a blob for this long has lost it or its network.
const SILENCE: Duration = Duration::from_secs(10);
/// How long to wait for a session: after that the agent is told, and says so.
const SESSION: Duration = Duration::from_secs(30);
/// Attempts in a row that bring nothing.
const VAIN: usize = 3;
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(250);

/// Fetches over the present session's connection, and goes on where a broken transfer ended.
#[derive(Debug)]
pub struct ManagerFetch {
    connected: watch::Receiver<Option<Connected>>,
    room: Semaphore,
}

impl ManagerFetch {
    /// Follows this session.
    pub fn new(connected: watch::Receiver<Option<Connected>>) -> Self {
        ManagerFetch {
            connected,
            room: Semaphore::new(AT_ONCE),
        }
    }

    /// One attempt. What was received stays in `ingest`; an error of kind `InvalidData` is final.
    async fn part(&self, layer: Layer, ingest: &mut Ingest) -> io::Result<()> {
        let mut connected = self.connected.clone();
        let channel = timeout(SESSION, connected.wait_for(Option::is_some))
            .await
            .map_err(|_| io::Error::other("there is no session with a manager"))?
            .map_err(io::Error::other)?
            .as_ref()
            .map(|connected| connected.channel.clone())
            .ok_or(io::ErrorKind::NotConnected)?;
        let request = wire::FetchBlobRequest {
            digest: layer.blob.as_bytes().to_vec(),
            offset: ingest.written(),
        };
        let mut client =
            DispatcherClient::new(channel).max_decoding_message_size(limits::CHUNK_BYTES + 1_024);
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let mut chunks = timeout(SILENCE, client.fetch_blob(request))
            .await
            .map_err(late)?
            .map_err(io::Error::other)?
            .into_inner();
        loop {
            let chunk = timeout(SILENCE, chunks.message()).await.map_err(late)?;
            match chunk.map_err(io::Error::other)? {
                Some(chunk) => ingest
                    .write(&chunk.data)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?,
                None => return Ok(()),
            }
        }
    }
}

impl Fetch for ManagerFetch {
    async fn fetch(&self, layer: Layer, mut ingest: Ingest) -> io::Result<Ingest> {
        let _room = self.room.acquire().await.map_err(io::Error::other)?;
        let mut vain = 0;
        while ingest.written() < layer.size {
            let before = ingest.written();
            let part = self.part(layer, &mut ingest).await;
            let error = match part {
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return Err(error),
                Err(error) => error,
                Ok(()) => io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the manager sent too little of the blob",
                ),
            };
            if ingest.written() >= layer.size {
                break;
            }
            vain = if ingest.written() > before { 0 } else { vain + 1 };
            if vain == VAIN {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(ingest)
    }
}
