//! Durable replicated writes of 1 KiB, ours and etcd's in turn, and one write against what the machine allows.

use std::time::Duration;

use anyhow::Context as _;
use bulkhead_proto::wire::CreateSecretRequest;
use serde::Serialize;

use super::Bench;
use crate::etcd::{self, Etcd};
use crate::floor::{flushes_of_three, tls_round_trips};
use crate::load::{Load, Send1, round};
use crate::report::{Row, Unit};
use crate::samples::Summary;
use bulkhead_lab::client::{Control, create, secret};
use bulkhead_lab::system::{Others, cpu_of};
use bulkhead_lab::{Lab, status};

pub(super) const VALUE_BYTES: usize = 1_024;
pub(super) const CONNECTIONS: usize = 16;

/// Ours is a secret of 1 KiB: sealed, proposed, on the disks of a majority, applied, answered, each call authorised, all
/// of it over mutual TLS. No other write does more for its bytes.
#[derive(Clone)]
pub(super) struct Secrets(pub(super) Control);

impl Send1 for Secrets {
    type Request = CreateSecretRequest;

    fn next(&self) -> anyhow::Result<CreateSecretRequest> {
        secret(vec![0xA5; VALUE_BYTES])
    }

    async fn send(&mut self, secret: CreateSecretRequest) -> Result<(), tonic::Status> {
        create(&mut self.0, secret).await.map(drop)
    }
}

/// What the rounds of one load on one system come to.
#[derive(Debug, Default)]
struct Measured {
    rates: Vec<f64>,
    latencies: Vec<Duration>,
    servers_cpu: Duration,
    client_cpu: Duration,
    others: Vec<f64>,
    retries: usize,
}

#[derive(Debug, Serialize)]
struct Figures {
    per_second: Summary,
    latency_ms: Summary,
    servers_cpu_ms_per_write: f64,
    client_cpu_ms_per_write: f64,
    retries: usize,
}

impl Measured {
    async fn round<S: Send1>(
        &mut self,
        connections: &[S],
        load: Load,
        servers: &[u32],
    ) -> anyhow::Result<()> {
        let own = [std::process::id()];
        let others = Others::watch();
        let before = (cpu_of(servers), cpu_of(&own));
        let done = round(connections, load).await?;
        self.servers_cpu += cpu_of(servers).saturating_sub(before.0);
        self.client_cpu += cpu_of(&own).saturating_sub(before.1);
        self.others.push(others.percent());
        self.retries += done.retries;
        self.rates.push(done.per_second());
        self.latencies.extend(done.latencies);
        Ok(())
    }

    fn figures(&self) -> anyhow::Result<Figures> {
        let count = self.latencies.len() as f64;
        Ok(Figures {
            per_second: Summary::of(self.rates.iter().copied()).context("no round")?,
            latency_ms: Summary::of_times(&self.latencies).context("no write")?,
            servers_cpu_ms_per_write: self.servers_cpu.as_secs_f64() * 1e3 / count,
            client_cpu_ms_per_write: self.client_cpu.as_secs_f64() * 1e3 / count,
            retries: self.retries,
        })
    }
}

impl Figures {
    fn rate(&self) -> String {
        let rate = &self.per_second;
        let latency = Unit::Millis.show(self.latency_ms.p50);
        format!(
            "{} ({}–{}), {latency}",
            Unit::PerSecond.show(rate.p50),
            Unit::PerSecond.show(rate.min),
            Unit::PerSecond.show(rate.max)
        )
    }

    fn cpu(&self) -> String {
        let mut text = format!(
            "{:.3} ms servers, {:.3} ms client",
            self.servers_cpu_ms_per_write, self.client_cpu_ms_per_write
        );
        if self.retries > 0 {
            text.push_str(&format!("; {} sent again", self.retries));
        }
        text
    }
}

/// The peer, or why there is none.
struct Peer {
    etcd: Result<(Etcd, Vec<etcd::Client>), String>,
}

