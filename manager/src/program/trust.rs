//! A manager's own part in a rotation of the root: it trusts what the cluster trusts, has a certificate of the root that
//! signs, and says so in its record; and it comes back by its key when the others refuse its certificate.

use std::time::Duration;

use bulkhead_identity::comeback::come_back;
use bulkhead_identity::tls::Expect;
use bulkhead_identity::{Bundle, Credentials};
use bulkhead_proto::RequestId;
use bulkhead_proto::wire::{Change, Cluster, Node, change::Change as Step, object::Object as Any};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::member::Member;
use super::renewal;
use crate::ca::renewal::unchanged;
use crate::ca::trust;
use crate::view;

/// Finds what failed before.
const LOOK: Duration = Duration::from_secs(2);
/// A manager that hears no leader for this long asks the others whether its certificate is the reason.
const ALONE: Duration = Duration::from_secs(5);
/// And asks again at most this often.
const AGAIN: Duration = Duration::from_secs(15);

/// Follows the cluster until stopped.
pub(super) async fn follow(member: &Member, stop: &CancellationToken) {
    let mut applied = member.replica.applied();
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = None;
    let mut asked: Option<Instant> = None;
    loop {
        // Cancel-safe: both only say that it is time to look.
        let ticked = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => true,
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
            if let Some(cluster) = view::cluster(&state)
                && let Err(error) = once(member, cluster).await
            {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the roots or the certificate could not be changed"
                );
            }
        }
        let ended = member.machine.now_ms() > member.identity.current().certificate.not_after_ms();
        let alone =
            (ended || member.fresh.stale_for() > ALONE) && asked.is_none_or(|at| at.elapsed() > AGAIN);
        if ticked && alone {
            asked = Some(Instant::now());
            come_back_by_key(member).await;
        }
    }
}

async fn once(member: &Member, cluster: &Cluster) -> anyhow::Result<()> {
    let current = member.identity.current();
    let roots = trust::roots(cluster);
    let former = trust::former(cluster);
    if current.bundle.ders() != roots || current.bundle.former() != former {
        let bundle = Bundle::from_ders(roots)?.with_former(former)?;
        member.renewed(current.with_bundle(bundle)?)?;
        tracing::info!(target: "audit", "this manager trusts other roots now");
    }
    let current = member.identity.current();
    let issuer = trust::key_id(trust::issuer(cluster).0)?;
    if used(&current) != Some(issuer.to_wire()) {
        renewal::once(member).await;
    }
    report(member).await
}

/// The root that issued this manager's certificate.
fn used(credentials: &Credentials) -> Option<Vec<u8>> {
    let root = credentials.bundle.issuer_of(&credentials.certificate)?;
    Some(root.key_id().to_wire())
}

/// Keeps what this manager trusts and uses in its record.
async fn report(member: &Member) -> anyhow::Result<()> {
    let state = member.replica.state();
    let Some(record) = view::node(&state, member.node()) else {
        return Ok(());
    };
    let current = member.identity.current();
    let (trusts, issuer) = (current.bundle.key_ids(), used(&current).unwrap_or_default());
    if (&record.trusts, &record.issuer) == (&trusts, &issuer) || !member.fresh.is_fresh() {
        return Ok(());
    }
    let new = Node {
        trusts,
        issuer,
        ..record.clone()
    };
    let change = Change {
        change: Some(Step::Replace(view::object(Any::Node(new)))),
    };
    let mut id = [0; 16];
    member.machine.entropy.fill(&mut id)?;
    let actor = format!("manager/{}", member.node());
    // Overtaken or not proposed: it is said again.
    let _ = member
        .proposer
        .client(
            &actor,
            RequestId::from_bytes(id),
            vec![unchanged(record)],
            vec![change],
        )
        .await;
    Ok(())
}

async fn come_back_by_key(member: &Member) {
    let members = member.replica.members();
    for other in members.nodes.values().filter(|other| other.node != member.node()) {
        let current = member.identity.current();
        let expect = Expect::Manager(other.node);
        match come_back(&current, &other.address, expect, &*member.machine.entropy).await {
            Ok(credentials) => match taken_up(member, credentials) {
                Ok(()) => {
                    tracing::info!(target: "audit", "this manager came back by its committed key");
                    return;
                }
                Err(error) => {
                    tracing::error!(error = format!("{error:#}"), "new credentials could not be kept")
                }
            },
            Err(error) => tracing::debug!(
                manager = other.address,
                error = crate::refusal::chain(&error),
                "not taken back there"
            ),
        }
    }
}

/// By the former root it goes on meeting managers that are not back yet.
fn taken_up(member: &Member, new: Credentials) -> anyhow::Result<()> {
    let former = member.identity.current();
    let bundle = new.bundle.clone().with_former(former.bundle.former())?;
    Ok(member.renewed(Credentials { bundle, ..new })?)
}
