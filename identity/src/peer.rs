//! What a connection proved about the other end: the request extension that authorisation reads.

use std::net::SocketAddr;
use std::sync::Arc;

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
}
