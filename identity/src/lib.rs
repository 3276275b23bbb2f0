//! Who is who: keys, certificate requests, the certificate profile, tickets, the trust bundle, and TLS 1.3
//! configurations that swap while connections go on.
//!
//! The mapping from a certificate to (cluster, node, role) lives here and nowhere else. What only the certificate
//! authority needs is behind the feature `authority`, which only the manager turns on.

#[cfg(any(test, feature = "authority"))]
pub mod authority;
pub mod backup;
pub mod bundle;
pub mod certificate;
pub mod comeback;
mod credentials;
pub mod csr;
mod dial;
pub mod follow;
pub mod join;
mod key;
pub mod local;
pub mod net;
#[cfg(any(test, feature = "authority"))]
pub mod order;
pub mod outside;
mod peer;
pub mod pem;
pub mod process;
pub mod recovery;
pub mod renewal;
pub mod seam;
#[cfg(feature = "simulated")]
pub mod simulated;
pub mod store;
#[cfg(test)]
mod testing;
pub mod ticket;
pub mod tls;
pub mod unlock;
pub mod unswapped;

#[cfg(any(test, feature = "authority"))]
pub use authority::{Authority, IssueError};
pub use bundle::{Bundle, BundleError};
pub use certificate::{Certificate, ProfileError, Subject};
pub use credentials::{Credentials, CredentialsError, Identity};
pub use dial::DialError;
pub use key::{Key, KeyError};
pub use peer::{ConnectInfo, Connection, Peer};
pub use unlock::{UnlockKey, UnlockKeyError};
pub use unswapped::Unswapped;
