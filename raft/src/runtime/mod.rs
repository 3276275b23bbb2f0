//! The async runtime under consensus: tokio, with random numbers that a simulation can seed.
//!
//! Consensus draws only election timeouts. Each replica's tasks run in a scope with its own seed ([`seeded`]): drawn
//! from the entropy seam in production, derived from the run's seed in a simulation, so that a run can be repeated.

mod gate;
pub mod watch;

use std::cell::Cell;
use std::future::Future;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::time::Duration;

use openraft::AsyncRuntime;
use openraft::impls::TokioRuntime;
use openraft_rand::{SeedableRng as _, rngs::SmallRng};

pub use gate::Gate;
pub(crate) use gate::spawn;

tokio::task_local! {
    static SEED: Cell<u64>;
}

/// Runs a future whose random numbers, and those of all tasks that it spawns, follow from this seed.
pub fn seeded<F: Future>(seed: u64, future: F) -> impl Future<Output = F::Output> {
    SEED.scope(Cell::new(seed), future)
}

/// The next number of this scope; outside of any, one that is different each time.
fn draw() -> u64 {
    SEED.try_with(|seed| {
        let drawn = seed.get();
        seed.set(mix(drawn, 0x6a09_e667_f3bc_c908));
        drawn
    })
    .unwrap_or_else(|_| RandomState::new().build_hasher().finish())
}

/// SplitMix64's output function: a bijection, so seeds do not collide.
fn mix(seed: u64, gamma: u64) -> u64 {
    let z = seed.wrapping_add(gamma);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Tokio, with seeded random numbers and watches that wake in order. Everything else is openraft's own binding.
#[derive(Debug)]
pub struct Runtime(TokioRuntime);

impl AsyncRuntime for Runtime {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: Send + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = <TokioRuntime as AsyncRuntime>::Instant;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + Send> = <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = SmallRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = watch::OrderedWatch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: Send + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + Send + 'static,
        T::Output: Send + 'static,
    {
        spawn(seeded(mix(draw(), 0x9e37_79b9_7f4a_7c15), future))
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        TokioRuntime::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + Send>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + Send>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }

    fn thread_rng() -> SmallRng {
        SmallRng::seed_from_u64(draw())
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }

    async fn spawn_blocking<F, T>(f: F) -> Result<T, io::Error>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        tokio::task::spawn_blocking(f).await.map_err(io::Error::other)
    }
}

/// Where blocking work (a snapshot's file) is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Blocking {
    /// On tokio's blocking threads.
    #[default]
    Threads,
    /// In the calling task: for simulations, whose order of events must not depend on threads.
    Inline,
}

impl Blocking {
    /// Runs blocking work to its end.
    ///
    /// # Errors
    /// The work's own, or that its thread died.
    pub async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        match self {
            Self::Inline => work(),
            Self::Threads => tokio::task::spawn_blocking(work)
                .await
                .map_err(io::Error::other)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use openraft_rand::Rng as _;

    use super::*;

    async fn draws() -> Vec<u64> {
        let child = Runtime::spawn(async { Runtime::thread_rng().next_u64() });
        let own = Runtime::thread_rng().next_u64();
        vec![
            own,
            child.await.expect("it does not panic"),
            Runtime::thread_rng().next_u64(),
        ]
    }

    #[tokio::test]
    async fn a_seed_decides_every_number_of_its_scope_and_the_tasks_below() {
        let first = seeded(7, draws()).await;
        assert_eq!(seeded(7, draws()).await, first);
        assert_ne!(seeded(8, draws()).await, first);
        assert!(
            first[0] != first[1] && first[1] != first[2] && first[0] != first[2],
            "{first:?}"
        );
        assert_ne!(draws().await, draws().await, "without a seed they differ");
    }
}
