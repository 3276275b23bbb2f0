//! A service outside of the cluster that a manager calls: one address, one certificate authority of its own, TLS 1.3, and
//! this node's certificate.
//!
//! Nothing of the system's trust store counts, no name but the address's own is accepted, and who answers learns which node
//! calls. What is spoken over the connection is the caller's.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use bulkhead_proto::limits;
use rustls::client::Resumption;
use rustls::sign::SingleCertAndKey;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::dial::{self, DialError};
use crate::net::Stream;
use crate::{Credentials, Identity, tls};

/// HTTP/1.1 (RFC 7301).
const ALPN: &[u8] = b"http/1.1";

/// `https://host:port/path`, and nothing else: no user, no query, no fragment.
#[derive(Clone, PartialEq, Eq)]
pub struct Url {
    /// `host:port`.
    address: String,
    path: String,
}

/// A text that is no such address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Too long.
    #[error("it has at most {} characters", limits::SIGNER_URL_CHARS)]
    Long,
    /// Another scheme.
    #[error("it begins with https://")]
    Scheme,
    /// No host, no port, or something beside them, like a password.
    #[error("after https:// it names host:port, as in https://signer.example:8443/sign")]
    Address,
    /// A query, a fragment or a character that would be encoded.
    #[error("its path has letters, digits and - . _ ~ / alone")]
    Path,
}

impl FromStr for Url {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        if text.len() > limits::SIGNER_URL_CHARS {
            return Err(UrlError::Long);
        }
        let rest = text.strip_prefix("https://").ok_or(UrlError::Scheme)?;
        let (address, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        let (host, _) = dial::split(address).map_err(|_| UrlError::Address)?;
        ServerName::try_from(host).map_err(|_| UrlError::Address)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '~' | '/');
        match path.chars().all(plain) {
            true => Ok(Self {
                address: address.to_owned(),
                path: path.to_owned(),
            }),
            false => Err(UrlError::Path),
        }
    }
}

impl Url {
    /// `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The path; it begins with `/`.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}{}", self.address, self.path)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Url({self})")
    }
}

/// The certificate authority under which a service outside proves itself.
#[derive(Clone)]
pub struct Anchor(Arc<RootCertStore>);

/// A certificate that nothing can be verified under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AnchorError {
    /// Too many bytes.
    #[error("it has at most {} bytes", limits::SIGNER_CA_BYTES)]
    Long,
    /// Not X.509, or not usable as an authority.
    #[error("it is no X.509 certificate of a certificate authority")]
    Encoding,
}

impl Anchor {
    /// Reads one certificate, DER. Any kind of key that TLS 1.3 knows will do.
    ///
    /// # Errors
    /// [`AnchorError`].
    pub fn from_der(der: &[u8]) -> Result<Self, AnchorError> {
        if der.len() > limits::SIGNER_CA_BYTES {
            return Err(AnchorError::Long);
        }
        let mut store = RootCertStore::empty();
        store
            .add(CertificateDer::from(der.to_vec()))
            .map_err(|_| AnchorError::Encoding)?;
        Ok(Self(Arc::new(store)))
    }
}

impl fmt::Debug for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Anchor").finish_non_exhaustive()
    }
}

/// One connection to the service at `url`, as this node. The deadline is the caller's.
///
/// # Errors
/// Where there is no connection, or who answers does not prove the address's name under the anchor.
pub async fn open(identity: &Identity, url: &Url, anchor: &Anchor) -> Result<TlsStream<Stream>, DialError> {
    let address = url.address();
    let (host, _) = dial::split(address)?;
    let name = ServerName::try_from(host.to_owned()).map_err(|_| DialError::Address(address.to_owned()))?;
    let found = dial::resolve(address).await?;
    let stream = dial::connect(address, &found).await?;
    let config = Arc::new(config(&identity.current(), anchor));
    let handshake = TlsConnector::from(config).connect(name, stream).await;
    handshake.map_err(|source: io::Error| DialError::Tls {
        address: address.to_owned(),
        source,
    })
}

fn config(credentials: &Credentials, anchor: &Anchor) -> ClientConfig {
    let presented = SingleCertAndKey::from(tls::presented(credentials, tls::ALPN_H2));
    let mut config = tls::client_builder()
        .with_root_certificates(anchor.0.clone())
        .with_client_cert_resolver(Arc::new(presented));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_https_with_host_port_and_a_plain_path() {
        let long = format!(
            "https://signer.example:1/{}",
            "a".repeat(limits::SIGNER_URL_CHARS)
        );
        for (text, want) in [
            ("https://signer.example:8443", Ok(("signer.example:8443", "/"))),
            (
                "https://signer.example:8443/v1/sign",
                Ok(("signer.example:8443", "/v1/sign")),
            ),
            ("https://[::1]:1/", Ok(("[::1]:1", "/"))),
            ("https://127.0.0.1:1/", Ok(("127.0.0.1:1", "/"))),
            ("http://signer.example:8443", Err(UrlError::Scheme)),
            ("HTTPS://signer.example:8443", Err(UrlError::Scheme)),
            ("file:///etc/passwd", Err(UrlError::Scheme)),
            ("", Err(UrlError::Scheme)),
            ("https://signer.example", Err(UrlError::Address)),
            ("https://signer.example:0", Err(UrlError::Address)),
            ("https://me:secret@signer.example:1", Err(UrlError::Address)),
            ("https://:1/", Err(UrlError::Address)),
            ("https://signer.example:1?a=b", Err(UrlError::Address)),
            ("https://signer.example:1/?a=b", Err(UrlError::Path)),
            ("https://signer.example:1/#a", Err(UrlError::Path)),
            ("https://signer.example:1/a b", Err(UrlError::Path)),
            ("https://signer.example:1/a\r\nHost: b", Err(UrlError::Path)),
            (long.as_str(), Err(UrlError::Long)),
        ] {
            let got = text.parse::<Url>();
            let got = got.as_ref().map(|it| (it.address(), it.path()));
            assert_eq!(got, want.as_ref().map(|it| *it), "{text}");
        }
    }

    #[test]
    fn an_anchor_is_one_certificate() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("a key");
        let made = rcgen::CertificateParams::default()
            .self_signed(&key)
            .expect("signed");
        Anchor::from_der(made.der()).expect("any kind of key");
        for (bytes, want) in [
            (Vec::new(), AnchorError::Encoding),
            (b"no certificate".to_vec(), AnchorError::Encoding),
            (vec![0x30; limits::SIGNER_CA_BYTES + 1], AnchorError::Long),
        ] {
            assert_eq!(Anchor::from_der(&bytes).expect_err("refused"), want);
        }
    }
}
