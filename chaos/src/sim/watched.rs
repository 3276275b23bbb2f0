//! Somebody who follows a replica's events, and lists only where it is told to.

use std::collections::BTreeMap;

use bulkhead_proto::wire::{Kind, Object, event::Change, object::Object as Any};
use bulkhead_raft::Replica;
use bulkhead_raft::state::{Key, State};

use super::record::Id;

/// The versions of the objects that it knows, and up to which index.
#[derive(Debug, Default)]
pub(super) struct Watched {
    index: Option<u64>,
    known: BTreeMap<Id, u64>,
}

/// Id and version of an object of the kind that clients write.
fn read(object: &Object) -> Option<(Id, u64)> {
    match object.object.as_ref()? {
        Any::Secret(secret) => Some((
            secret.id.as_slice().try_into().ok()?,
            secret.meta.as_ref()?.version,
        )),
        _ => None,
    }
}

impl Watched {
    /// Goes on to a state; an error says what it missed.
    pub(super) fn follow(&mut self, replica: &Replica, state: &State) -> Result<(), String> {
        let listed = || state.list(Kind::Secret).filter_map(|object| read(object));
        let events = self.index.map(|index| replica.events_since(index));
        self.index = Some(state.index());
        let Some(Ok(events)) = events else {
            self.known = listed().collect();
            return Ok(());
        };
        for event in events {
            match &event.change {
                Some(Change::Put(object)) => self.known.extend(read(object)),
                Some(Change::Deleted(reference)) => {
                    let key = Key::from_wire(reference).filter(|key| key.kind() == Kind::Secret);
                    if let Some(key) = key {
                        self.known.remove(key.id());
                    }
                }
                None => {}
            }
        }
        let missed = listed().find(|(id, version)| self.known.get(id) != Some(version));
        match missed {
            Some((id, version)) => Err(format!(
                "no event told of {:02x?} in version {version}, up to index {}",
                &id[6..],
                state.index()
            )),
            None if self.known.len() != listed().count() => Err("no event told of a removal".to_owned()),
            None => Ok(()),
        }
    }
}
