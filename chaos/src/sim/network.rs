//! A network in memory: seeded delays, partitions, and members that are gone.
//!
//! It behaves like connections do: what one stream carries stays in order, what is lost comes late (as retransmission
//! makes it), and across a cut nothing comes until the caller's deadline. What was sent into a cut may still come long after
//! its caller gave up, once the cut is healed, beside what newer connections bring: the kernel sends it again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, pending, ready};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_raft::runtime::Gate;
use bulkhead_raft::state::{Decoder, State, chunks};
use bulkhead_raft::transport::{InFlight, is_gapless, votes};
use bulkhead_raft::{Member, Raft, Snapshot, TypeConfig, Vote};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _, stream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderError,
    TransferLeaderRequest, VoteRequest, VoteResponse,
};
use tokio::time::{sleep, timeout};

use super::dice::Dice;
use super::record::Record;

/// How fast the network is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    /// Delay of a message, in microseconds: at least, and less than.
    pub(super) delay: (u64, u64),
    /// Messages in a hundred that have to be sent again.
    pub(super) loss: usize,
}

/// A good day: a few hundred microseconds.
pub(super) const CALM: Weather = Weather {
    delay: (100, 900),
    loss: 0,
};

/// Messages in a hundred, of those that were sent into a cut, that come once it is healed.
const LATE: usize = 30;
/// Between two tries of the kernel to send something again, and how many there are.
const RESENT: Duration = Duration::from_millis(150);
const RESENDS: usize = 40;

/// A program's life: after a restart the same member is another end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct End {
    pub(super) member: u64,
    pub(super) life: u64,
}

/// A program at its end of the network.
#[derive(Clone, Debug)]
struct Plugged {
    life: u64,
    raft: Raft,
    /// What it is sent while it is stopped waits for it.
    gate: Gate,
}

#[derive(Debug)]
struct Wires {
    plugged: BTreeMap<u64, Plugged>,
    /// From, to: nothing comes through.
    cut: BTreeSet<(u64, u64)>,
    /// As `cut`, link by link.
    clogged: BTreeSet<(u64, u64)>,
    /// Programs that are stopped: they hear nothing and say nothing.
    frozen: BTreeSet<u64>,
    weather: Weather,
}

impl Wires {
    fn carries(&self, from: u64, to: u64) -> bool {
        let link = (from, to);
        !self.cut.contains(&link)
            && !self.clogged.contains(&link)
            && !self.frozen.contains(&from)
            && !self.frozen.contains(&to)
    }
}

/// The network. Clones are the same one.
#[derive(Clone, Debug)]
pub(super) struct Switch {
    wires: Arc<Mutex<Wires>>,
    dice: Dice,
    record: Record,
}

impl Switch {
    pub(super) fn new(dice: Dice, record: Record) -> Self {
        let wires = Wires {
            plugged: BTreeMap::new(),
            cut: BTreeSet::new(),
            clogged: BTreeSet::new(),
            frozen: BTreeSet::new(),
            weather: CALM,
        };
        Self {
            wires: Arc::new(Mutex::new(wires)),
            dice,
            record,
        }
    }

    fn wires(&self) -> MutexGuard<'_, Wires> {
        self.wires.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn plug(&self, end: End, raft: Raft, gate: Gate) {
        let life = end.life;
        self.wires()
            .plugged
            .insert(end.member, Plugged { life, raft, gate });
    }

    pub(super) fn unplug(&self, end: End) {
        let mut wires = self.wires();
        if wires
            .plugged
            .get(&end.member)
            .is_some_and(|it| it.life == end.life)
        {
            wires.plugged.remove(&end.member);
        }
    }

    pub(super) fn cut(&self, pairs: impl IntoIterator<Item = (u64, u64)>) {
        self.wires().cut = pairs.into_iter().collect();
    }

    /// One direction of one link, beside what is cut already.
    pub(super) fn clog(&self, link: (u64, u64), clogged: bool) {
        let mut wires = self.wires();
        match clogged {
            true => wires.clogged.insert(link),
            false => wires.clogged.remove(&link),
        };
    }

    /// Everything comes through again.
    pub(super) fn heal(&self) {
        let mut wires = self.wires();
        wires.cut.clear();
        wires.clogged.clear();
        wires.weather = CALM;
    }

    pub(super) fn set_weather(&self, weather: Weather) {
        self.wires().weather = weather;
    }

