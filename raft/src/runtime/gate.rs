//! A gate in front of a replica's tasks: while it is closed none of them runs and time goes by, as under SIGSTOP. Only
//! simulations have one.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::task::JoinHandle;

tokio::task_local! {
    static GATE: Gate;
}

/// Open at first. Clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    closed: bool,
    /// Who came while it was closed, in order.
    waiting: Vec<Waker>,
}

impl Gate {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nothing behind it runs.
    pub fn close(&self) {
        self.inner().closed = true;
    }

    /// Everything behind it goes on.
    pub fn open(&self) {
        let mut inner = self.inner();
        inner.closed = false;
        let waiting = std::mem::take(&mut inner.waiting);
        drop(inner);
        for waker in waiting {
            waker.wake();
        }
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.inner().closed
    }

    fn admits(&self, context: &Context<'_>) -> bool {
        let mut inner = self.inner();
        if inner.closed && !inner.waiting.iter().any(|it| it.will_wake(context.waker())) {
            inner.waiting.push(context.waker().clone());
        }
        !inner.closed
    }

    /// Waits until it is open.
    pub async fn passes(self) {
        poll_fn(|context| match self.admits(context) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Runs a future, and every task that consensus spawns from it, behind this gate.
    pub async fn hold<F: Future>(self, future: F) -> F::Output {
        let mut future = pin!(GATE.scope(self.clone(), future));
        poll_fn(|context| match self.admits(context) {
            true => future.as_mut().poll(context),
            false => Poll::Pending,
        })
        .await
    }
}

/// Spawns a task behind the gate of the one that spawns it, if there is one.
pub(crate) fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match GATE.try_with(Gate::clone) {
        Ok(gate) => tokio::spawn(gate.hold(future)),
        Err(_) => tokio::spawn(future), // in production
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, sleep, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nothing_behind_a_closed_gate_runs_and_its_timers_see_the_time_that_went_by() {
        let gate = Gate::default();
        let start = Instant::now();
        let held = gate.clone().hold(async move {
            let below = spawn(async move {
                sleep(Duration::from_secs(1)).await;
                start.elapsed()
            });
            below.await.expect("no panic")
        });
        let held = tokio::spawn(held);
        tokio::task::yield_now().await;
        gate.close();
        sleep(Duration::from_secs(5)).await;
        assert!(gate.is_closed() && !held.is_finished());
        let passes = timeout(Duration::from_secs(1), gate.clone().passes());
        assert!(passes.await.is_err());
        gate.open();
        gate.passes().await;
        assert_eq!(held.await.expect("no panic"), Duration::from_secs(6));
    }

    #[tokio::test]
    async fn without_a_gate_a_task_is_an_ordinary_one() {
        assert_eq!(spawn(async { 7 }).await.expect("no panic"), 7);
    }
}
