//! The secrets that tasks of this node need: in memory only, wiped when the last such task is gone.

use bulkhead_proto::SecretId;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use zeroize::Zeroizing;

/// Secret values by id. Cannot be printed and cannot be copied.
#[derive(Default)]
pub struct Secrets(BTreeMap<SecretId, Zeroizing<Vec<u8>>>);

impl Secrets {
    /// Takes a value in, in place of an older one.
    pub fn put(&mut self, id: SecretId, value: Zeroizing<Vec<u8>>) {
        self.0.insert(id, value);
    }

    /// The value, to be handed to a task and nowhere else.
    pub fn get(&self, id: SecretId) -> Option<&[u8]> {
        self.0.get(&id).map(|value| value.as_slice())
    }

    /// Which are held.
    pub fn ids(&self) -> impl Iterator<Item = SecretId> {
        self.0.keys().copied()
    }

    /// Wipes all but these.
    pub fn keep_only(&mut self, needed: &BTreeSet<SecretId>) {
        self.0.retain(|id, _| needed.contains(id));
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}
