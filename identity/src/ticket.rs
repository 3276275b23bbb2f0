//! Join tickets: `BULKHEAD-1-<digest of the root, base32>-<secret, base32>`.
//!
//! The digest is SHA-256 of the root certificate's DER. A joiner fetches the root over a connection that it cannot verify
//! yet, compares it with the digest, and only then, over a verified connection, says the secret: whoever answers in the
//! cluster's stead never hears it. Role, lifetime and uses are the cluster's to know; a ticket does not say them.

use std::fmt;
use std::str::FromStr;

use bulkhead_proto::ids::base32_lower;
use bulkhead_proto::limits::TICKET_BYTES;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Bytes of a ticket's secret: 128 random bits, past guessing even without the limiter.
pub const TICKET_SECRET_BYTES: usize = 16;

const PREFIX: &str = "BULKHEAD";
const VERSION: &str = "1";

/// The secret half of a ticket; wiped when dropped, never printed.
pub struct TicketSecret(Zeroizing<[u8; TICKET_SECRET_BYTES]>);

impl TicketSecret {
    /// Wraps random bytes that the caller drew.
    pub fn new(bytes: Zeroizing<[u8; TICKET_SECRET_BYTES]>) -> Self {
        Self(bytes)
    }

    /// Reads a secret from a request.
    ///
    /// # Errors
    /// Where it has another length.
    pub fn from_wire(bytes: &[u8]) -> Result<Self, TicketError> {
        let array: [u8; TICKET_SECRET_BYTES] = bytes.try_into().map_err(|_| TicketError::Secret)?;
        Ok(Self(Zeroizing::new(array)))
    }

    /// The secret itself, for the one request that says it.
    pub fn expose(&self) -> &[u8; TICKET_SECRET_BYTES] {
        &self.0
    }

    /// What the cluster keeps instead of the secret.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(self.0.as_slice()).into()
    }

    /// Whether this is the secret that was kept as `hash`; takes as long for a near miss as for a far one.
    pub fn matches(&self, hash: &[u8]) -> bool {
        self.hash().as_slice().ct_eq(hash).into()
    }
}

impl fmt::Debug for TicketSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketSecret(…)")
    }
}

/// A right to join, as a person carries it from a manager to a new node.
pub struct Ticket {
    root_digest: [u8; 32],
    secret: TicketSecret,
}

impl Ticket {
    /// A ticket for the cluster with this root certificate.
    pub fn new(root_der: &[u8], secret: TicketSecret) -> Self {
        Self {
            root_digest: Sha256::digest(root_der).into(),
            secret,
        }
    }

    /// Whether this is the root that the ticket names. Ask before saying the secret.
    pub fn names_root(&self, root_der: &[u8]) -> bool {
        Sha256::digest(root_der)
            .as_slice()
            .ct_eq(&self.root_digest)
            .into()
    }

    /// The secret half.
    pub fn secret(&self) -> &TicketSecret {
        &self.secret
    }

    /// The ticket as it is handed to a person, once. It is not `Display`, so that no format string prints it by chance.
    pub fn to_text(&self) -> Zeroizing<String> {
        let secret = Zeroizing::new(base32_lower().encode(self.secret.expose()));
        let digest = base32_lower().encode(&self.root_digest);
        Zeroizing::new(format!("{PREFIX}-{VERSION}-{digest}-{}", secret.as_str()))
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ticket")
            .field("root", &base32_lower().encode(&self.root_digest[..5]))
            .finish_non_exhaustive()
    }
}

/// A text that is not a ticket. What was typed is not repeated: it may hold most of a real one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Longer than any ticket.
    #[error("a ticket has at most {TICKET_BYTES} characters; check that the file holds the ticket alone")]
    Long,
    /// Not four parts, or another first word.
    #[error(
        "a ticket reads {PREFIX}-{VERSION}-<root digest>-<secret>; copy it whole, from `bulkhead cluster ticket create`"
    )]
    Shape,
    /// A version that this program does not know.
    #[error("this ticket's version is not {VERSION}; use a program of the cluster's own version")]
    Version,
    /// The digest does not decode.
    #[error("the ticket's root digest is mistyped: expected 52 characters of a-z and 2-7")]
    Digest,
    /// The secret does not decode.
    #[error("the ticket's secret is mistyped: expected 26 characters of a-z and 2-7")]
    Secret,
}

impl FromStr for Ticket {
    type Err = TicketError;

