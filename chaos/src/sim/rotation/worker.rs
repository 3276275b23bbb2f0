//! A fake worker: one session with some manager, in which it hears what to trust, says what it does, and renews.

use bulkhead_identity::Bundle;
use bulkhead_identity::follow::{Due, due};
use bulkhead_manager::ca::{renewal, trust};
use bulkhead_manager::view;
use bulkhead_proto::wire::{Node, object::Object as Any};
use tokio::time::{Instant, sleep};

use super::manager::{AGAIN, ALONE, admits, certified, come_back};
use super::world::{Number, World, replace};
use crate::sim::dice::Dice;

pub(super) async fn run(world: World, me: Number, dice: Dice) {
    let mut session: Option<Number> = None;
    let mut alone = Instant::now();
    let mut asked: Option<Instant> = None;
    loop {
        sleep(dice.micros(40_000, 120_000)).await;
        if !world.runs(me) {
            session = None;
            alone = Instant::now();
            continue;
        }
        session = match session {
            Some(manager) => attend(&world, me, manager).await.then_some(manager),
            None => begin(&world, me, &dice).await,
        };
        if session.is_some() {
            alone = Instant::now();
            asked = None;
        } else if alone.elapsed() > ALONE && asked.is_none_or(|at| at.elapsed() > AGAIN) {
            asked = Some(Instant::now());
            come_back(&world, me).await;
        }
    }
}

/// Shakes hands with some manager.
async fn begin(world: &World, me: Number, dice: &Dice) -> Option<Number> {
    let manager = dice.pick(&world.live.members())?;
    if !world.switch.carries(me, manager).await || !world.runs(manager) {
        return None;
    }
    let met = world.meets(me, manager, true);
    world.count(|tally| match met {
        true => tally.handshakes += 1,
        false => tally.refused += 1,
    });
    (met && admits(world, manager, me) && world.switch.carries(manager, me).await).then_some(manager)
}

/// One beat of the session; whether it goes on. With new credentials the next one begins.
async fn attend(world: &World, me: Number, manager: Number) -> bool {
    if !world.switch.carries(me, manager).await || !admits(world, manager, me) {
        return false;
    }
    let Some(state) = world.live.get(manager).map(|it| it.state()) else {
        return false;
    };
    world.hear(me);
    describe(world, me, manager).await;
    if !world.switch.carries(manager, me).await || !world.runs(me) {
        return false;
    }
    let Some(cluster) = view::cluster(&state) else {
        return false;
    };
    if world.is_deaf(me) {
        return true;
    }
    let (_, current) = world.credentials(me);
    let says = trust::told(cluster, |told| {
        let told = bulkhead_identity::follow::Told {
            former: None,
            ..*told
        };
        due(&current, &told)
    });
    match says.expect("a root of the cluster") {
        None => true,
        Some(Due::Trust) => {
            let bundle = Bundle::from_ders(trust::roots(cluster)).expect("roots of the cluster");
            let new = current.with_bundle(bundle);
            world.adopt(me, new, "trusts other roots");
            false
        }
        Some(Due::Renew) => !certified(world, manager, me, "renewed").await,
    }
}

/// The manager keeps in the worker's record what it says, and the root of the certificate that it came with.
async fn describe(world: &World, me: Number, manager: Number) {
    let Some(state) = world.live.get(manager).map(|it| it.state()) else {
        return;
    };
    let (_, current) = world.credentials(me);
    let (Some(record), Some(cluster)) = (view::node(&state, world.node(me)), view::cluster(&state)) else {
        return;
    };
    let new = Node {
        trusts: current.bundle.key_ids(),
        issuer: trust::used(cluster, &current.certificate),
        ..record.clone()
    };
    if new != *record {
        let unchanged = vec![renewal::unchanged(record)];
        let _said_again = world
            .propose(manager, 0, unchanged, vec![replace(Any::Node(new))])
            .await;
    }
}
