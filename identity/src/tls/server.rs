//! The listening end: client certificates are optional, but one that is given must prove a node of this cluster.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bulkhead_proto::limits::{HANDSHAKE, HANDSHAKES};
use futures::Stream;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Duration, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::{ALPN_ENROL, ALPN_H2, presented, provider, server_builder};
use crate::bundle::VerifyError;
use crate::net::{Listener, Stream as NetStream};
use crate::peer::Connection;
use crate::seam::Clock;
use crate::{Bundle, Certificate, ConnectInfo, Credentials, Identity, Peer};

/// A connection whose handshake is done.
pub type TlsConnection = Connection<TlsStream<NetStream>>;

/// The connections that arrive, for `serve_with_incoming_shutdown`.
///
/// Handshakes run side by side, [`HANDSHAKES`] at most and [`HANDSHAKE`] long. When they are that many, the oldest is
/// given up for a new one: an honest one takes milliseconds, so that it is those who stall that pay. The stream yields
/// no errors and never ends.
pub fn incoming<L: Into<Listener>>(
    listener: L,
    identity: Identity,
    clock: Arc<dyn Clock>,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send + Unpin + use<L> {
    let door = Door {
        listener: listener.into(),
        identity,
        clock,
        handshakes: JoinSet::new(),
        oldest: VecDeque::new(),
    };
    Box::pin(futures::stream::unfold(door, |mut door| async {
        let connection = door.next().await;
        Some((Ok(connection), door))
    }))
}

struct Door {
    listener: Listener,
    identity: Identity,
    clock: Arc<dyn Clock>,
    handshakes: JoinSet<Option<TlsConnection>>,
    oldest: VecDeque<AbortHandle>,
}

impl Door {
    /// The next connection whose handshake succeeded.
    async fn next(&mut self) -> TlsConnection {
        loop {
            tokio::select! {
                biased;
                // Both branches lose nothing when dropped: `join_next` and `accept` are cancel-safe.
                Some(done) = self.handshakes.join_next() => {
                    if let Ok(Some(connection)) = done {
                        return connection;
                    }
                }
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, address)) => self.begin(stream, address),
                    Err(error) => {
                        // Of one connection (it is gone), or out of descriptors: then wait for some to close.
                        tracing::debug!(%error, "accept failed");
                        sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        }
    }

    fn begin(&mut self, stream: NetStream, address: SocketAddr) {
        self.oldest.retain(|handshake| !handshake.is_finished());
        if self.oldest.len() >= HANDSHAKES
            && let Some(oldest) = self.oldest.pop_front()
        {
            oldest.abort();
        }
        let config = self.identity.server_config();
        let opened_ms = i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX);
        self.oldest.push_back(self.handshakes.spawn(async move {
            match timeout(HANDSHAKE, accept(stream, address, opened_ms, config)).await {
                Ok(Ok(connection)) => Some(connection),
                Ok(Err(error)) => {
                    tracing::info!(target: "audit", %address, error = &error as &dyn std::error::Error, "handshake refused");
                    None
                }
                Err(_) => {
                    tracing::debug!(%address, "handshake timed out");
                    None
                }
            }
        }));
    }
}

async fn accept(
    stream: NetStream,
    address: SocketAddr,
    opened_ms: i64,
    config: Arc<ServerConfig>,
) -> io::Result<TlsConnection> {
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let session = stream.get_ref().1;
    if session.alpn_protocol().is_none() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it did not offer HTTP/2",
        ));
    }
    let peer = match session.peer_certificates().and_then(<[_]>::first) {
        None => Peer::Anonymous,
        // The verifier checked it; this only reads it once more.
        Some(leaf) => Peer::Node(Arc::new(Certificate::from_der(leaf).map_err(io::Error::other)?)),
    };
    let info = ConnectInfo {
        peer,
        address: Some(address),
        opened_ms,
    };
    Ok(Connection::new(stream, info))
}

/// What a manager serves with.
pub(crate) fn server_config(credentials: &Credentials) -> ServerConfig {
    let verifier = Arc::new(NodeVerifier(credentials.bundle.clone()));
    let mut config = server_builder()
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(Presented {
            ordinary: presented(credentials, ALPN_H2),
            enrol: presented(credentials, ALPN_ENROL),
        }));
    config.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_ENROL.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    config
}

/// Shows the certificate as the protocol has it.
#[derive(Debug)]
struct Presented {
    ordinary: Arc<CertifiedKey>,
    enrol: Arc<CertifiedKey>,
}

impl ResolvesServerCert for Presented {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut offered = hello.alpn().into_iter().flatten();
        // Of several, the ordinary one is chosen.
        let enrols = offered.next() == Some(ALPN_ENROL) && offered.next().is_none();
        Some(if enrols { &self.enrol } else { &self.ordinary }.clone())
    }
}

/// Accepts no certificate, or one of a node of this cluster.
#[derive(Debug)]
struct NodeVerifier(Bundle);

impl ClientCertVerifier for NodeVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[] // who has a certificate of ours knows it; others need not learn our roots' names
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.verify_client(leaf, intermediates, now).map_err(as_tls)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}

/// The one signature scheme of a handshake: it also binds the curve (RFC 8446 §4.2.3).
pub(super) const SCHEMES: [SignatureScheme; 1] = [SignatureScheme::ECDSA_NISTP256_SHA256];

pub(super) fn verify_signature(
    message: &[u8],
    leaf: &CertificateDer<'_>,
    signature: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, rustls::Error> {
    rustls::crypto::verify_tls13_signature(
        message,
        leaf,
        signature,
        &provider().signature_verification_algorithms,
    )
}

/// The alert that the other end gets says little; the reason stays in the local log.
pub(super) fn as_tls(error: VerifyError) -> rustls::Error {
    match error {
        VerifyError::Chain(error) => error,
        other => CertificateError::Other(OtherError(Arc::new(other))).into(),
    }
}
