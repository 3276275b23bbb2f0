//! What a connection proved about the other end: the request extension that authorisation reads.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use crate::Certificate;

/// Who the other end is, as far as the handshake proved it. Whether that key may still do anything is for the
/// committed state to say.
#[derive(Debug, Clone)]
pub enum Peer {
    /// It gave no certificate.
    Anonymous,
    /// It holds the key of this certificate, which chains to the bundle and fits the profile.
    Node(Arc<Certificate>),
    /// A process of this machine, over the local socket.
    Local {
        /// Its user, as the kernel says.
        uid: u32,
    },
}

/// The extension of every request: `request.extensions().get::<ConnectInfo>()`.
#[derive(Debug, Clone)]
pub struct ConnectInfo {
    /// Who it is.
    pub peer: Peer,
    /// Where it connected from; none on the local socket.
    pub address: Option<SocketAddr>,
    /// When it connected, milliseconds since 1970; 0 on the local socket.
    pub opened_ms: i64,
}

/// A stream together with what it proved: what tonic serves.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    info: ConnectInfo,
}

impl<S> Connection<S> {
    pub(crate) fn new(stream: S, info: ConnectInfo) -> Self {
        Self { stream, info }
    }
}

impl<S> Connected for Connection<S> {
    type ConnectInfo = ConnectInfo;

    fn connect_info(&self) -> ConnectInfo {
        self.info.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