    /// Reads a ticket; white space around it, as a file's last newline, does not count.
    fn from_str(text: &str) -> Result<Self, TicketError> {
        if text.len() > TICKET_BYTES {
            return Err(TicketError::Long);
        }
        let mut parts = text.trim().split('-');
        let (Some(PREFIX), Some(version), Some(digest), Some(secret), None) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(TicketError::Shape);
        };
        if version != VERSION {
            return Err(TicketError::Version);
        }
        let digest = base32_lower()
            .decode(digest.as_bytes())
            .map_err(|_| TicketError::Digest)?;
        let secret = base32_lower()
            .decode(secret.as_bytes())
            .map_err(|_| TicketError::Secret)?;
        let secret = TicketSecret::from_wire(&Zeroizing::new(secret))?;
        Ok(Self {
            root_digest: digest.try_into().map_err(|_| TicketError::Digest)?,
            secret,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket() -> Ticket {
        Ticket::new(
            b"a root",
            TicketSecret::new(Zeroizing::new([0xC3; TICKET_SECRET_BYTES])),
        )
    }

    #[test]
    fn a_ticket_survives_its_text() {
        let text = ticket().to_text();
        for written in [text.to_string(), format!("{}\n", text.as_str())] {
            let read: Ticket = written.parse().expect("our own text");
            assert!(read.names_root(b"a root") && !read.names_root(b"another root"));
            assert!(read.secret().matches(&ticket().secret().hash()));
        }
    }

    #[test]
    fn what_is_no_ticket_says_what_is_wrong_with_it() {
        let text = ticket().to_text().to_string();
        let parts: Vec<&str> = text.split('-').collect();
        let (digest, secret) = (parts[2], parts[3]);
        let check = |text: &str, error| assert_eq!(text.parse::<Ticket>().expect_err(text), error);
        check("", TicketError::Shape);
        check("SWMTKN-1-aaaa-bbbb", TicketError::Shape);
        check(&text[..text.len() - 27], TicketError::Shape);
        check(&format!("{text}-{secret}"), TicketError::Shape);
        check(&format!("BULKHEAD--{digest}-{secret}"), TicketError::Version);
        check(&format!("BULKHEAD-2-{digest}-{secret}"), TicketError::Version);
        check(
            &format!("BULKHEAD-1-{}-{secret}", digest.to_uppercase()),
            TicketError::Digest,
        );
        check(
            &format!("BULKHEAD-1-{}-{secret}", &digest[1..]),
            TicketError::Digest,
        );
        check(&format!("BULKHEAD-1-{digest}-"), TicketError::Secret);
        check(
            &format!("BULKHEAD-1-{digest}-{secret}{secret}"),
            TicketError::Secret,
        );
        check(
            &format!("BULKHEAD-1-{digest}-{}", secret.replace('y', "1")),
            TicketError::Secret,
        );
        check(
            &format!("BULKHEAD-1-{digest}-{}\0", &secret[1..]),
            TicketError::Secret,
        );
        check(&"x".repeat(1 << 20), TicketError::Long);
    }

    #[test]
    fn another_secret_does_not_match() {
        let hash = ticket().secret().hash();
        for (at, bit) in [(0, 1), (TICKET_SECRET_BYTES - 1, 0x80)] {
            let mut near = [0xC3; TICKET_SECRET_BYTES];
            near[at] ^= bit;
            assert!(!TicketSecret::new(Zeroizing::new(near)).matches(&hash));
        }
        assert!(!ticket().secret().matches(&hash[..31]));
        assert!(!ticket().secret().matches(&[]));
    }

    #[test]
    fn neither_a_ticket_nor_its_errors_print_the_secret() {
        let text = ticket().to_text().to_string();
        let secret = text.rsplit('-').next().expect("a last part").to_owned();
        let mistyped = format!("{text}x")
            .parse::<Ticket>()
            .expect_err("one character too many");
        for printed in [
            format!("{:?}", ticket()),
            format!("{:?}", ticket().secret()),
            format!("{mistyped} {mistyped:?}"),
        ] {
            assert!(!printed.contains(&secret), "{printed}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,300}") {
            let _ = text.parse::<Ticket>(); // only that it returns
        }

        #[test]
        fn every_ticket_reads_back(root in any::<[u8; 32]>(), secret in any::<[u8; TICKET_SECRET_BYTES]>()) {
            let text = Ticket::new(&root, TicketSecret::new(Zeroizing::new(secret))).to_text();
            prop_assert!(text.len() <= TICKET_BYTES);
            let read: Ticket = text.parse().expect("our own text");
            prop_assert!(read.names_root(&root));
            prop_assert_eq!(read.secret().expose(), &secret);
        }
    }
}
