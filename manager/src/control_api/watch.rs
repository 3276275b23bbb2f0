//! Changes as they are committed, from an index that the caller knows.
//!
//! The stream ends with its caller's right to it: the authorisation layer sees to that.

use bulkhead_proto::wire::{Event, Kind, Object, WatchRequest, WatchResponse, event, object::Object as Any};
use bulkhead_proto::{Code, limits};
use bulkhead_raft::Replica;
use bulkhead_raft::state::{Compacted, Key};
use futures::StreamExt as _;
use futures::stream::{BoxStream, try_unfold};
use prost::Message as _;
use tonic::Status;

use super::{check, secrets, tickets};
use crate::refusal::refuse;

/// Bytes of events in one message.
const BATCH_BYTES: usize = limits::MESSAGE_BYTES / 4;

/// The events after the request's index, and then those to come.
pub(super) fn watch(
    replica: Replica,
    request: &WatchRequest,
) -> Result<BoxStream<'static, Result<WatchResponse, Status>>, Status> {
    let kinds = request.kinds.iter().map(|kind| match Kind::try_from(*kind) {
        Ok(kind) if kind != Kind::Unspecified => Ok(kind),
        _ => Err(check::invalid("kinds", "there is no such kind of object")),
    });
    let kinds: Vec<Kind> = kinds.collect::<Result<_, _>>()?;
    let from = match request.after {
        _ if request.oldest => replica.events_from(),
        0 => replica.index(),
        after => after,
    };
    // Refused before the stream begins, where the caller reads it as the call's own failure.
    replica.events_since(from).map_err(|error| compacted(&error))?;
    // The first message says from where, so that a quiet cluster shows that the watch stands.
    let begun = WatchResponse {
        index: from,
        events: Vec::new(),
    };
    let batches = try_unfold((replica, from), move |(replica, after)| {
        let kinds = kinds.clone();
        async move {
            let mut applied = replica.applied();
            let reached = match applied.wait_for(|applied| *applied > after).await {
                Ok(()) => *applied.borrow(),
                Err(_) => return Ok(None),
            };
            let events = replica.events_since(after).map_err(|error| compacted(&error))?;
            let events: Vec<Event> = events.iter().map(|it| Event::clone(it)).collect();
            let reached = events.last().map_or(reached, |it| it.index.max(reached));
            let messages = batches(events, &kinds, reached);
            Ok::<_, Status>(Some((
                futures::stream::iter(messages.into_iter().map(Ok)),
                (replica, reached),
            )))
        }
    });
    let flat = batches.flat_map(|batch| match batch {
        Ok(messages) => messages.boxed(),
        Err(status) => futures::stream::iter([Err(status)]).boxed(),
    });
    Ok(futures::stream::iter([Ok(begun)]).chain(flat).boxed())
}

fn compacted(error: &Compacted) -> Status {
    refuse(
        Code::Compacted,
        tonic::Code::OutOfRange,
        error.to_string(),
        "list what you watch again, then watch from the index of that answer",
    )
}

/// The events of these kinds in messages of bounded size. All that is known up to a message's index is in it or before
/// it, so one that ends within a transaction names the index before.
fn batches(events: Vec<Event>, kinds: &[Kind], reached: u64) -> Vec<WatchResponse> {
    let mut messages = Vec::new();
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for event in events
        .into_iter()
        .filter(|it| kinds.is_empty() || kinds.contains(&kind(it)))
    {
        let event = shown(event);
        let size = event.encoded_len();
        if !batch.is_empty() && bytes + size > BATCH_BYTES {
            messages.push(WatchResponse {
                index: event.index - 1,
                events: std::mem::take(&mut batch),
            });
            bytes = 0;
        }
        bytes += size;
        batch.push(event);
    }
    messages.push(WatchResponse {
        index: reached,
        events: batch,
    });
    messages
}

fn kind(event: &Event) -> Kind {
    match &event.change {
        Some(event::Change::Put(object)) => match &object.object {
            Some(Any::Cluster(_)) => Kind::Cluster,
            Some(Any::Node(_)) => Kind::Node,
            Some(Any::Ticket(_)) => Kind::Ticket,
            Some(Any::Secret(_)) => Kind::Secret,
            Some(Any::Image(_)) => Kind::Image,
            Some(Any::Service(_)) => Kind::Service,
            Some(Any::Task(_)) => Kind::Task,
            None => Kind::Unspecified,
        },
        Some(event::Change::Deleted(reference)) => {
            Key::from_wire(reference).map_or(Kind::Unspecified, |it| it.kind())
        }
        None => Kind::Unspecified,
    }
}

/// The event without what no operator needs to see: sealed values, ticket hashes, the key ring.
fn shown(mut event: Event) -> Event {
    let Some(event::Change::Put(Object { object: Some(any) })) = &mut event.change else {
        return event;
    };
    match any {
        Any::Secret(secret) => *secret = secrets::shown(secret),
        Any::Ticket(ticket) => *ticket = tickets::shown(ticket),
        Any::Cluster(cluster) => {
            cluster.root_key = None;
            cluster.key_ring.clear();
        }
        Any::Node(_) | Any::Image(_) | Any::Service(_) | Any::Task(_) => {}
    }
    event
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{Cluster, KeyRingEpoch, Sealed, Secret, Service, Ticket};

    use super::*;

    fn put(index: u64, any: Any) -> Event {
        Event {
            index,
            change: Some(event::Change::Put(Object { object: Some(any) })),
            ..Default::default()
        }
    }

    fn secret(index: u64, size: usize) -> Event {
        let name = "x".repeat(size);
        put(
            index,
            Any::Secret(Secret {
                name,
                ..Default::default()
            }),
        )
    }

    #[test]
    fn what_is_sealed_or_hashed_is_not_shown() {
        let canary = b"canary-51c0".to_vec();
        let sealed = || {
            Some(Sealed {
                epoch: 1,
                nonce: Vec::new(),
                ciphertext: canary.clone(),
            })
        };
        for any in [
            Any::Secret(Secret {
                value: sealed(),
                ..Default::default()
            }),
            Any::Ticket(Ticket {
                secret_hash: canary.clone(),
                ..Default::default()
            }),
            Any::Cluster(Cluster {
                root_key: sealed(),
                key_ring: vec![KeyRingEpoch::default()],
                ..Default::default()
            }),
        ] {
            let bytes = shown(put(1, any)).encode_to_vec();
            assert!(!bytes.windows(canary.len()).any(|it| it == canary));
        }
    }

    #[test]
    fn only_the_kinds_asked_for_come_and_the_index_moves_on() {
        let service = put(4, Any::Service(Service::default()));
        let messages = batches(vec![secret(3, 1), service], &[Kind::Service], 9);
        assert_eq!(
            (messages.len(), messages[0].index, messages[0].events.len()),
            (1, 9, 1)
        );
        let messages = batches(vec![secret(3, 1)], &[Kind::Task], 9);
        assert_eq!(
            (messages.len(), messages[0].index, messages[0].events.len()),
            (1, 9, 0)
        );
    }

    #[test]
    fn a_message_that_ends_within_a_transaction_does_not_claim_it() {
        let large = BATCH_BYTES / 2 + 1;
        let messages = batches(vec![secret(5, large), secret(5, large), secret(6, large)], &[], 6);
        let indexes: Vec<u64> = messages.iter().map(|it| it.index).collect();
        assert_eq!(indexes, [4, 5, 6]);
    }
}
