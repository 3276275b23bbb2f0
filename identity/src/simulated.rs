//! A world in place of the system's, for simulations: who runs one puts it up for its own thread, and everything there
//! connects, listens, reads the time, draws random bytes and makes keys in it.
//!
//! It is for what no value is handed down to: sockets, TLS, keys and the random source. What is handed down, like a program's
//! clock, is the simulation's to hand down. Behind a feature that no program turns on: one that is built without it has
//! no such door. What TLS itself draws comes from the system all the same.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

/// A stream of the simulated network.
pub trait Io: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Io for S {}

/// A listener of the simulated network.
pub trait Accept: fmt::Debug + Send + Sync {
    /// The next connection, and where it comes from. Cancel-safe.
    fn accept(&self) -> BoxFuture<'_, io::Result<(Box<dyn Io>, SocketAddr)>>;
}

/// What a simulation puts in the system's place.
pub trait World {
    /// Listens at `IP:PORT`, as whichever machine runs now.
    fn bind(&self, at: &str) -> BoxFuture<'static, io::Result<Box<dyn Accept>>>;
    /// Connects, as whichever machine runs now.
    fn connect(&self, to: SocketAddr) -> BoxFuture<'static, io::Result<Box<dyn Io>>>;
    /// Listens on a local socket.
    fn listen_local(&self, path: &Path) -> io::Result<mpsc::Receiver<Box<dyn Io>>>;
    /// Connects to a local socket.
    fn connect_local(&self, path: &Path) -> io::Result<Box<dyn Io>>;
    /// Milliseconds since 1970.
    fn wall_millis(&self) -> u64;
    /// Random bytes, which need not be fit for keys.
    fn fill(&self, buffer: &mut [u8]);
    /// The next private key, PKCS#8; one that nobody knows where there is none. What follows from keys, like the ids of nodes,
    /// is then the simulation's to say.
    fn key(&self) -> Option<Vec<u8>>;
}

thread_local! {
    static WORLD: RefCell<Option<Rc<dyn World>>> = const { RefCell::new(None) };
}

/// Takes the world down again when it is dropped.
#[derive(Debug)]
#[must_use = "the world is taken down when this is dropped"]
pub struct Up(());

/// Puts a world up for this thread.
pub fn put_up(world: Rc<dyn World>) -> Up {
    WORLD.set(Some(world));
    Up(())
}

impl Drop for Up {
    fn drop(&mut self) {
        WORLD.take();
    }
}

/// The world of this thread, if one is up.
pub(crate) fn world() -> Option<Rc<dyn World>> {
    WORLD.with_borrow(Clone::clone)
}
