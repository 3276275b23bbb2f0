//! Names of things: newtypes, so that two of them cannot be swapped.
//!
//! Object ids are 128 random bits chosen by the client (stable across its retries) and written as 26 lower-case
//! base32 characters (RFC 4648 §6, no padding). Any unambiguous prefix is accepted where a person types one.

use std::fmt;
use std::str::FromStr;

use data_encoding::{Encoding, HEXLOWER, Specification};
use sha2::{Digest as _, Sha256};
use std::sync::LazyLock;

/// Bytes of an object id.
pub const ID_BYTES: usize = 16;
/// Characters of an object id as text.
pub const ID_CHARS: usize = 26;

static BASE32_LOWER: LazyLock<Encoding> = LazyLock::new(|| {
    let mut spec = Specification::new();
    spec.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    // Trailing bits are 0 in everything we print; a text that differs only there would be a second name for one id.
    spec.encoding()
        .expect("the RFC 4648 alphabet is a valid specification")
});

/// The lower-case base32 that ids and tickets are written in.
pub fn base32_lower() -> &'static Encoding {
    &BASE32_LOWER
}

/// A text that is not an id of the expected kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text does not decode.
    #[error("'{text}' is not a {kind} id: expected {ID_CHARS} characters of a-z and 2-7")]
    Text {
        /// What was expected.
        kind: &'static str,
        /// What came (cut to 64 characters).
        text: String,
    },
    /// The wire field has another length than an id.
    #[error("a {kind} id has {ID_BYTES} bytes, this one has {got}")]
    Length {
        /// What was expected.
        kind: &'static str,
        /// Bytes that came.
        got: usize,
    },
}

macro_rules! object_ids {
    ($($(#[$doc:meta])* $name:ident = $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; ID_BYTES]);

        impl $name {
            /// Makes the id from random bytes chosen by the caller.
            pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
                Self(bytes)
            }

            /// The id's bytes, as on the wire.
            pub const fn as_bytes(&self) -> &[u8; ID_BYTES] {
                &self.0
            }

            /// The id as the owned bytes of a wire field.
            pub fn to_wire(self) -> Vec<u8> {
                self.0.to_vec()
            }

            /// The first 12 characters: what tables show.
            pub fn short(&self) -> String {
                self.to_string()[..12].to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&BASE32_LOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let refuse = || ParseIdError::Text { kind: $kind, text: text.chars().take(64).collect() };
                if text.len() != ID_CHARS {
                    return Err(refuse());
                }
                let bytes = BASE32_LOWER.decode(text.as_bytes()).map_err(|_| refuse())?;
                Ok(Self(bytes.try_into().map_err(|_| refuse())?))
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = ParseIdError;
            fn try_from(bytes: &[u8]) -> Result<Self, ParseIdError> {
                let array = bytes.try_into().map_err(|_| ParseIdError::Length { kind: $kind, got: bytes.len() })?;
                Ok(Self(array))
            }
        }
    )*};
}

object_ids! {
    /// A cluster, for its whole life; the `O=` of every certificate and the trust domain of every SPIFFE id.
    ClusterId = "cluster";
    /// A node: one program of one role on one host. The `CN=` of its certificate.
    NodeId = "node";
    /// A service.
    ServiceId = "service";
    /// A task: one attempt to fill one slot of a service.
    TaskId = "task";
    /// A secret.
    SecretId = "secret";
    /// An image known to the cluster's own store.
    ImageId = "image";
    /// A join ticket.
    TicketId = "ticket";
    /// One request of a client, the same on each of its retries.
    RequestId = "request";
}

/// A Raft member: never reused, so a voter that lost its store cannot come back as itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MemberId(pub u64);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The place of a task within its service, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Slot(pub u32);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The commit index of an object's last change: what preconditions compare.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A service's specs are numbered from 1; tasks point to one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct SpecVersion(pub u64);

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// SHA-256 of a public key's DER SubjectPublicKeyInfo (RFC 5280 §4.1.2.7): who a caller is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId([u8; 32]);

impl KeyId {
    /// The id of the key whose SubjectPublicKeyInfo this is.
    pub fn of_spki(spki_der: &[u8]) -> Self {
        Self(Sha256::digest(spki_der).into())
    }

    /// Wraps an id that was computed elsewhere.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The id's bytes, as on the wire.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The id as the owned bytes of a wire field.
    pub fn to_wire(self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({})", &HEXLOWER.encode(&self.0[..8]))
    }
}

impl TryFrom<&[u8]> for KeyId {
    type Error = ParseIdError;
    fn try_from(bytes: &[u8]) -> Result<Self, ParseIdError> {
        match bytes.try_into() {
            Ok(array) => Ok(Self(array)),
            Err(_) => Err(ParseIdError::Length {
                kind: "key",
                got: bytes.len(),
            }),
        }
    }
}

/// A content digest as OCI writes it: `sha256:<64 hex>` (image-spec, descriptor.md, "Digests"). SHA-256 only: a
/// second algorithm would give one content two names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    /// Wraps a SHA-256 that was computed elsewhere.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The hash itself.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hex characters without the algorithm: a file's name in a blob folder.
    pub fn hex(&self) -> String {
        HEXLOWER.encode(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest(sha256:{}…)", &self.hex()[..12])
    }
}

/// A text that is not `sha256:<64 lower-case hex>`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a digest: expected sha256: and 64 lower-case hex characters")]
pub struct ParseDigestError(String);

impl FromStr for Digest {
    type Err = ParseDigestError;
    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        let refuse = || ParseDigestError(text.chars().take(80).collect());
        let hex = text.strip_prefix("sha256:").ok_or_else(refuse)?;
        let bytes = HEXLOWER.decode(hex.as_bytes()).map_err(|_| refuse())?;
        Ok(Self(bytes.try_into().map_err(|_| refuse())?))
    }
}

/// What a node is allowed to be. One node has one role; a host may run one of each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// Replicates the state and decides.
    Manager,
    /// Runs tasks.
    Worker,
    /// A person or script that commands the cluster.
    Operator,
    /// A manager program that waits to be promoted.
    Standby,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 4] = [Role::Manager, Role::Worker, Role::Operator, Role::Standby];

    /// The role as the `OU=` of a certificate and a word of the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Manager => "manager",
            Role::Worker => "worker",
            Role::Operator => "operator",
            Role::Standby => "standby",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A text that names no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a role: manager, worker, operator or standby")]
pub struct ParseRoleError(String);

impl FromStr for Role {
    type Err = ParseRoleError;
    fn from_str(text: &str) -> Result<Self, ParseRoleError> {
        Role::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| ParseRoleError(text.chars().take(32).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text() {
        let id = NodeId::from_bytes([0xA5; ID_BYTES]);
        assert_eq!(id.to_string().len(), ID_CHARS);
        assert_eq!(id.to_string().parse::<NodeId>(), Ok(id));
    }

    #[test]
    fn a_second_spelling_of_an_id_is_refused() {
        let text = NodeId::from_bytes([0; ID_BYTES]).to_string();
        let mut twin = text.clone();
        twin.pop();
        twin.push('b'); // differs only in bits that decode to nothing
        assert!(twin.parse::<NodeId>().is_err());
        assert!(text.to_uppercase().parse::<NodeId>().is_err());
    }

    #[test]
    fn only_lower_case_sha256_is_a_digest() {
        let text = Digest::of(b"x").to_string();
        assert_eq!(text.parse::<Digest>(), Ok(Digest::of(b"x")));
        for bad in [
            text.to_uppercase(),
            text.replace("sha256", "sha512"),
            text[..70].to_owned(),
            String::new(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
