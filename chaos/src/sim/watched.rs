//! Clients that watch: they follow the changes, at one manager or another, and list only where they are told to.

use std::collections::BTreeMap;
use std::fmt;

use bulkhead_proto::wire::{Event, Kind, Object, event::Change, object::Object as Any};
use bulkhead_raft::Replica;
use bulkhead_raft::state::{Key, State};
use tokio::time::sleep;

use super::cluster::Live;
use super::dice::Dice;
use super::record::{Id, Record};
use crate::rules::Rule;

/// What a change of an object that is gone counts as.
const GONE: u64 = u64::MAX;

/// One client that watches. It goes on until its task is aborted.
pub(super) struct Watcher {
    dice: Dice,
    live: Live,
    record: Record,
    /// The member that it watches at.
    member: Option<u64>,
    /// Up to which index it was told.
    index: Option<u64>,
    /// The versions of the objects that it knows.
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

/// The same of a change.
fn changed(event: &Event) -> Option<(u64, Id, u64)> {
    let (id, version) = match event.change.as_ref()? {
        Change::Put(object) => read(object)?,
        Change::Deleted(reference) => {
            let key = Key::from_wire(reference).filter(|key| key.kind() == Kind::Secret)?;
            (*key.id(), GONE)
        }
    };
    Some((event.index, id, version))
}

impl Watcher {
    pub(super) fn new(dice: Dice, live: &Live, record: &Record) -> Self {
        Self {
            dice,
            live: live.clone(),
            record: record.clone(),
            member: None,
            index: None,
            known: BTreeMap::new(),
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            // Sometimes it is so slow that what it has not seen is kept no more.
            sleep(self.dice.micros(1_000, 300_000)).await;
            if self.member.is_none() || self.dice.percent(10) {
                self.member = self.dice.pick(&self.live.members());
            }
            match self.member.and_then(|member| self.live.get(member)) {
                None => self.member = None,
                Some(replica) if self.live.gate(replica.member()).is_closed() => {}
                Some(replica) => self.follow(&replica),
            }
        }
    }

    fn wrong(&self, what: impl fmt::Display) {
        self.record.violation(Rule::WatchesTellAll, what);
    }

    /// Goes on to the state of a replica, unless that is no newer than what it saw.
    fn follow(&mut self, replica: &Replica) {
        let state = replica.state();
        let Some(from) = self.index else {
            return self.list(&state);
        };
        if state.index() <= from {
            return;
        }
        let Ok(events) = replica.events_since(from) else {
            self.record.count(|counts| counts.compacted += 1);
            return self.list(&state);
        };
        let mut last = from + 1;
        for event in &events {
            if event.index < last || event.index > state.index() {
                return self.wrong(format_args!(
                    "m{}: a change at {} is told after {from}, at {}",
                    replica.member(),
                    event.index,
                    state.index()
                ));
            }
            last = event.index;
        }
        let changes: Vec<_> = events.iter().filter_map(|event| changed(event)).collect();
        self.record.told(from, state.index(), &changes);
        for (_, id, version) in changes {
            match version {
                GONE => self.known.remove(&id),
                version => self.known.insert(id, version),
            };
        }
        self.index = Some(state.index());
        let listed: BTreeMap<Id, u64> = state.list(Kind::Secret).filter_map(|it| read(it)).collect();
        if listed != self.known {
            let missed = listed
                .iter()
                .find(|(id, version)| self.known.get(*id) != Some(*version));
            self.wrong(format_args!(
                "m{}: from {from} to {} no change told of {missed:02x?}",
                replica.member(),
                state.index()
            ));
        }
    }

    fn list(&mut self, state: &State) {
        self.index = Some(state.index());
        self.known = state.list(Kind::Secret).filter_map(|it| read(it)).collect();
    }
}
