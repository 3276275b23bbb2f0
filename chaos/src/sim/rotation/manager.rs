//! A manager's own part: it asks the leader how old its replica is, follows the rotation, says so in its record, signs for
//! others, and carries the rotation on while it leads. What it decides is the real code's to say.

use std::time::Duration;

use bulkhead_identity::follow::{Due, due};
use bulkhead_identity::{Bundle, Key as PrivateKey};
use bulkhead_manager::ca::renewal::{self, Renewal};
use bulkhead_manager::ca::rotation::{self, Signer};
use bulkhead_manager::ca::trust;
use bulkhead_manager::view;
use bulkhead_proto::wire::{Node, NodeStatus, RejectionCode, object::Object as Any};
use bulkhead_proto::{KeyId, NodeId, RequestId, limits};
use bulkhead_raft::Replica;
use tokio::time::{Instant, sleep};

use super::world::{Number, World, handed_out, public, replace};
use crate::sim::dice::Dice;

/// As the programs: without a leader or a session for this long, a node asks to be taken back.
pub(super) const ALONE: Duration = Duration::from_secs(5);
/// And asks again at most this often.
pub(super) const AGAIN: Duration = Duration::from_secs(15);
/// A decision that another change overtook is made again so often.
const ATTEMPTS: usize = 8;

/// Asks the leader for a read index, again and again.
pub(super) async fn ask(world: World, me: Number) {
    let mut life = None;
    loop {
        sleep(limits::FRESHNESS_PERIOD).await;
        let Some((now_life, replica)) = world.live.life(me) else {
            continue;
        };
        if life.replace(now_life) != Some(now_life) {
            world.fresh(me, |it| *it = bulkhead_manager::Freshness::default());
        }
        if !world.runs(me) {
            continue;
        }
        let (asking, sent_at) = (world.clone(), world.monotonic());
        // Beside the next question, as several may be under way.
        tokio::spawn(async move {
            let index = tokio::time::timeout(limits::FRESHNESS, read_index(&asking, me, &replica)).await;
            if let Ok(Some(index)) = index {
                asking.fresh(me, |it| {
                    it.answered(sent_at, index);
                    it.applied(replica.index());
                });
            }
        });
    }
}

async fn read_index(world: &World, me: Number, own: &Replica) -> Option<u64> {
    if own.leadership().borrow().leading.is_some() {
        return own.read_index().await.ok();
    }
    let (leader, replica) = world.live.leader()?;
    if !world.switch.carries(me, leader).await || !world.meets(me, leader, false) {
        return None;
    }
    let index = replica.read_index().await.ok()?;
    world.switch.carries(leader, me).await.then_some(index)
}

/// Follows the cluster.
pub(super) async fn follow(world: World, me: Number, dice: Dice) {
    let mut looked: Option<(u64, u64, Instant)> = None;
    let mut asked = Instant::now();
    let mut fresh_at = Instant::now();
    loop {
        sleep(dice.micros(5_000, 25_000)).await;
        let Some((life, replica)) = world.live.life(me) else {
            // A new program begins with patience.
            (asked, fresh_at) = (Instant::now(), Instant::now());
            continue;
        };
        if !world.runs(me) {
            continue;
        }
        world.fresh(me, |it| it.applied(replica.index()));
        if !world.is_fresh(me) {
            if fresh_at.elapsed() > ALONE && asked.elapsed() > AGAIN {
                asked = Instant::now();
                come_back(&world, me).await;
            }
            continue;
        }
        fresh_at = Instant::now();
        world.hear(me);
        let state = replica.state();
        let Some(cluster) = view::cluster(&state) else {
            continue;
        };
        let version = cluster.meta.as_ref().map_or(0, |meta| meta.version);
        let (mine, current) = world.credentials(me);
        let seen = looked.is_some_and(|(cluster, own, at)| {
            (cluster, own) == (version, mine) && at.elapsed() < Duration::from_secs(2)
        });
        if seen || world.is_deaf(me) {
            continue;
        }
        looked = Some((version, mine, Instant::now()));
        match trust::told(cluster, |told| due(&current, told)).expect("a root of the cluster") {
            Some(Due::Trust) => {
                let bundle = Bundle::from_ders(trust::roots(cluster))
                    .and_then(|it| it.with_former(trust::former(cluster)))
                    .expect("roots of the cluster");
                let new = current.with_bundle(bundle);
                world.adopt(me, new, "trusts other roots");
                continue; // and looks at once whether it has to renew
            }
            Some(Due::Renew) => renew(&world, me).await,
            None => {}
        }
        let still = world.live.life(me).is_some_and(|(now, _)| now == life);
        let state = replica.state();
        let Some(record) = view::node(&state, world.node(me)).filter(|_| still) else {
            continue;
        };
        let new = trust::said(cluster, record, &world.credentials(me).1, world.now_ms());
        if new != *record {
            let unchanged = vec![renewal::unchanged(record)];
            let _said_again = world
                .propose(me, 0, unchanged, vec![replace(Any::Node(new))])
                .await;
        }
    }
}

