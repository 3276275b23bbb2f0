//! From `host:port` to a TLS connection: name, TCP, handshake, each with a deadline and an error of its own.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::ClusterId;
use bulkhead_proto::limits::HANDSHAKE;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::ResolverConfig;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::certificate::manager_name;
use crate::net::Stream;

/// Longest `host:port`: a DNS name has at most 253 characters (RFC 1035 §2.3.4).
const ADDRESS_CHARS: usize = 253 + 6;
/// Addresses of one name that are tried.
const ADDRESSES: usize = 8;
/// One name, with all its search domains and name servers.
const RESOLVE: Duration = Duration::from_secs(5);
/// One TCP connection.
const CONNECT: Duration = Duration::from_secs(3);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Not `host:port`.
    #[error("'{0}' is not an address")]
    Address(String),
    /// The name does not resolve.
    #[error("the name '{host}' does not resolve")]
    Name {
        /// What was looked up.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Nobody answers there.
    #[error("no TCP connection to {address}")]
    Tcp {
        /// What was dialled.
        address: String,
        /// What the kernel said of the last address tried.
        source: io::Error,
    },
    /// Something answers, but the handshake fails.
    #[error("no TLS connection with {address}")]
    Tls {
        /// What was dialled.
        address: String,
        /// What TLS said.
        source: io::Error,
    },
    /// None of the roots is the one that the ticket names.
    #[error("the manager at {address} has another root than the ticket names")]
    WrongRoot {
        /// What was dialled.
        address: String,
    },
    /// The root that the ticket names was the cluster's, until it was rotated away.
    #[error(
        "the ticket is older than the cluster's root: it names one that was rotated away (so says the manager at {address})"
    )]
    FormerRoot {
        /// What was dialled.
        address: String,
    },
    /// What answered does not speak our protocol.
    #[error("what answers at {address} is no manager")]
    Protocol {
        /// What was dialled.
        address: String,
        /// What it said.
        source: Box<tonic::Status>,
    },
}

impl DialError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Address(_) => "write host:port, as in manager.example:7443 or [::1]:7443",
            Self::Name { .. } => "check its spelling and this machine's DNS, or use an IP address",
            Self::Tcp { .. } => "check that the manager runs there, its port, and firewalls between",
            Self::Tls { .. } => "check that it is a manager of this cluster, and both clocks",
            Self::WrongRoot { .. } => {
                "it is of another cluster, or an impostor: check the address; after a root rotation get a new ticket"
            }
            Self::FormerRoot { .. } => "make a new ticket: bulkhead cluster ticket create",
            Self::Protocol { .. } => "check the address and its port: it must be a manager's",
        }
    }
}

/// Splits and checks `host:port`; brackets around an IPv6 address go.
pub(crate) fn split(address: &str) -> Result<(&str, u16), DialError> {
    let refuse = || DialError::Address(address.chars().take(64).collect());
    if address.len() > ADDRESS_CHARS {
        return Err(refuse());
    }
    let (host, port) = address.rsplit_once(':').ok_or_else(refuse)?;
    let port = port
        .parse()
        .ok()
        .filter(|&port: &u16| port != 0)
        .ok_or_else(refuse)?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .filter(|host| host.contains(':'))
            .ok_or_else(refuse)?,
        None => host,
    };
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let literal = host.parse::<IpAddr>().is_ok();
    if !literal && (host.is_empty() || !host.chars().all(name)) {
        return Err(refuse());
    }
    Ok((host, port))
}

/// The addresses of `host:port`, at most [`ADDRESSES`].
pub(crate) async fn resolve(address: &str) -> Result<Vec<SocketAddr>, DialError> {
    let (host, port) = split(address)?;
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let refuse = |source| DialError::Name {
        host: host.to_owned(),
        source,
    };
    let found = match timeout(RESOLVE, look_up(host)).await {
        Ok(found) => found.map_err(refuse)?,
        Err(_) => return Err(refuse(io::ErrorKind::TimedOut.into())),
    };
    if found.is_empty() {
        return Err(refuse(io::ErrorKind::NotFound.into()));
    }
    Ok(found
        .into_iter()
        .take(ADDRESSES)
        .map(|ip| SocketAddr::new(ip, port))
        .collect())
}

/// `/etc/hosts` first, then the name servers of `/etc/resolv.conf`, both read anew: a program runs for months.
async fn look_up(host: &str) -> io::Result<Vec<IpAddr>> {
    let builder = TokioResolver::builder_tokio().unwrap_or_else(|_| {
        // Without name servers, as in a sandbox, the hosts file still counts.
        TokioResolver::builder_with_config(
            ResolverConfig::from_parts(None, vec![], vec![]),
            Default::default(),
        )
    });
    let found = builder
        .build()
        .map_err(io::Error::other)?
        .lookup_ip(host)
        .await
        .map_err(io::Error::other)?;
    Ok(found.iter().collect())
}

/// The first of these that accepts a connection.
pub(crate) async fn connect(address: &str, found: &[SocketAddr]) -> Result<Stream, DialError> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for socket in found {
        match timeout(CONNECT, Stream::connect(*socket)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(DialError::Tcp {
        address: address.to_owned(),
        source: last,
    })
}

/// Shakes hands; whoever answers must speak HTTP/2.
pub(crate) async fn secure(
    address: &str,
    stream: Stream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<TlsStream<Stream>, DialError> {
    let refuse = |source| DialError::Tls {
        address: address.to_owned(),
        source,
    };
    match timeout(HANDSHAKE, TlsConnector::from(config).connect(name, stream)).await {
        Ok(Ok(stream)) if stream.get_ref().1.alpn_protocol().is_some() => Ok(stream),
        Ok(Ok(_)) => Err(refuse(io::Error::new(
            io::ErrorKind::InvalidData,
            "it did not choose HTTP/2",
        ))),
        Ok(Err(error)) => Err(refuse(error)),
        Err(_) => Err(refuse(io::ErrorKind::TimedOut.into())),
    }
}

/// The name that a manager of this cluster proves.
pub(crate) fn server_name(cluster: ClusterId) -> ServerName<'static> {
    ServerName::try_from(manager_name(cluster)).expect("a cluster id is a DNS label")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port_are_split_or_refused() {
        for (text, want) in [
            ("127.0.0.1:7443", Some(("127.0.0.1", 7443))),
            ("[::1]:7443", Some(("::1", 7443))),
            ("::1:7443", Some(("::1", 7443))),
            ("manager-1.example:1", Some(("manager-1.example", 1))),
            ("manager_1:65535", Some(("manager_1", 65535))),
            ("", None),
            ("host", None),
            (":1", None),
            ("host:0", None),
            ("host:65536", None),
            ("[host]:1", None),
            ("[::1:1", None),
            ("a b:1", None),
            ("http://host:1", None),
            ("host/path:1", None),
        ] {
            assert_eq!(split(text).ok(), want, "{text}");
        }
        assert!(split(&format!("{}:1", "a".repeat(300))).is_err());
    }

    #[tokio::test]
    async fn the_hosts_file_counts_and_a_literal_needs_no_resolver() {
        let found = resolve("localhost:80").await.expect("a name in every hosts file");
        assert!(
            found
                .iter()
                .all(|address| address.ip().is_loopback() && address.port() == 80),
            "{found:?}"
        );
        assert_eq!(
            resolve("[::1]:80").await.expect("a literal"),
            ["[::1]:80".parse().expect("an address")]
        );
    }
}
