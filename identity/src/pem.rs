//! Files with one certificate or one key in PEM (RFC 7468), as other programs write them.

use rustls_pki_types::pem::{Error, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use zeroize::Zeroizing;

/// A file that does not hold what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// No such block.
    #[error("there is no '{0}' in it")]
    Missing(&'static str),
    /// More than one certificate: which one is meant?
    #[error("there is more than one '{0}' in it")]
    Several(&'static str),
    /// A block that does not decode.
    #[error("it is not PEM: a block in it does not decode")]
    Encoding,
    /// A private key in a form of its own.
    #[error("its key is in an older form than PKCS#8, or encrypted")]
    OtherKey,
}

impl PemError {
    /// What to do next.
    pub fn hint(self) -> &'static str {
        match self {
            PemError::Missing(_) | PemError::Encoding => {
                "give the path of a PEM file, whose blocks begin with '-----BEGIN'"
            }
            PemError::Several(_) => "give a file with that one block alone: a root needs no chain",
            PemError::OtherKey => "convert it: openssl pkcs8 -topk8 -nocrypt -in FILE -out KEY.pem",
        }
    }
}

const CERTIFICATE: &str = "CERTIFICATE";
const PRIVATE_KEY: &str = "PRIVATE KEY";

/// The one certificate in a file, DER.
///
/// # Errors
/// [`PemError`].
pub fn certificate(text: &[u8]) -> Result<Vec<u8>, PemError> {
    let found = one(CertificateDer::pem_slice_iter(text), CERTIFICATE)?;
    Ok(found.as_ref().to_vec())
}

/// The one private key in a file, PKCS#8 in DER; not encrypted.
///
/// # Errors
/// [`PemError`].
pub fn private_key(text: &[u8]) -> Result<Zeroizing<Vec<u8>>, PemError> {
    match one(PrivatePkcs8KeyDer::pem_slice_iter(text), PRIVATE_KEY) {
        Ok(found) => Ok(Zeroizing::new(found.secret_pkcs8_der().to_vec())),
        Err(PemError::Missing(_)) if has_other_key(text) => Err(PemError::OtherKey),
        Err(error) => Err(error),
    }
}

/// A certificate, DER, as other programs read it.
pub fn encode(certificate: &[u8]) -> String {
    /// Characters of a line (RFC 7468 §2).
    const LINE: usize = 64;
    let text = data_encoding::BASE64.encode(certificate);
    let mut pem = format!("-----BEGIN {CERTIFICATE}-----\n");
    for line in text.as_bytes().chunks(LINE) {
        pem.extend(line.iter().copied().map(char::from));
        pem.push('\n');
    }
    pem + "-----END " + CERTIFICATE + "-----\n"
}

fn one<T>(mut found: impl Iterator<Item = Result<T, Error>>, label: &'static str) -> Result<T, PemError> {
    let first = found.next().ok_or(PemError::Missing(label))?;
    let first = first.map_err(|_| PemError::Encoding)?;
    match found.next() {
        None => Ok(first),
        Some(Ok(_)) => Err(PemError::Several(label)),
        Some(Err(_)) => Err(PemError::Encoding),
    }
}

fn has_other_key(text: &[u8]) -> bool {
    let text = String::from_utf8_lossy(text);
    ["EC PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY"]
        .iter()
        .any(|label| text.contains(&format!("-----BEGIN {label}-----")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(label: &str) -> String {
        format!("text around it\n-----BEGIN {label}-----\nAQID\n-----END {label}-----\n")
    }

    #[test]
    fn what_is_encoded_reads_back() {
        for bytes in [1, 47, 48, 49, 700] {
            let der = vec![0x30; bytes];
            let text = encode(&der);
            assert_eq!(certificate(text.as_bytes()), Ok(der));
            assert!(text.lines().all(|line| line.len() <= 64));
        }
    }

    #[test]
    fn a_file_holds_exactly_one_block_of_its_kind() {
        let certificate = |text: &str| certificate(text.as_bytes());
        assert_eq!(certificate(&block(CERTIFICATE)), Ok(vec![1, 2, 3]));
        assert_eq!(
            certificate(&(block(PRIVATE_KEY) + &block(CERTIFICATE))),
            Ok(vec![1, 2, 3])
        );
        assert_eq!(
            certificate(&block(CERTIFICATE).repeat(2)),
            Err(PemError::Several(CERTIFICATE))
        );
        for none in ["", "text", &block(PRIVATE_KEY)] {
            assert_eq!(certificate(none), Err(PemError::Missing(CERTIFICATE)), "{none}");
        }
        let damaged = block(CERTIFICATE).replace("AQID", "A*ID");
        assert_eq!(certificate(&damaged), Err(PemError::Encoding));
        let key = |text: &str| private_key(text.as_bytes()).map(|it| it.to_vec());
        assert_eq!(key(&block(PRIVATE_KEY)), Ok(vec![1, 2, 3]));
        assert_eq!(
            key(&block(PRIVATE_KEY).repeat(2)),
            Err(PemError::Several(PRIVATE_KEY))
        );
        assert_eq!(key(&block(CERTIFICATE)), Err(PemError::Missing(PRIVATE_KEY)));
        for other in ["EC PRIVATE KEY", "RSA PRIVATE KEY", "ENCRYPTED PRIVATE KEY"] {
            assert_eq!(key(&block(other)), Err(PemError::OtherKey), "{other}");
        }
    }
}
