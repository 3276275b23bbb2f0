//! One certificate, as it is ordered before anybody signs it, and the judgement of what came back.
//!
//! The order says all that the certificate is to say. So whoever holds the root's key, an [`Authority`](crate::Authority) here
//! or a signer outside of the cluster, decides nothing but whether to sign, and what comes back is held against the order.

use bulkhead_proto::{ClusterId, KeyId, Role};
use x509_parser::certificate::X509Certificate;

use crate::Subject;
use crate::authority::{self, IssueError};
use crate::bundle::{self, Root, RootError};
use crate::certificate::{self, Certificate, ProfileError, SERIAL_BYTES};
use crate::csr::PublicKey;

/// What a certificate is for.
#[derive(Debug, Clone)]
pub enum What {
    /// A node's certificate.
    Leaf {
        /// Who it names.
        subject: Subject,
        /// Its key.
        key: PublicKey,
    },
    /// The cross-certificate of a rotation: the name and key of the root that follows.
    Cross(Root),
}

/// A certificate that is wanted.
#[derive(Debug, Clone)]
pub struct Order {
    serial: [u8; SERIAL_BYTES],
    not_before_ms: i64,
    not_after_ms: i64,
    what: What,
}

/// How a certificate differs from what was ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// A leaf that does not fit the profile: an authority, for one.
    #[error("it does not fit the profile")]
    Profile(#[from] ProfileError),
    /// A cross-certificate that does not fit.
    #[error("it does not fit the profile of a cross-certificate")]
    Cross(#[source] RootError),
    /// Another key.
    #[error("it is for another key than the one that was asked for")]
    Key,
    /// Another cluster.
    #[error("it names cluster {0}, which was not asked for")]
    Cluster(ClusterId),
    /// Another role.
    #[error("its role is {got}, and {wanted} was asked for")]
    Role {
        /// What was asked for.
        wanted: Role,
        /// What it says.
        got: Role,
    },
    /// Another node, or another name than that of the next root.
    #[error("it names another subject than the one that was asked for")]
    Subject,
    /// Another serial number: an older certificate, perhaps.
    #[error("its serial number is not the one that was asked for")]
    Serial,
    /// Other times.
    #[error(
        "it is valid from {not_before} to {not_after} (seconds since 1970), which is not what was asked for"
    )]
    Validity {
        /// Its start.
        not_before: i64,
        /// Its end.
        not_after: i64,
    },
    /// It names another issuer than the root.
    #[error("it names another issuer than the root")]
    Issuer,
    /// The root's key did not sign it.
    #[error("its signature is not of the root's key")]
    Signature,
}

/// Whole seconds, as certificates count.
const SECOND_MS: i64 = 1_000;

impl Order {
    /// A node's certificate, with a fresh serial number. Times are milliseconds since 1970; they are cut to whole seconds.
    ///
    /// # Errors
    /// Where the system gives no random bytes.
    pub fn leaf(
        subject: Subject,
        key: &PublicKey,
        not_before_ms: i64,
        not_after_ms: i64,
    ) -> Result<Self, IssueError> {
        let key = key.clone();
        Self::of(What::Leaf { subject, key }, not_before_ms, not_after_ms)
    }

    /// The certificate that leads from `root` to the root that follows it, for those who know only `root` yet: valid from
    /// `now_ms` while both are.
    ///
    /// # Errors
    /// Where the roots are of two clusters, or the system gives no random bytes.
    pub fn cross(root: &Root, next: &Root, now_ms: i64) -> Result<Self, IssueError> {
        if next.cluster() != root.cluster() {
            return Err(IssueError::Cluster(root.cluster()));
        }
        let end = next.not_after_ms().min(root.not_after_ms());
        Self::of(What::Cross(next.clone()), now_ms, end)
    }

    fn of(what: What, not_before_ms: i64, not_after_ms: i64) -> Result<Self, IssueError> {
        let serial = authority::serial()?;
        Ok(Self::with_serial(serial, what, not_before_ms, not_after_ms))
    }

    /// An order that somebody else made: what a signer reads.
    pub fn with_serial(
        serial: [u8; SERIAL_BYTES],
        what: What,
        not_before_ms: i64,
        not_after_ms: i64,
    ) -> Self {
        Self {
            serial,
            not_before_ms: not_before_ms.div_euclid(SECOND_MS) * SECOND_MS,
            not_after_ms: not_after_ms.div_euclid(SECOND_MS) * SECOND_MS,
            what,
        }
    }

    /// What it is for.
    pub fn what(&self) -> &What {
        &self.what
    }

    /// The serial number.
    pub fn serial(&self) -> [u8; SERIAL_BYTES] {
        self.serial
    }

    /// Start of validity, milliseconds since 1970, whole seconds.
    pub fn not_before_ms(&self) -> i64 {
        self.not_before_ms
    }

    /// End of validity, milliseconds since 1970, whole seconds.
    pub fn not_after_ms(&self) -> i64 {
        self.not_after_ms
    }

    /// Whether this certificate, DER, is what was ordered, signed by the key of `root`.
    ///
    /// # Errors
    /// [`Difference`], the first.
    pub fn check(&self, root: &Root, der: &[u8]) -> Result<(), Difference> {
        let x509 = match &self.what {
            What::Leaf { subject, key } => {
                let leaf = Certificate::from_der(der)?;
                check_subject(*subject, leaf.subject())?;
                if leaf.key_id() != key.key_id() {
                    return Err(Difference::Key);
                }
                certificate::parse(der)?
            }
            What::Cross(next) => {
                let cross = |error: ProfileError| Difference::Cross(error.into());
                let x509 = certificate::parse(der).map_err(cross)?;
                bundle::check_cross(&x509).map_err(Difference::Cross)?;
                if x509.subject().as_raw() != next.name() {
                    return Err(Difference::Subject);
                }
                if KeyId::of_spki(x509.public_key().raw) != next.key_id() {
                    return Err(Difference::Key);
                }
                x509
            }
        };
        self.check_rest(root, &x509)
    }

    /// What leaf and cross-certificate share.
    fn check_rest(&self, root: &Root, x509: &X509Certificate<'_>) -> Result<(), Difference> {
        let (not_before_ms, not_after_ms) = certificate::validity(x509)?;
        if (not_before_ms, not_after_ms) != (self.not_before_ms, self.not_after_ms) {
            return Err(Difference::Validity {
                not_before: not_before_ms / SECOND_MS,
                not_after: not_after_ms / SECOND_MS,
            });
        }
        if x509.raw_serial() != self.serial {
            return Err(Difference::Serial);
        }
        // Whoever follows the chain compares names byte by byte.
        if x509.issuer().as_raw() != root.name() {
            return Err(Difference::Issuer);
        }
        let issuer = certificate::parse(root.der())?;
        x509.verify_signature(Some(issuer.public_key()))
            .map_err(|_| Difference::Signature)
    }
}

fn check_subject(wanted: Subject, got: Subject) -> Result<(), Difference> {
    if got.cluster != wanted.cluster {
        return Err(Difference::Cluster(got.cluster));
    }
    if got.role != wanted.role {
        let (wanted, got) = (wanted.role, got.role);
        return Err(Difference::Role { wanted, got });
    }
    match got.node == wanted.node {
        true => Ok(()),
        false => Err(Difference::Subject),
    }
}

#[cfg(test)]
mod tests;