    fn lives(&self, end: End) -> bool {
        let wires = self.wires();
        wires
            .plugged
            .get(&end.member)
            .is_some_and(|it| it.life == end.life)
    }

    /// One message from an end to a member: resolves when it arrives, or never. A dead end sends nothing.
    async fn hop(&self, from: End, to: u64) {
        if !self.lives(from) || !self.carries(from.member, to).await {
            pending::<()>().await;
        }
    }

    /// As [`Switch::hop`], but what is lost in a cut may come once it is healed, to whoever the member is then: `copy` makes what
    /// comes then.
    async fn hop_or_late<L, F>(&self, from: End, to: u64, copy: impl FnOnce() -> L)
    where
        L: FnOnce(Raft) -> F + Send + 'static,
        F: Future<Output = ()> + Send,
    {
        if !self.lives(from) {
            pending::<()>().await;
        }
        if self.carries(from.member, to).await {
            return;
        }
        let life = self.plugged(to).map(|it| it.life);
        if life.is_some() && self.dice.percent(LATE) {
            let (switch, late) = (self.clone(), copy());
            tokio::spawn(async move {
                for _ in 0..RESENDS {
                    sleep(RESENT).await;
                    if switch.wires().carries(from.member, to) {
                        // A connection goes with the program at its end.
                        if let Some(there) = switch.plugged(to).filter(|it| Some(it.life) == life) {
                            switch.record.count(|counts| counts.late += 1);
                            there.gate.passes().await;
                            late(there.raft).await;
                        }
                        return;
                    }
                }
            });
        }
        pending::<()>().await;
    }

    /// Takes as long as one message from one node to another; whether it arrived.
    pub(super) async fn carries(&self, from: u64, to: u64) -> bool {
        let weather = self.wires().weather;
        let mut delay = self.dice.micros(weather.delay.0, weather.delay.1);
        while self.dice.percent(weather.loss) {
            delay += Duration::from_millis(200); // retransmission
        }
        self.record.trace(|| format!("m{from} to m{to} takes {delay:?}"));
        sleep(delay).await;
        self.wires().carries(from, to)
    }

    /// Stops a program, or lets it go on.
    pub(super) fn freeze(&self, node: u64, frozen: bool) {
        let mut wires = self.wires();
        match frozen {
            true => wires.frozen.insert(node),
            false => wires.frozen.remove(&node),
        };
    }

    pub(super) fn is_frozen(&self, node: u64) -> bool {
        self.wires().frozen.contains(&node)
    }

    fn plugged(&self, member: u64) -> Option<Plugged> {
        self.wires().plugged.get(&member).cloned()
    }

    /// Waits while a member's program is stopped.
    async fn goes_on(&self, member: u64) {
        if let Some(plugged) = self.plugged(member) {
            plugged.gate.passes().await;
        }
    }
}

/// The network as one end sees it.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) switch: Switch,
    pub(super) me: End,
}

impl RaftNetworkFactory<TypeConfig> for Port {
    type Network = Link;

    async fn new_client(&mut self, target: u64, _member: &Member) -> Link {
        Link {
            port: self.clone(),
            target,
        }
    }
}

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

fn unreachable(why: &str) -> RPCError<TypeConfig> {
    Unreachable::from_string(why).into()
}

/// From one end to one member.
#[derive(Clone, Debug)]
pub(super) struct Link {
    port: Port,
    target: u64,
}

impl Link {
    async fn there(&self) {
        self.port.switch.hop(self.port.me, self.target).await;
        self.port.switch.goes_on(self.target).await;
    }

    /// An append arrives; one that is lost in a cut may come later.
    async fn appends(&self, request: &AppendEntriesRequest<TypeConfig>) {
        let (me, target) = (self.port.me, self.target);
        let copy = || {
            let copy = request.clone();
            |raft: Raft| async move { drop(raft.append_entries(copy).await) }
        };
        self.port.switch.hop_or_late(me, target, copy).await;
        self.port.switch.goes_on(self.target).await;
    }

    async fn back(&self, life: u64) {
        let from = End {
            member: self.target,
            life,
        };
        self.port.switch.goes_on(self.target).await;
        self.port.switch.hop(from, self.port.me.member).await;
    }

