//! The calling end: whoever answers must prove a manager of the cluster, by chain, name, role and, where it matters,
//! node id.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::limits::{FORMER_ROOTS, HANDSHAKE, MESSAGE_BYTES};
use bulkhead_proto::wire::enrolment_client::EnrolmentClient;
use bulkhead_proto::wire::{GetRootRequest, GetRootResponse};
use bulkhead_proto::{ClusterId, NodeId};
use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use super::server::{SCHEMES, as_tls, verify_signature};
use super::{ALPN_ENROL, ALPN_H2, client_builder, presented};
use crate::bundle::{ROOTS, VerifyError};
use crate::dial::{self, DialError};
use crate::net::Stream;
use crate::ticket::Ticket;
use crate::{Bundle, Credentials, Identity};

/// Whom a call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Any manager of the cluster.
    AnyManager,
    /// This manager and no other: between managers. Its certificate may have ended lately ([`Bundle::verify_member`]).
    Manager(NodeId),
}

/// A ping goes out after this much silence, also between calls, and its answer is due in as long again: a peer that
/// is gone without a word is noticed within twice this.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Name, TCP and handshake together, with several addresses behind a name.
const DIAL: Duration = Duration::from_secs(10);

/// A channel to the manager at `host:port`, as this node. It connects at the first call and again whenever the
/// connection is lost, each time with the credentials that then hold.
///
/// # Errors
/// Where the address is not `host:port`. What fails later comes as the status of a call, `Unavailable`.
pub fn channel(identity: &Identity, address: &str, expect: Expect) -> Result<Channel, DialError> {
    let cluster = identity.subject().cluster;
    let identity = identity.clone();
    lazy(address, cluster, move || identity.client_config(expect))
}

/// A channel to a manager of the bundle's cluster, without a certificate of our own: for those who join or come back.
///
/// # Errors
/// Where the address is not `host:port`.
pub fn bundle_channel(bundle: &Bundle, address: &str, expect: Expect) -> Result<Channel, DialError> {
    let config = Arc::new(anonymous_config(bundle, expect));
    lazy(address, bundle.cluster(), move || config.clone())
}

fn lazy(
    address: &str,
    cluster: ClusterId,
    config: impl Fn() -> Arc<ClientConfig> + Send + 'static,
) -> Result<Channel, DialError> {
    let endpoint = endpoint(address)?;
    let address: Arc<str> = address.into();
    Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
        let (address, config) = (address.clone(), config());
        async move {
            let stream = open(&address, config, cluster).await?;
            Ok::<_, DialError>(TokioIo::new(stream))
        }
    })))
}

/// What all channels have in common.
fn endpoint(address: &str) -> Result<Endpoint, DialError> {
    let (host, port) = dial::split(address)?;
    // The authority is only a header; whom we talk to is decided by certificate.
    let uri = if host.contains(':') {
        format!("http://[{host}]:{port}")
    } else {
        format!("http://{host}:{port}")
    };
    let endpoint =
        Endpoint::from_shared(uri).map_err(|_| DialError::Address(address.chars().take(64).collect()))?;
    Ok(endpoint
        .connect_timeout(DIAL)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true))
}

/// One connection to the manager at `host:port`.
pub(crate) async fn open(
    address: &str,
    config: Arc<ClientConfig>,
    cluster: ClusterId,
) -> Result<TlsStream<Stream>, DialError> {
    let found = dial::resolve(address).await?;
    let stream = dial::connect(address, &found).await?;
    dial::secure(address, stream, config, dial::server_name(cluster)).await
}

/// A channel over one connection that stands already.
pub(crate) async fn over(address: &str, stream: TlsStream<Stream>) -> Result<Channel, DialError> {
    let mut once = Some(stream);
    let connector = tower::service_fn(move |_| {
        let stream = once
            .take()
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        async move { stream.map(TokioIo::new) }
    });
    let channel = endpoint(address)?.connect_with_connector(connector).await;
    channel.map_err(|error| DialError::Tls {
        address: address.to_owned(),
        source: io::Error::other(error),
    })
}

/// Asks the manager at `host:port` for its roots, over a connection that proves nothing yet, and keeps the one that
/// the ticket names. Of the ticket nothing is said. With the bundle come the cluster and the manager's clock, in
/// milliseconds since 1970.
///
/// # Errors
/// Where there is no connection, or none of the roots is the ticket's.
pub async fn fetch_roots(address: &str, ticket: &Ticket) -> Result<(Bundle, ClusterId, i64), DialError> {
    let found = dial::resolve(address).await?;
    let stream = dial::connect(address, &found).await?;
    fetch_roots_over(address, stream, ticket).await
}