/// A certificate of the root that signs, from itself or another.
async fn renew(world: &World, me: Number) {
    let others = world.live.members().into_iter().filter(|other| *other != me);
    for manager in [me].into_iter().chain(others) {
        let reached = manager == me
            || world.switch.carries(me, manager).await
                && world.meets(me, manager, false)
                && admits(world, manager, me);
        if reached && certified(world, manager, me, "renewed").await {
            return;
        }
    }
}

/// Asks each manager in turn to take a node back that proves its key.
pub(super) async fn come_back(world: &World, me: Number) {
    for manager in world.live.members().into_iter().filter(|other| *other != me) {
        let reached = world.switch.carries(me, manager).await && world.meets(me, manager, false);
        if !reached || !world.runs(manager) || !world.is_fresh(manager) {
            continue;
        }
        let state = world.live.get(manager).map(|it| it.state());
        let (_, current) = world.credentials(me);
        let subject = current.certificate.subject();
        let listed = state.as_ref().and_then(|state| {
            let record = view::node(state, subject.node)?;
            record
                .keys
                .iter()
                .find(|it| it.key_id == current.key.key_id().as_bytes())
        });
        let may = listed.is_some_and(|it| renewal::may_return(subject.role, it.not_after, world.now_ms()));
        if may && certified(world, manager, me, "came back by its key").await {
            world.count(|tally| tally.returns += 1);
            return;
        }
    }
}

/// Whether an ordinary call of this node is served: its key is listed, and its root was not dropped.
pub(super) fn admits(world: &World, manager: Number, node: Number) -> bool {
    if !world.runs(manager) || !world.is_fresh(manager) {
        return false;
    }
    let Some(state) = world.live.get(manager).map(|it| it.state()) else {
        return false;
    };
    let (_, credentials) = world.credentials(node);
    let listed = view::node(&state, world.node(node)).is_some_and(|record| {
        let id = credentials.key.key_id();
        record.keys.iter().any(|it| it.key_id == id.as_bytes())
    });
    let dropped = view::cluster(&state).is_none_or(|cluster| {
        trust::is_dropped(cluster, &trust::dropped(cluster), &credentials.certificate, false)
    });
    listed && !dropped
}

/// A manager commits a certificate for a node's new key, and the node takes it up if its answer comes through.
pub(super) async fn certified(world: &World, manager: Number, node: Number, how: &str) -> bool {
    let Ok(key) = PrivateKey::generate() else {
        return false;
    };
    let (_, current) = world.credentials(node);
    let life = world.live.life(node).map(|(life, _)| life);
    let subject = current.certificate.subject();
    let asked = Asked {
        node: subject.node,
        presented: current.key.key_id(),
        request: RequestId::try_from(world.request_id().as_slice()).expect("16 bytes"),
    };
    if !reissue(world, manager, &asked, &key).await || !world.is_fresh(manager) {
        return false;
    }
    let Some(state) = world.live.get(manager).map(|it| it.state()) else {
        return false;
    };
    let former = current.bundle.former();
    let Some(new) = handed_out(&state, subject.node, key, former) else {
        return false;
    };
    let comes = manager == node || world.switch.carries(manager, node).await;
    // Whoever died meanwhile has forgotten the new key.
    if !comes || !world.runs(node) || world.live.life(node).map(|(life, _)| life) != life {
        return false;
    }
    world.adopt(node, new, how);
    true
}

