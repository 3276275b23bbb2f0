//! Which workers have their stream with this manager, and the logs that are asked of them.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bulkhead_proto::NodeId;
use bulkhead_proto::wire::{
    Kind, LogCancel, LogRequest, LogUp, Role, event, object::Object as Any, session_down::Message as Down,
};
use bulkhead_raft::Replica;
use futures::Stream;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

/// Parts of a log that wait for their reader. A slow reader slows the worker's sending, nothing else.
const PARTS: usize = 8;
/// Messages beside assignments that wait for a session.
const ASIDE: usize = 64;
/// Logs read through this manager at once.
const LOGS: usize = 1_024;

/// The sessions of this manager. Clones share them.
#[derive(Clone, Default)]
pub struct Sessions(Arc<Inner>);

#[derive(Default)]
struct Inner {
    next: AtomicU64,
    open: Mutex<BTreeMap<NodeId, Handle>>,
    logs: Mutex<BTreeMap<u64, Log>>,
}

struct Handle {
    number: u64,
    wake: Arc<Notify>,
    aside: mpsc::Sender<Down>,
    replaced: CancellationToken,
}

struct Log {
    node: NodeId,
    parts: mpsc::Sender<LogUp>,
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions")
            .field("open", &self.open().len())
            .finish_non_exhaustive()
    }
}

/// A session's end of its entry; dropping it takes the entry away.
pub(super) struct Entry {
    sessions: Sessions,
    node: NodeId,
    number: u64,
    pub(super) wake: Arc<Notify>,
    pub(super) aside: mpsc::Receiver<Down>,
    pub(super) replaced: CancellationToken,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = self.sessions.open();
        if open.get(&self.node).is_some_and(|it| it.number == self.number) {
            open.remove(&self.node);
            drop(open);
            // Nobody will answer these any more.
            self.sessions.logs_map().retain(|_, log| log.node != self.node);
        }
    }
}

impl Sessions {
    /// Enters a worker. Its former session ends: a worker keeps one stream.
    pub(super) fn enter(&self, node: NodeId) -> Entry {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (sender, aside) = mpsc::channel(ASIDE);
        let (wake, replaced) = (Arc::new(Notify::new()), CancellationToken::new());
        let handle = Handle {
            number,
            wake: wake.clone(),
            aside: sender,
            replaced: replaced.clone(),
        };
        if let Some(former) = self.open().insert(node, handle) {
            former.replaced.cancel();
        }
        Entry {
            sessions: self.clone(),
            node,
            number,
            wake,
            aside,
            replaced,
        }
    }

    /// Whether the worker's stream ends here.
    pub fn has(&self, node: NodeId) -> bool {
        self.open().contains_key(&node)
    }

    /// Asks a worker for a task's log. Nothing where its stream does not end here, or too much is asked. The request's
    /// stream number is chosen here. Dropping what is returned tells the worker that nobody reads.
    pub fn logs(&self, node: NodeId, request: LogRequest) -> Option<LogParts> {
        let stream = self.0.next.fetch_add(1, Ordering::Relaxed);
        let (sender, parts) = mpsc::channel(PARTS);
        {
            let mut logs = self.logs_map();
            if logs.len() >= LOGS {
                return None;
            }
            logs.insert(stream, Log { node, parts: sender });
        }
        // From here on, dropping it cleans up.
        let parts = LogParts {
            sessions: self.clone(),
            node,
            stream,
            parts,
        };
        let asked = Down::Logs(LogRequest { stream, ..request });
        let sent = self
            .open()
            .get(&node)
            .is_some_and(|it| it.aside.try_send(asked).is_ok());
        sent.then_some(parts)
    }

    /// Where a worker's answer goes, if it was asked for this stream.
    pub(super) fn answered(&self, node: NodeId, stream: u64) -> Option<mpsc::Sender<LogUp>> {
        let logs = self.logs_map();
        let log = logs.get(&stream).filter(|it| it.node == node)?;
        Some(log.parts.clone())
    }

    /// The answer is complete: the reader sees its end.
    pub(super) fn ended(&self, stream: u64) {
        self.logs_map().remove(&stream);
    }

    /// Wakes the sessions whose worker a commit concerns.
    pub async fn run(&self, replica: Replica, stop: CancellationToken) {
        let mut applied = replica.applied();
        let mut seen = replica.index();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
            let index = *applied.borrow_and_update();
            let events = replica.events_since(seen);
            seen = index;
            let open = self.open();
            let everyone = || open.values().for_each(|it| it.wake.notify_one());
            let Ok(events) = events else {
                everyone();
                continue;
            };
            for event in events {
                match &event.change {
                    Some(event::Change::Put(object)) => match &object.object {
                        Some(Any::Task(task)) => {
                            let node = NodeId::try_from(task.node_id.as_slice());
                            if let Some(it) = node.ok().and_then(|node| open.get(&node)) {
                                it.wake.notify_one();
                            }
                        }
                        Some(Any::Node(node)) if node.role() == Role::Manager => everyone(),
                        _ => {}
                    },
                    // It no longer says whose it was.
                    Some(event::Change::Deleted(gone)) if matches!(gone.kind(), Kind::Task | Kind::Node) => {
                        everyone()
                    }
                    Some(event::Change::Deleted(_)) | None => {}
                }
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<NodeId, Handle>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn logs_map(&self) -> MutexGuard<'_, BTreeMap<u64, Log>> {
        self.0.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parts of a task's log, as its worker sends them.
pub struct LogParts {
    sessions: Sessions,
    node: NodeId,
    stream: u64,
    parts: mpsc::Receiver<LogUp>,
}

impl fmt::Debug for LogParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogParts")
            .field("node", &self.node)
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

impl Stream for LogParts {
    type Item = LogUp;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<LogUp>> {
        self.parts.poll_recv(cx)
    }
}

impl Drop for LogParts {
    fn drop(&mut self) {
        self.sessions.ended(self.stream);
        let cancel = Down::LogCancel(LogCancel { stream: self.stream });
        if let Some(it) = self.sessions.open().get(&self.node) {
            // No room: the worker notices at its next part that nobody takes it.
            let _ = it.aside.try_send(cancel);
        }
    }
}