/// [`fetch_roots`] over a TCP connection that stands already.
pub(crate) async fn fetch_roots_over(
    address: &str,
    stream: Stream,
    ticket: &Ticket,
) -> Result<(Bundle, ClusterId, i64), DialError> {
    let answer = ask_root(address, stream).await?;
    let wrong = || DialError::WrongRoot {
        address: address.to_owned(),
    };
    let named = answer
        .roots
        .into_iter()
        .take(ROOTS)
        .find(|root| ticket.names_root(root));
    // Nothing proves the answer; it only chooses between two ways to say no.
    let mut former = answer.former.iter().take(FORMER_ROOTS);
    let named = named.ok_or_else(|| match former.any(|root| ticket.names_root(root)) {
        true => DialError::FormerRoot {
            address: address.to_owned(),
        },
        false => wrong(),
    })?;
    // Who made the ticket made this root: that it is no root at all means a broken ticket, not a broken answer.
    let bundle = Bundle::from_ders(vec![named]).map_err(|_| wrong())?;
    let cluster = bundle.cluster();
    Ok((bundle, cluster, answer.now))
}

/// The clock of whoever answers at `host:port`, in milliseconds since 1970. Nothing proves it: it is for a person who looks
/// for the reason why a certificate is not believed.
///
/// # Errors
/// Where there is no connection, or no manager answers.
pub async fn ask_clock(address: &str) -> Result<i64, DialError> {
    let found = dial::resolve(address).await?;
    let stream = dial::connect(address, &found).await?;
    Ok(ask_root(address, stream).await?.now)
}

/// The first question, over a connection that proves nothing.
async fn ask_root(address: &str, stream: Stream) -> Result<GetRootResponse, DialError> {
    let name = ServerName::try_from("manager.unknown").expect("a DNS name");
    let stream = dial::secure(address, stream, Arc::new(unverified_config()), name).await?;
    let mut client =
        EnrolmentClient::new(over(address, stream).await?).max_decoding_message_size(ROOTS_BYTES);
    let mut request = tonic::Request::new(GetRootRequest {});
    request.set_timeout(HANDSHAKE);
    let refuse = |source| DialError::Protocol {
        address: address.to_owned(),
        source: Box::new(source),
    };
    match tokio::time::timeout(HANDSHAKE, client.get_root(request)).await {
        Ok(answer) => Ok(answer.map_err(refuse)?.into_inner()),
        Err(_) => Err(refuse(tonic::Status::deadline_exceeded("no answer in time"))),
    }
}

/// An answer with as many roots as a bundle has, with those that were rotated away, and a little.
const ROOTS_BYTES: usize = (ROOTS + FORMER_ROOTS) * crate::certificate::CERTIFICATE_BYTES + 1024;
const _: () = assert!(ROOTS_BYTES < MESSAGE_BYTES);

/// What a node calls with.
pub(crate) fn client_config(credentials: &Credentials, expect: Expect) -> ClientConfig {
    let verifier = ManagerVerifier {
        bundle: credentials.bundle.clone(),
        expect,
    };
    let protocol = match expect {
        Expect::AnyManager => ALPN_H2,
        // One of two managers may have been off during a rotation.
        Expect::Manager(_) => ALPN_ENROL,
    };
    let presented = SingleCertAndKey::from(presented(credentials, protocol));
    let config = client_builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(presented));
    finish(config, protocol)
}

/// What a joiner calls with that has the bundle but no certificate.
pub(crate) fn anonymous_config(bundle: &Bundle, expect: Expect) -> ClientConfig {
    let verifier = ManagerVerifier {
        bundle: bundle.clone(),
        expect,
    };
    let config = client_builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    finish(config, ALPN_ENROL)
}

/// What a joiner asks for the roots with. Nothing that must stay secret may go over such a connection.
fn unverified_config() -> ClientConfig {
    let verifier = Arc::new(UnverifiedBeforeRootDigest);
    let config = client_builder()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    finish(config, ALPN_ENROL)
}

fn finish(mut config: ClientConfig, protocol: &[u8]) -> ClientConfig {
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false; // it would say the cluster's id in clear, and every listener has one certificate
    config
}

/// Accepts a manager of the cluster.
#[derive(Debug)]
struct ManagerVerifier {
    bundle: Bundle,
    expect: Expect,
}

impl ManagerVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), VerifyError> {
        match self.expect {
            Expect::AnyManager => self.bundle.verify_manager(leaf, intermediates, now).map(drop),
            Expect::Manager(wanted) => {
                let got = self
                    .bundle
                    .verify_member(leaf, intermediates, now)?
                    .subject()
                    .node;
                match wanted == got {
                    true => Ok(()),
                    false => Err(VerifyError::WrongManager { wanted, got }),
                }
            }
        }
    }
}

impl ServerCertVerifier for ManagerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>, // the bundle checks its own cluster's name
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now).map_err(as_tls)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
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

/// Accepts any certificate, for the one question whose answer is checked against the ticket's digest.
#[derive(Debug)]
struct UnverifiedBeforeRootDigest;

impl ServerCertVerifier for UnverifiedBeforeRootDigest {
    fn verify_server_cert(
        &self,
        _leaf: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
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
