//! The world that the programs of a run live in: turmoil's network and time, seeded random bytes, and local sockets in
//! memory.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_identity::seam::{Clock, Entropy as _};
use bulkhead_identity::simulated::{Accept, Io, World as Simulated};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use turmoil::net::{TcpListener, TcpStream};

use crate::sim::dice::Dice;

/// When every run begins, in milliseconds since 1970: certificates are made and judged by simulated time alone.
pub(super) const EPOCH_MS: u64 = 1_767_225_600_000;
/// Bytes of a local socket that nobody has read yet.
const LOCAL_BYTES: usize = 64 << 10;
/// Connections of a local socket that nobody has taken yet.
const BACKLOG: usize = 16;

/// Private keys, PKCS#8, one after the other. They are for simulations, and of no use to anybody: everybody has them. Ids
/// follow from keys, and what happens in a run from ids.
const KEYS: &[u8] = include_bytes!("keys.bin");
const KEY_BYTES: usize = 138;

/// One world, for one run, on one thread.
pub(super) struct World {
    entropy: Dice,
    /// Keys that were given out.
    keys: Cell<usize>,
    local: RefCell<BTreeMap<PathBuf, mpsc::Sender<Box<dyn Io>>>>,
}

impl World {
    pub(super) fn new(entropy: Dice) -> Self {
        Self {
            entropy,
            keys: Cell::new(0),
            local: RefCell::default(),
        }
    }
}

impl Simulated for World {
    fn bind(&self, at: &str) -> BoxFuture<'static, io::Result<Box<dyn Accept>>> {
        let at = at.parse::<SocketAddr>();
        async move {
            let at = at.map_err(io::Error::other)?;
            let door: Box<dyn Accept> = Box::new(Door(TcpListener::bind(at).await?));
            Ok(door)
        }
        .boxed()
    }

    fn connect(&self, to: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Io>>> {
        async move {
            let stream: Box<dyn Io> = Box::new(TcpStream::connect(to).await?);
            Ok(stream)
        }
        .boxed()
    }

    fn listen_local(&self, path: &Path) -> io::Result<mpsc::Receiver<Box<dyn Io>>> {
        let (connections, waiting) = mpsc::channel(BACKLOG);
        self.local.borrow_mut().insert(path.to_owned(), connections);
        Ok(waiting)
    }

    fn connect_local(&self, path: &Path) -> io::Result<Box<dyn Io>> {
        let local = self.local.borrow();
        let listener = local.get(path).ok_or(io::ErrorKind::NotFound)?;
        let (near, far) = tokio::io::duplex(LOCAL_BYTES);
        listener
            .try_send(Box::new(far))
            .map_err(|_| io::ErrorKind::ConnectionRefused)?;
        Ok(Box::new(near))
    }

    fn wall_millis(&self) -> u64 {
        SimClock.wall_millis()
    }

    fn fill(&self, buffer: &mut [u8]) {
        // Dice never fail.
        let _filled = self.entropy.fill(buffer);
    }

    fn key(&self) -> Option<Vec<u8>> {
        let number = self.keys.get();
        self.keys.set(number + 1);
        KEYS.chunks_exact(KEY_BYTES).nth(number).map(<[u8]>::to_vec)
    }
}

struct Door(TcpListener);

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Door")
    }
}

impl Accept for Door {
    fn accept(&self) -> BoxFuture<'_, io::Result<(Box<dyn Io>, SocketAddr)>> {
        async {
            let (stream, from) = self.0.accept().await?;
            let stream: Box<dyn Io> = Box::new(stream);
            Ok((stream, from))
        }
        .boxed()
    }
}

thread_local! {
    /// Simulated time that passed, in microseconds, where no host runs: between two steps, and while one is taken down.
    static PASSED_US: AtomicU64 = const { AtomicU64::new(0) };
}

/// Says how much simulated time has passed, from outside of all hosts.
pub(super) fn has_passed(time: Duration) {
    let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    PASSED_US.with(|passed| passed.store(us, Ordering::Relaxed));
}

/// Simulated time since the run began.
pub(super) fn passed() -> Duration {
    let outside = PASSED_US.with(|passed| Duration::from_micros(passed.load(Ordering::Relaxed)));
    outside.max(turmoil::sim_elapsed().unwrap_or_default())
}

/// The clocks of every machine: right, and the same everywhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct SimClock;

impl Clock for SimClock {
    fn wall_millis(&self) -> u64 {
        EPOCH_MS + u64::try_from(passed().as_millis()).unwrap_or(u64::MAX - EPOCH_MS)
    }

    fn monotonic(&self) -> Duration {
        passed()
    }
}