impl Peer {
    async fn start(bench: &Bench) -> Self {
        let started = async {
            let program = etcd::find(bench.options.etcd.as_deref())?;
            let subnet = next_network(&bench.options.subnet)?;
            let etcd = Etcd::start(&program, &bench.options.folder, &subnet).await?;
            let clients = etcd.to_leader(CONNECTIONS, &[0xA5; VALUE_BYTES]).await?;
            Ok::<_, anyhow::Error>((etcd, clients))
        };
        Self {
            etcd: started.await.map_err(|error| format!("{error:#}")),
        }
    }

    fn version(&self) -> &str {
        self.etcd.as_ref().map_or("", |(etcd, _)| &etcd.version)
    }
}

pub(super) async fn measure(bench: &mut Bench) -> anyhow::Result<Vec<Row>> {
    let (rounds, warm_up) = (bench.times(5, 1), bench.times(8_000, 500));
    let share = bench.times(1, 10);
    let peer = Peer::start(bench).await;
    let floor_count = bench.times(2_000, 200);
    let folder = bench.options.folder.clone();
    // Without workers nothing but writes goes on; with them, their signs of life would be noise.
    bench.lab = None;
    let (lab, _) = Lab::up(&bench.place(), 3, 0).await?;
    let mut leader = lab.leader().await?;
    let mut connections = connect(&lab, leader).await?;
    let mut servers = Vec::new();
    for manager in &lab.managers {
        servers.push(manager.pid()?);
    }

    let load = |clients: usize, requests: usize| Load {
        clients,
        connections: clients.min(CONNECTIONS),
        requests: requests / share,
    };
    let loads = [
        load(1, 1_000),
        load(16, 8_000),
        load(64, 16_000),
        load(1_000, 32_000),
    ];
    let warm = load(64, warm_up * share);
    round(&connections, warm).await?;
    if let Ok((_, clients)) = &peer.etcd {
        round(clients, warm).await?;
    }
    let mut ours: [Measured; 4] = Default::default();
    let mut theirs: [Measured; 4] = Default::default();
    let (mut trips, mut flushes) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        for (at, load) in loads.into_iter().enumerate() {
            let now = lab.leader().await?;
            if now != leader {
                (leader, connections) = (now, connect(&lab, now).await?);
            }
            ours[at].round(&connections, load, &servers).await?;
            if let Ok((etcd, clients)) = &peer.etcd {
                theirs[at].round(clients, load, &etcd.pids()).await?;
            }
        }
        trips.extend(tls_round_trips(floor_count).await?);
        flushes.extend(flushes_of_three(&folder, floor_count / 2)?);
    }
    let mut rows = Vec::new();
    for (at, load) in loads.into_iter().enumerate().skip(1) {
        rows.push(throughput(load, &ours[at], &theirs[at], &peer)?);
    }
    rows.extend(one_client(&ours[0], &theirs[0], &peer, (&trips, &flushes))?);
    Ok(rows)
}

/// The network after this one.
fn next_network(subnet: &str) -> anyhow::Result<String> {
    let (start, last) = subnet.rsplit_once('.').context("--subnet is not A.B.C")?;
    let last: u8 = last.parse().context("--subnet is not A.B.C")?;
    Ok(format!("{start}.{}", last.wrapping_add(1)))
}

/// To the leader, each made.
pub(super) async fn connect(lab: &Lab, leader: usize) -> anyhow::Result<Vec<Secrets>> {
    let leader = &lab.managers[leader].address;
    let mut connections = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        let mut control = lab.operator()?.control(leader)?;
        status(&mut control).await?;
        connections.push(Secrets(control));
    }
    Ok(connections)
}

