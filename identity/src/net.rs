//! How every program reaches others and is reached: one TCP connection, one listener, one stream of the local socket.
//!
//! In a program these are the system's. With the feature `simulated` a simulation may put its own network in their place,
//! for its own thread ([`crate::simulated`]); no program turns that feature on.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};

#[cfg(feature = "simulated")]
use crate::simulated;

/// A connection, over TCP or on the local socket.
#[derive(Debug)]
pub struct Stream(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(TcpStream),
    Local(UnixStream),
    #[cfg(feature = "simulated")]
    Simulated(Box<dyn simulated::Io>),
}

impl Stream {
    /// Connects. Small messages are not held back.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) async fn connect(to: SocketAddr) -> io::Result<Self> {
        #[cfg(feature = "simulated")]
        if let Some(connected) = simulated::world().map(|world| world.connect(to)) {
            return Ok(Self(Kind::Simulated(connected.await?)));
        }
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(Self(Kind::Tcp(stream)))
    }

    /// A stream of the local socket.
    pub(crate) fn local(stream: UnixStream) -> Self {
        Self(Kind::Local(stream))
    }

    /// A stream of a simulated network.
    #[cfg(feature = "simulated")]
    pub(crate) fn simulated(stream: Box<dyn simulated::Io>) -> Self {
        Self(Kind::Simulated(stream))
    }

    fn inner(self: Pin<&mut Self>) -> Pin<&mut dyn Both> {
        match &mut self.get_mut().0 {
            Kind::Tcp(stream) => Pin::new(stream),
            Kind::Local(stream) => Pin::new(stream),
            #[cfg(feature = "simulated")]
            Kind::Simulated(stream) => Pin::new(stream),
        }
    }
}

trait Both: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Both for S {}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.inner().poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.inner().poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.inner().poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.0 {
            Kind::Tcp(stream) => stream.is_write_vectored(),
            Kind::Local(stream) => stream.is_write_vectored(),
            #[cfg(feature = "simulated")]
            Kind::Simulated(_) => false,
        }
    }
}

/// Where a manager is reached.
#[derive(Debug)]
pub struct Listener(Door);

#[derive(Debug)]
enum Door {
    Tcp(TcpListener),
    #[cfg(feature = "simulated")]
    Simulated(Box<dyn simulated::Accept>),
}

impl Listener {
    /// Listens at `IP:PORT`.
    ///
    /// # Errors
    /// What the system says.
    pub async fn bind(address: &str) -> io::Result<Self> {
        #[cfg(feature = "simulated")]
        if let Some(bound) = simulated::world().map(|world| world.bind(address)) {
            return Ok(Self(Door::Simulated(bound.await?)));
        }
        Ok(Self(Door::Tcp(TcpListener::bind(address).await?)))
    }

    /// The next connection. Cancel-safe: dropped before it is there, nothing is lost.
    pub(crate) async fn accept(&self) -> io::Result<(Stream, SocketAddr)> {
        match &self.0 {
            Door::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok((Stream(Kind::Tcp(stream)), from))
            }
            #[cfg(feature = "simulated")]
            Door::Simulated(listener) => {
                let (stream, from) = listener.accept().await?;
                Ok((Stream(Kind::Simulated(stream)), from))
            }
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self(Door::Tcp(listener))
    }
}
