//! Clients in a closed loop: each sends its next request when the last one was answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::try_join_all;
use serde::Serialize;
use tokio::time::{Instant, sleep};
use tonic::Code;

/// One kind of request over one connection. Clones share the connection.
pub(crate) trait Send1: Clone + Send + 'static {
    /// What is sent; sent again it is the same request.
    type Request: Clone + Send;

    /// A new request.
    fn next(&self) -> anyhow::Result<Self::Request>;

    /// Sends it and waits for its answer.
    fn send(&mut self, request: Self::Request) -> impl Future<Output = Result<(), tonic::Status>> + Send;
}

/// So many clients over so many connections, so many requests in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Load {
    pub(crate) clients: usize,
    pub(crate) connections: usize,
    pub(crate) requests: usize,
}

/// What came of one round.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) took: Duration,
    /// Of each request, what it took to send it again included.
    pub(crate) latencies: Vec<Duration>,
    /// How often one was sent again.
    pub(crate) retries: usize,
}

impl Round {
    pub(crate) fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64()
    }
}

/// A request that was put off is sent again after this.
const PAUSE: Duration = Duration::from_millis(5);
/// A request that is put off for longer ends the round.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs one round over connections that stand. What a server puts off is sent again, as any client would, and counted;
/// any other failure ends the round: a rate with failures in it means nothing.
pub(crate) async fn round<S: Send1>(connections: &[S], load: Load) -> anyhow::Result<Round> {
    let left = Arc::new(AtomicUsize::new(load.requests));
    let start = Instant::now();
    let clients = (0..load.clients).map(|at| {
        let sender = connections[at % load.connections].clone();
        tokio::spawn(client(sender, left.clone()))
    });
    let clients = try_join_all(clients).await?;
    let mut round = Round {
        took: start.elapsed(),
        latencies: Vec::with_capacity(load.requests),
        retries: 0,
    };
    for client in clients {
        let (latencies, retries) = client?;
        round.latencies.extend(latencies);
        round.retries += retries;
    }
    Ok(round)
}

async fn client<S: Send1>(mut sender: S, left: Arc<AtomicUsize>) -> anyhow::Result<(Vec<Duration>, usize)> {
    let (mut latencies, mut retries) = (Vec::new(), 0);
    // `checked_sub` fails at zero: then nothing is left.
    while left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
        .is_ok()
    {
        let request = sender.next()?;
        let start = Instant::now();
        while let Err(status) = sender.send(request.clone()).await {
            let put_off = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted);
            if !put_off || start.elapsed() > PATIENCE {
                return Err(status.into());
            }
            retries += 1;
            sleep(PAUSE).await;
        }
        latencies.push(start.elapsed());
    }
    Ok((latencies, retries))
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    /// Answers the n-th request that it gets, counted from 0, with this status.
    #[derive(Clone)]
    struct Count(Arc<AtomicUsize>, usize, Code);

    impl Send1 for Count {
        type Request = ();

        fn next(&self) -> anyhow::Result<()> {
            Ok(())
        }

        async fn send(&mut self, (): ()) -> Result<(), Status> {
            tokio::task::yield_now().await;
            match self.0.fetch_add(1, Ordering::Relaxed) {
                sent if sent == self.1 => Err(Status::new(self.2, "no")),
                _ => Ok(()),
            }
        }
    }

    #[tokio::test]
    async fn every_request_is_answered_once_and_a_failure_ends_the_round() {
        let load = Load {
            clients: 7,
            connections: 2,
            requests: 100,
        };
        for (code, ends) in [(Code::Unavailable, false), (Code::Aborted, true)] {
            let sent = Arc::new(AtomicUsize::new(0));
            let connections = [Count(sent.clone(), 50, code), Count(sent.clone(), 50, code)];
            let done = round(&connections, load).await;
            match done {
                Ok(done) => {
                    assert!(!ends, "{code:?}");
                    assert_eq!((done.latencies.len(), done.retries), (100, 1));
                    assert_eq!(sent.load(Ordering::Relaxed), 101);
                }
                Err(_) => assert!(ends, "{code:?}"),
            }
        }
    }
}
