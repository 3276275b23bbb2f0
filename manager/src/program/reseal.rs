//! A manager's own part in renewing what protects its disk: a new data key, and nothing left that the one before opens,
//! nor any older entry, when the cluster asks for it. It says so in its record once it is done.

use std::time::Duration;

use bulkhead_identity::Unswapped;
use bulkhead_proto::wire::Node;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::member::Member;
use super::{record, trust};
use crate::{lock, view};

/// How often it looks, and tries again.
const LOOK: Duration = Duration::from_secs(1);
/// One try. Without a quorum nothing old can be let go of; the next try finds it then.
const TRY: Duration = Duration::from_secs(60);

/// Does what is asked, until stopped.
pub(super) async fn follow(member: &Member, stop: &CancellationToken) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let Some(asked) = asked(member) else { continue };
        // A key that was taken before may have lain under an older unlock key: it is finished, and another one is taken.
        let resumed = member.has_former_data_key();
        let done = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            // Dropping it leaves the former key in its place, and the whole is done again.
            done = timeout(TRY, once(member)) => done,
        };
        match done {
            Ok(Ok(())) if resumed => {}
            Ok(Ok(())) => {
                tracing::info!(target: "audit", asked, "the store is sealed anew; nothing older is left");
                let resealed = |node: &Node| Node {
                    resealed: asked,
                    ..node.clone()
                };
                if let Err(error) = record::say(member, resealed).await {
                    tracing::warn!(%error, "the store is sealed anew, which could not be said");
                }
            }
            Ok(Err(error)) => tracing::warn!(error = format!("{error:#}"), "the store was not sealed anew"),
            Err(_) => tracing::info!("the store is not sealed anew yet"),
        }
    }
}

/// What the cluster asks for, where this manager has not done it yet.
fn asked(member: &Member) -> Option<u32> {
    // What a replica that is catching up shows may lie before what is asked for.
    if !member.fresh.is_fresh() {
        return None;
    }
    let state = member.replica.state();
    let cluster = view::cluster(&state)?;
    // First the lock: a new data key is never written under the unlock key of before, or in the clear.
    if trust::locked_with(member) != lock::generation(cluster) {
        return None;
    }
    let asked = cluster.reseal;
    let done = view::node(&state, member.node())?.resealed;
    (done < asked || member.has_former_data_key()).then_some(asked)
}

async fn once(member: &Member) -> anyhow::Result<()> {
    let key = Unswapped::filled(|key| member.machine.entropy.fill(key))?;
    member.renew_data_key(key)?;
    member.replica.reseal().await?;
    Ok(member.forget_data_key()?)
}
