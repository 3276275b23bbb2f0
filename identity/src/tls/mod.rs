//! TLS 1.3 both ways: node certificates of one cluster, HTTP/2, no resumption.
//!
//! There are no session tickets and no early data, so each connection proves both keys anew and a removed key cannot
//! come back through an old session.

mod client;
mod server;
#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, UnixTime};

use crate::Credentials;
use crate::seam::{Clock as _, SystemClock};

pub use client::{Expect, ask_clock, bundle_channel, channel, fetch_roots};
pub(crate) use client::{anonymous_config, client_config, fetch_roots_over, open, over};
pub(crate) use server::server_config;
pub use server::{TlsConnection, incoming};

/// The application protocol of ordinary connections (RFC 7301): HTTP/2.
pub const ALPN_H2: &[u8] = b"h2";
/// HTTP/2 too, for those who may know the past only: who joins or comes back, and managers among themselves. When a
/// rotation has ended, the certificate that leads from the former root to the present one is shown here and nowhere else.
pub const ALPN_ENROL: &[u8] = b"bulkhead-enrol";

static PROVIDER: LazyLock<Arc<CryptoProvider>> =
    LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));

/// ring, by name: whatever else is linked in, no process-wide default decides.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

/// The time by which certificates are judged: the system clock's.
#[derive(Debug)]
struct Now;

impl TimeProvider for Now {
    fn current_time(&self) -> Option<UnixTime> {
        let now = Duration::from_millis(SystemClock::start().wall_millis());
        Some(UnixTime::since_unix_epoch(now))
    }
}

fn server_builder() -> rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier> {
    ServerConfig::builder_with_details(provider(), Arc::new(Now))
        .with_protocol_versions(&[&TLS13])
        .expect("ring has cipher suites of TLS 1.3")
}

pub(crate) fn client_builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_details(provider(), Arc::new(Now))
        .with_protocol_versions(&[&TLS13])
        .expect("ring has cipher suites of TLS 1.3")
}

/// The key with the certificates that `protocol` shows.
pub(crate) fn presented(credentials: &Credentials, protocol: &[u8]) -> Arc<CertifiedKey> {
    let chain = credentials.presented(protocol);
    let chain = chain.map(|der| CertificateDer::from(der.to_vec())).collect();
    Arc::new(CertifiedKey::new(chain, Arc::new(credentials.key.clone())))
}
