//! TLS 1.3 both ways: node certificates of one cluster, HTTP/2, no resumption.
//!
//! There are no session tickets and no early data, so each connection proves both keys anew and a removed key cannot
//! come back through an old session.

mod client;
mod server;
#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock};

use rustls::crypto::CryptoProvider;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub use client::{Expect, ask_clock, bundle_channel, channel, fetch_roots};
pub(crate) use client::{anonymous_config, client_config, fetch_roots_over, open, over};
pub(crate) use server::server_config;
pub use server::{TlsConnection, incoming};

/// The application protocol of every connection (RFC 7301): HTTP/2.
pub const ALPN_H2: &[u8] = b"h2";

static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));

/// ring, by name: whatever else is linked in, no process-wide default decides.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

fn server_builder() -> rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier> {
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("ring has cipher suites of TLS 1.3")
}

fn client_builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("ring has cipher suites of TLS 1.3")
}

/// Presents this certificate, whatever the other end asks for.
fn presenting(credentials: &crate::Credentials) -> Arc<SingleCertAndKey> {
    let pkcs8 = PrivateKeyDer::Pkcs8(credentials.key.pkcs8().into());
    let key = rustls::crypto::ring::sign::any_ecdsa_type(&pkcs8).expect("a `Key` is a P-256 key");
    let chain = std::iter::once(credentials.certificate.der())
        .chain(credentials.chain.iter().map(Vec::as_slice))
        .map(|der| CertificateDer::from(der.to_vec()))
        .collect();
    Arc::new(SingleCertAndKey::from(CertifiedKey::new(chain, key)))
}