struct Asked {
    node: NodeId,
    presented: KeyId,
    request: RequestId,
}

async fn reissue(world: &World, manager: Number, asked: &Asked, key: &PrivateKey) -> bool {
    let public = public(key);
    for _ in 0..ATTEMPTS {
        if !world.runs(manager) || !world.is_fresh(manager) {
            return false;
        }
        let Some(state) = world.live.get(manager).map(|it| it.state()) else {
            return false;
        };
        match renewal::plan(&state, asked.node, asked.presented, &public, asked.request) {
            Err(_) => return false,
            Ok(Renewal::Committed) => return true,
            Ok(Renewal::Sign) => {}
        }
        let (Some(record), Some(cluster)) = (view::node(&state, asked.node), view::cluster(&state)) else {
            return false;
        };
        let Some(role) = view::role(record.role()) else {
            return false;
        };
        let signed = world.issue(manager, cluster, asked.node, role, &public);
        world.stall().await;
        let (conditions, changes) =
            renewal::with_key(record, cluster, asked.presented, signed, role, world.now_ms());
        match world.propose(manager, 0, conditions, changes).await {
            None => return false,
            Some(outcome) => match outcome.rejection {
                None => {
                    // Read from this manager's own replica.
                    while world
                        .live
                        .get(manager)
                        .is_some_and(|it| it.index() < outcome.index)
                    {
                        sleep(Duration::from_millis(1)).await;
                    }
                    return world.live.get(manager).is_some();
                }
                Some(rejection) if rejection.code() == RejectionCode::Stale => {}
                Some(_) => return false,
            },
        }
    }
    false
}

/// While it leads: the rotation's next step, and who is down.
pub(super) async fn lead(world: World, me: Number, dice: Dice) {
    let mut led: Option<(u64, Instant)> = None;
    let mut looked = (0, Instant::now());
    loop {
        sleep(dice.micros(5_000, 20_000)).await;
        let Some(replica) = world.live.get(me).filter(|_| world.runs(me)) else {
            continue;
        };
        let Some(term) = replica.leadership().borrow().leading else {
            led = None;
            continue;
        };
        let since = match led {
            Some((of, since)) if of == term => since,
            _ => {
                let now = Instant::now();
                led = Some((term, now));
                now
            }
        };
        let state = replica.state();
        if looked.0 == state.index() && looked.1.elapsed() < Duration::from_millis(500) {
            continue;
        }
        looked = (state.index(), Instant::now());
        if let Some((unchanged, change, what)) = rotation::plan(&state, Signer::Signs, world.now_ms()) {
            world.stall().await;
            let outcome = world.propose(me, term, vec![unchanged], vec![change]).await;
            if outcome.is_some_and(|it| it.rejection.is_none()) {
                world.record.note(format_args!("n{me} committed: {what}"));
            }
            continue;
        }
        for number in world.numbers() {
            let Some(record) = view::node(&state, world.node(number)) else {
                continue;
            };
            let silent = world.silent_for(number);
            let down = record.status() == NodeStatus::Down;
            let grown = since.elapsed() > limits::LIVENESS_EXTENSION;
            let status = match down {
                false if silent > limits::WORKER_LIVENESS && grown => NodeStatus::Down,
                true if silent < Duration::from_secs(1) => NodeStatus::Ready,
                _ => continue,
            };
            let new = Node {
                status: status.into(),
                ..record.clone()
            };
            let unchanged = vec![renewal::unchanged(record)];
            let _planned_again = world
                .propose(me, term, unchanged, vec![replace(Any::Node(new))])
                .await;
        }
    }
}