fn throughput(load: Load, ours: &Measured, theirs: &Measured, peer: &Peer) -> anyhow::Result<Row> {
    let figures = ours.figures()?;
    let mut row = Row {
        what: format!(
            "durable replicated write, 3 managers, 1 KiB, {} {} over {} connections",
            load.clients,
            if load.clients > 64 { "in flight" } else { "clients" },
            load.connections
        ),
        median: figures.rate(),
        p99: Unit::Millis.show(figures.latency_ms.p99),
        n: format!("{} × {}", figures.per_second.n, load.requests),
        cpu: figures.cpu(),
        swarmkit: if load.clients == 16 { "301/s" } else { "" },
        goal: "≥ 1.5 × etcd",
        others_percent: Summary::of(ours.others.iter().chain(&theirs.others).copied()).map(|it| it.p50),
        ..Row::default()
    };
    match &peer.etcd {
        Ok(_) => {
            let other = theirs.figures()?;
            let ratio = figures.per_second.p50 / other.per_second.p50;
            row.etcd = format!(
                "{}: {}, p99 {}; {}",
                peer.version(),
                other.rate(),
                Unit::Millis.show(other.latency_ms.p99),
                other.cpu()
            );
            row.reached = Some(ratio >= 1.5);
            row.against = format!("{ratio:.2} ×");
            row.figures =
                serde_json::json!({ "load": load, "bulkhead": figures, "etcd": other, "ratio": ratio });
        }
        Err(why) => {
            row.etcd = format!("not run: {why}");
            row.figures = serde_json::json!({ "load": load, "bulkhead": figures });
        }
    }
    Ok(row)
}

fn one_client(
    ours: &Measured,
    theirs: &Measured,
    peer: &Peer,
    (trips, flushes): (&[Duration], &[Duration]),
) -> anyhow::Result<[Row; 2]> {
    let figures = ours.figures()?;
    let others = Summary::of(ours.others.iter().chain(&theirs.others).copied()).map(|it| it.p50);
    let mut row = Row {
        what: "… one client: a write's latency".into(),
        cpu: figures.cpu(),
        swarmkit: "3.7 ms",
        goal: "p50 ≤ 0.75 × etcd",
        others_percent: others,
        ..Row::default()
    }
    .figures(&figures.latency_ms, Unit::Millis);
    match &peer.etcd {
        Ok(_) => {
            let other = theirs.figures()?;
            let ratio = figures.latency_ms.p50 / other.latency_ms.p50;
            row.etcd = format!(
                "{}: {}, p99 {}; {}",
                peer.version(),
                Unit::Millis.show(other.latency_ms.p50),
                Unit::Millis.show(other.latency_ms.p99),
                other.cpu()
            );
            row.reached = Some(ratio <= 0.75);
            row.against = format!("{ratio:.2} ×");
            row.figures = serde_json::json!({ "bulkhead": &figures, "etcd": other, "ratio": ratio });
        }
        Err(why) => {
            row.etcd = format!("not run: {why}");
            row.figures = serde_json::json!({ "bulkhead": &figures });
        }
    }
    let trip = Summary::of_times(trips).context("no round trip")?;
    let flush = Summary::of_times(flushes).context("no flush")?;
    let floor = 2.0 * trip.p50 + flush.p50;
    let bound = Row {
        what: "… as a multiple of 2 loopback TLS round trips and one fdatasync of three writers".into(),
        median: format!(
            "{:.1} × {}",
            figures.latency_ms.p50 / floor,
            Unit::Millis.show(floor)
        ),
        n: format!("{}, {}", trip.n, flush.n),
        against: format!(
            "round trip {}, fdatasync {} (p99 {})",
            Unit::Millis.show(trip.p50),
            Unit::Millis.show(flush.p50),
            Unit::Millis.show(flush.p99)
        ),
        goal: "reported",
        others_percent: others,
        figures: serde_json::json!({
            "multiple": figures.latency_ms.p50 / floor, "round_trip_ms": trip, "fdatasync_ms": flush,
        }),
        ..Row::default()
    };
    Ok([row, bound])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_network_is_another_one() {
        assert_eq!(next_network("127.83.0").expect("a network"), "127.83.1");
        assert_eq!(next_network("127.83.255").expect("a network"), "127.83.0");
        assert!(next_network("127").is_err() && next_network("127.83.x").is_err());
    }
}
