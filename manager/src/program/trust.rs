//! A manager's own part in a rotation of the root and in autolock: it trusts what the cluster trusts, has a certificate of
//! the root that signs, seals its key file as the cluster wants it, and says so in its record; and it comes back by its key
//! when the others refuse its certificate.

use std::time::Duration;

use bulkhead_identity::comeback::come_back;
use bulkhead_identity::follow::{Due, due};
use bulkhead_identity::tls::Expect;
use bulkhead_identity::{Bundle, Credentials, UnlockKey};
use bulkhead_proto::wire::{Cluster, Node};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::member::Member;
use super::{record, renewal};
use crate::ca::{self, trust};
use crate::refusal::chain;
use crate::{lock, view};

/// Finds what failed before.
const LOOK: Duration = Duration::from_secs(2);
/// A manager that hears no leader for this long asks the others whether its certificate is the reason.
const ALONE: Duration = Duration::from_secs(5);
/// And asks again after this time where none of them could say,
const UNDECIDED: Duration = Duration::from_secs(2);
/// or after this where one refused it: they listen to few wrong proofs of one address.
const REFUSED: Duration = Duration::from_secs(15);

/// Follows the cluster until stopped.
pub(super) async fn follow(member: &Member, stop: &CancellationToken) {
    let mut applied = member.replica.applied();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = None;
    let mut not_before = Instant::now();
    loop {
        // Whether this manager's certificate opens nothing any more. Raft's methods it still opens: such a manager may lead.
        let mut behind = false;
        // Cancel-safe: each only says that it is time to look.
        let ticked = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => true,
            () = member.fresh.root_dropped() => {
                behind = true;
                false
            }
            changed = applied.changed() => {
                if changed.is_err() {
                    return;
                }
                false
            }
        };
        let state = member.replica.state();
        let version = view::cluster(&state)
            .and_then(|it| it.meta.as_ref())
            .map(|it| it.version);
        // What a replica that is catching up shows is the past: roots that were dropped since are not to be trusted.
        if member.fresh.is_fresh() && (ticked || version != seen) {
            seen = version;
            if let Err(error) = member.keep_managers(ca::manager_addresses(&state)) {
                tracing::warn!(error = chain(&error), "the managers' addresses could not be kept");
            }
            if let Some(cluster) = view::cluster(&state) {
                match once(member, cluster).await {
                    Ok(left) => behind = left,
                    Err(error) => tracing::warn!(
                        error = format!("{error:#}"),
                        "roots, certificate or lock could not be changed"
                    ),
                }
            }
        }
        let ended = member.machine.now_ms() > member.identity.current().certificate.not_after_ms();
        let alone = ticked && (ended || member.fresh.stale_for() > ALONE);
        if (alone || behind) && Instant::now() >= not_before {
            let wait = come_back_by_key(member).await;
            not_before = Instant::now() + wait;
        }
    }
}

/// Whether it was left behind: it needs a certificate of the root that signs, and every manager refuses the one it has.
async fn once(member: &Member, cluster: &Cluster) -> anyhow::Result<bool> {
    let due = || trust::told(cluster, |told| due(&member.identity.current(), told));
    if due()? == Some(Due::Trust) {
        let bundle = Bundle::from_ders(trust::roots(cluster))?.with_former(trust::former(cluster))?;
        member.trusts(bundle)?;
        tracing::info!(target: "audit", "this manager trusts other roots now");
    }
    if relock(member, cluster)? {
        // Said at once: whoever turned autolock on waits for it.
        report(member, cluster).await?;
        // The key in use stood in the clear. The first renewal takes another, the second makes the cluster forget it.
        let _later = renewal::once(member).await && renewal::once(member).await;
    }
    let behind = due()? == Some(Due::Renew) && !renewal::once(member).await;
    report(member, cluster).await?;
    Ok(behind)
}

/// Seals the key file as the cluster wants it; whether it stood in the clear until now.
fn relock(member: &Member, cluster: &Cluster) -> anyhow::Result<bool> {
    let wanted = lock::generation(cluster);
    if locked_with(member) == wanted {
        return Ok(false);
    }
    let was_open = locked_with(member) == 0;
    member.lock_with(lock::wanted(cluster, &member.key_ring)?)?;
    tracing::info!(target: "audit", unlock_key = wanted, "this manager's key file is sealed anew");
    Ok(was_open)
}

/// The unlock key that this manager's key file is sealed with; 0: none.
pub(super) fn locked_with(member: &Member) -> u32 {
    member.keys(|keys| keys.lock.as_ref().map_or(0, UnlockKey::generation))
}

/// Keeps what this manager trusts, uses, opens and is locked with in its record.
async fn report(member: &Member, cluster: &Cluster) -> anyhow::Result<()> {
    let current = member.identity.current();
    record::say(member, |node| Node {
        locked_with: locked_with(member),
        // One that has no envelope yet says so by what it said before.
        opened_epoch: member.key_ring.newest(cluster).unwrap_or(node.opened_epoch),
        ..trust::said(cluster, node, &current, member.machine.now_ms())
    })
    .await
}

/// Asks one manager after the other. For how long none is to be asked again.
async fn come_back_by_key(member: &Member) -> Duration {
    let mut wait = UNDECIDED;
    let _turn = member.turn().await;
    let members = member.replica.members();
    for other in members.nodes.values().filter(|other| other.node != member.node()) {
        let current = member.identity.current();
        let expect = Expect::Manager(other.node);
        match come_back(&current, &other.address, expect, &*member.machine.entropy).await {
            Ok(credentials) => match taken_up(member, credentials) {
                Ok(()) => {
                    tracing::info!(target: "audit", "this manager came back by its committed key");
                    return UNDECIDED;
                }
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "new credentials could not be kept")
                }
            },
            Err(error) => {
                if !error.is_undecided() {
                    wait = REFUSED;
                }
                tracing::debug!(
                    manager = other.address,
                    error = chain(&error),
                    "not taken back there"
                );
            }
        }
    }
    wait
}

/// By the former root it goes on meeting managers that are not back yet.
fn taken_up(member: &Member, new: Credentials) -> anyhow::Result<()> {
    let former = member.identity.current();
    let bundle = new.bundle.clone().with_former(former.bundle.former())?;
    Ok(member.renewed(Credentials { bundle, ..new })?)
}
