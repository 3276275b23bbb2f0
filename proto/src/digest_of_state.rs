//! The digest of a set of objects, which says whether two states hold the same.

use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::wire::Object;

/// Equal for equal objects, in whatever order they came. It finds faults, not attackers: where one could change objects,
/// what carries them is authenticated.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct StateDigest([u8; 32]);

impl StateDigest {
    /// Adds an object or takes it out again: exclusive or of hashes does not depend on the order.
    pub fn toggle(&mut self, object: &Object) {
        self.mix(&Sha256::digest(object.encode_to_vec()).into());
    }

    /// Adds a hash, or takes it out again.
    pub fn mix(&mut self, hash: &[u8; 32]) {
        for (byte, other) in self.0.iter_mut().zip(hash) {
            *byte ^= other;
        }
    }

    /// The digest itself.
    pub fn bytes(&self) -> [u8; 32] {
        self.0
    }
}

impl From<[u8; 32]> for StateDigest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}
