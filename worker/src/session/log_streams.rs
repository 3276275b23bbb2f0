//! Log requests that came down the session: each is answered on a stream of its own that this worker opens.

use super::budget::Budget;
use crate::logs::{self, Query};
use crate::runtime::Runtime;
use bulkhead_launcher::message::TaskId as LaunchId;
use bulkhead_proto::{TaskId, limits, wire};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use wire::dispatcher_client::DispatcherClient;

/// Log streams of one node at once.
const STREAMS: usize = 64;
/// Parts that wait to be sent. A follower that does not read stops the reading of the file, not the task.
const PARTS: usize = 2;

/// The log streams of one session; dropping it ends them.
#[derive(Debug)]
pub(super) struct LogStreams {
    runtime: Runtime,
    channel: Channel,
    budget: Arc<Budget>,
    open: BTreeMap<u64, AbortHandle>,
    running: JoinSet<u64>,
}

impl LogStreams {
    /// None yet.
    pub(super) fn new(runtime: Runtime, channel: Channel) -> Self {
        LogStreams {
            runtime,
            channel,
            budget: Arc::new(Budget::new()),
            open: BTreeMap::new(),
            running: JoinSet::new(),
        }
    }

    /// Begins to answer a request. The manager's number names the stream; a number that is in use is ignored.
    pub(super) fn begin(&mut self, request: wire::LogRequest) {
        while let Some(ended) = self.running.try_join_next() {
            self.ended(ended.ok());
        }
        let stream = request.stream;
        if self.open.contains_key(&stream) {
            return;
        }
        let query = match self.open.len() {
            STREAMS.. => Err(format!("this node already sends {STREAMS} logs; try again later")),
            _ => checked(&request),
        };
        let (runtime, budget) = (self.runtime.clone(), self.budget.clone());
        let client = DispatcherClient::new(self.channel.clone());
        let handle = self.running.spawn(async move {
            if let Err(error) = push(stream, query, &runtime, &budget, client).await {
                tracing::debug!(stream, %error, "a log stream ended early");
            }
            stream
        });
        self.open.insert(stream, handle);
    }

    /// Nobody reads this stream any more.
    pub(super) fn cancel(&mut self, stream: u64) {
        if let Some(handle) = self.open.remove(&stream) {
            handle.abort();
        }
    }

    fn ended(&mut self, stream: Option<u64>) {
        if let Some(stream) = stream {
            self.open.remove(&stream);
        }
    }
}

type Checked = Result<(TaskId, Query), String>;

fn checked(request: &wire::LogRequest) -> Checked {
    let task = TaskId::try_from(request.task_id.as_slice()).map_err(|error| error.to_string())?;
    let query = Query {
        tail: request.tail,
        since_ms: request.since,
        follow: request.follow,
    };
    Ok((task, query))
}

async fn push(
    stream: u64,
    query: Checked,
    runtime: &Runtime,
    budget: &Budget,
    mut client: DispatcherClient<Channel>,
) -> Result<(), tonic::Status> {
    let (up, parts) = mpsc::channel(PARTS);
    let read = async move {
        // The first message names the stream, so that the manager knows even of an empty log that it ended.
        let said = |lines, error| wire::LogUp { stream, lines, error };
        if up.send(said(Vec::new(), String::new())).await.is_err() {
            return;
        }
        let read = match query {
            Ok((task, query)) => send_lines(task, query, runtime, budget, &up, &said).await,
            Err(reason) => Err(reason),
        };
        if let Err(reason) = read {
            drop(up.send(said(Vec::new(), reason)).await); // whoever asked may have left
        }
    };
    // The answer comes once `read` has dropped its end, or earlier when nobody listens.
    let (answer, ()) = tokio::join!(client.push_logs(ReceiverStream::new(parts)), read);
    answer.map(drop)
}

async fn send_lines(
    task: TaskId,
    query: Query,
    runtime: &Runtime,
    budget: &Budget,
    up: &mpsc::Sender<wire::LogUp>,
    said: &impl Fn(Vec<wire::LogLine>, String) -> wire::LogUp,
) -> Result<(), String> {
    let launched = LaunchId::try_from(task.to_string()).map_err(|error| error.to_string())?;
    let (to, mut lines) = mpsc::channel::<Vec<logs::Line>>(PARTS);
    let forward = async move {
        loop {
            let part = tokio::select! {
                biased;
                () = up.closed() => return, // dropping `lines` ends the reading
                part = lines.recv() => part,
            };
            let Some(part) = part else { return };
            let part: Vec<wire::LogLine> = part.into_iter().map(|line| line.to_wire(task)).collect();
            budget
                .take(part.iter().map(|line| line.text.len() + 32).sum())
                .await;
            if up.send(said(part, String::new())).await.is_err() {
                return;
            }
        }
    };
    let (read, ()) = tokio::join!(logs::send(runtime, launched, query, to), forward);
    read.map_err(|error| error.to_string())
}

const _: () = assert!(
    limits::CHUNK_BYTES * 2 < limits::MESSAGE_BYTES,
    "a part of a log fits a message"
);