    /// Who is there; a member that is not up refuses the connection.
    fn reached(&self) -> RpcResult<(u64, Raft)> {
        let plugged = self.port.switch.plugged(self.target);
        plugged
            .map(|it| (it.life, it.raft))
            .ok_or_else(|| unreachable("nobody listens"))
    }

    /// One question, one answer, one deadline.
    async fn ask<T, E>(
        &self,
        limit: Duration,
        there: impl Future<Output = ()>,
        question: impl AsyncFnOnce(Raft) -> Result<T, E>,
    ) -> RpcResult<T> {
        let asked = timeout(limit, async {
            there.await;
            let (life, raft) = self.reached()?;
            let answer = question(raft)
                .await
                .map_err(|_| unreachable("the replica stopped"))?;
            self.back(life).await;
            Ok(answer)
        });
        asked
            .await
            .unwrap_or_else(|_| Err(unreachable("no answer in time")))
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = State;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let sent = request.clone();
        self.ask(option.hard_ttl(), self.appends(&request), async |raft: Raft| {
            raft.append_entries(sent).await
        })
        .await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        Box::pin(async move {
            let in_flight = Arc::new(InFlight::default());
            timeout(Duration::from_secs(1), self.there())
                .await
                .map_err(|_| unreachable("no connection in time"))?;
            let (life, raft) = self.reached()?;
            let link = self.clone();
            // As the product's own transport: what would leave a hole fails the stream.
            let gap = Arc::new(AtomicBool::new(false));
            let refused = gap.clone();
            let input = in_flight.requests(input).take_while(move |request| {
                let gapless = is_gapless(request);
                refused.fetch_or(!gapless, Ordering::Relaxed);
                ready(gapless)
            });
            let requests = input.then(move |request| {
                let link = link.clone();
                async move {
                    link.appends(&request).await;
                    request
                }
            });
            let link = self.clone();
            let answers = raft.stream_append(requests).then(move |answer| {
                let link = link.clone();
                async move {
                    link.back(life).await;
                    answer
                }
            });
            let state = Some((answers.boxed(), in_flight, gap));
            let answers = stream::unfold(state, |state| async move {
                let (mut answers, in_flight, gap) = state?;
                in_flight.asked();
                let answer = loop {
                    let answer = tokio::select! {
                        biased;
                        answer = answers.next() => match answer {
                            None if gap.load(Ordering::Relaxed) => return Some((Err(unreachable("a gap")), None)),
                            answer => answer?,
                        },
                        () = in_flight.overdue() => return Some((Err(unreachable("no answer in time")), None)),
                    };
                    match &answer {
                        Ok(said) if !in_flight.answered(said) => {}
                        _ => break answer,
                    }
                };
                let answer = answer.map_err(|_| unreachable("the replica stopped"));
                let more = matches!(answer, Ok(Ok(_))).then_some((answers, in_flight, gap));
                Some((answer, more))
            });
            Ok(answers.boxed())
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let vote = request.vote;
        self.ask(option.hard_ttl(), self.there(), async |raft: Raft| {
            raft.vote(votes::asked(request)).await
        })
        .await
        .map(|answer| votes::answered(vote, answer))
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let vote = request.vote;
        self.ask(option.hard_ttl(), self.there(), async |raft: Raft| {
            raft.pre_vote(votes::asked(request)).await
        })
        .await
        .map(|answer| votes::answered(vote, answer))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let record = self.port.switch.record.clone();
        let install = self.ask(option.hard_ttl(), self.there(), async |raft: Raft| {
            // As on the wire: chunks, decoded at the other side.
            let mut parts = chunks(&snapshot.snapshot);
            let mut decoder = Decoder::new(&parts.next().expect("a header")).expect("its own header");
            for part in parts {
                decoder.push(&part).expect("its own chunk");
            }
            let state = decoder.finish().expect("whole");
            record.count(|counts| counts.snapshots_sent += 1);
            let meta = snapshot.meta;
            raft.install_full_snapshot(
                vote,
                Snapshot {
                    meta,
                    snapshot: state,
                },
            )
            .await
        });
        let (mut install, mut cancel) = (pin!(install), pin!(cancel));
        tokio::select! {
            biased;
            installed = &mut install => Ok(installed?),
            closed = &mut cancel => Err(closed.into()),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<Result<(), TransferLeaderError<TypeConfig>>> {
        self.ask(option.hard_ttl(), self.there(), async |raft: Raft| {
            raft.handle_transfer_leader(request).await
        })
        .await
    }
}
