//! Blobs that nothing refers to go, after a grace in which an image under way can still claim them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::seam::Clock;
use bulkhead_proto::wire::{Kind, object::Object as Any};
use bulkhead_proto::{Digest, limits};
use bulkhead_raft::state::State;
use tokio_util::sync::CancellationToken;

use super::{Registry, blocking};
use crate::refusal::chain;

/// A small part of the grace: what is due goes soon after, and an idle manager is not kept awake.
const PERIOD: Duration = Duration::from_secs(300);

/// The blobs that the images of this state are made of.
pub(super) fn referenced(state: &State) -> BTreeSet<Digest> {
    let mut digests = BTreeSet::new();
    for object in state.list(Kind::Image) {
        let Some(Any::Image(image)) = &object.object else {
            continue;
        };
        let layers = image.layers.iter().map(|layer| &layer.digest);
        for digest in layers.chain([&image.manifest_digest, &image.config_digest]) {
            digests.extend(<[u8; 32]>::try_from(&digest[..]).map(Digest::from_bytes));
        }
    }
    digests
}

/// Removes unreferenced blobs until it is stopped. `view` answers nothing while the replica is not fresh: an image that
/// it has not heard of yet would lose its blobs.
pub async fn collect_loop(
    registry: Registry,
    view: impl Fn() -> Option<State>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let mut period = tokio::time::interval(PERIOD);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = period.tick() => {}
        }
        let Some(state) = view() else { continue };
        let now = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
        let grace = i64::try_from(limits::BLOB_GRACE.as_millis()).unwrap_or(i64::MAX);
        let referenced = referenced(&state);
        let store = registry.store.clone();
        match blocking(move || store.collect(&referenced, now.saturating_sub(grace))).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "removed blobs that no image refers to"),
            Err(error) => tracing::warn!(error = chain(&error), "could not remove unused blobs"),
        }
    }
}
