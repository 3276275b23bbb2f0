//! The background work of a manager, with an owner: each piece has a name and a stop path, and one that ends early is
//! heard of.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long pieces may take to end once they were asked to.
const DRAIN: Duration = Duration::from_secs(5);

/// Spawned work that ends together.
#[derive(Debug)]
pub(super) struct Tasks {
    stop: CancellationToken,
    running: JoinSet<&'static str>,
}

impl Tasks {
    /// No work yet; `stop` ends what will be spawned.
    pub(super) fn new(stop: CancellationToken) -> Self {
        Tasks {
            stop,
            running: JoinSet::new(),
        }
    }

    /// What ends this work.
    pub(super) fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Starts a piece, which runs until the stop is asked for.
    pub(super) fn spawn(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.running.spawn(async move {
            work.await;
            name
        });
    }

    /// Waits for a piece that ended although nobody asked it to; its name, or what it panicked with.
    pub(super) async fn ended_early(&mut self) -> String {
        match self.running.join_next().await {
            Some(Ok(name)) => name.to_owned(),
            Some(Err(error)) => error.to_string(),
            None => std::future::pending().await, // nothing runs, nothing can end
        }
    }

    /// Ends everything and waits for it, at most 5 s; what is left is cut off.
    pub(super) async fn end(mut self) {
        self.stop.cancel();
        let all = async { while self.running.join_next().await.is_some() {} };
        if timeout(DRAIN, all).await.is_err() {
            tracing::warn!("background work did not end in time");
        }
        self.running.shutdown().await;
    }
}
