//! Three members of etcd on this machine, and the two of its calls that are measured.
//!
//! Plain HTTP/2 between members and to clients, as etcd runs unless told otherwise; the messages are those of its
//! `rpc.proto`, as far as they are used.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use crate::load::Send1;
use bulkhead_lab::client::{new_id, until};

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(string, tag = "2")]
    version: String,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// A connection to one member.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    value: Vec<u8>,
}

impl Client {
    fn new(address: &str, value: Vec<u8>) -> anyhow::Result<Self> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true);
        Ok(Self {
            channel: endpoint.connect_lazy(),
            value,
        })
    }

    async fn call<Q, A>(&self, path: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready()
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        let path = PathAndQuery::from_static(path);
        Ok(grpc.unary(Request::new(request), path, codec).await?.into_inner())
    }

    async fn status(&self) -> Result<StatusResponse, Status> {
        self.call("/etcdserverpb.Maintenance/Status", StatusRequest {})
            .await
    }
}

impl Send1 for Client {
    type Request = PutRequest;

    /// The value under a new key.
    fn next(&self) -> anyhow::Result<PutRequest> {
        Ok(PutRequest {
            key: new_id()?,
            value: self.value.clone(),
        })
    }

    async fn send(&mut self, put: PutRequest) -> Result<(), Status> {
        let _done: PutResponse = self.call("/etcdserverpb.KV/Put", put).await?;
        Ok(())
    }
}

/// Three members; dropping it ends and removes them.
#[derive(Debug)]
pub(crate) struct Etcd {
    members: Vec<Child>,
    addresses: Vec<String>,
    pub(crate) version: String,
    _folder: tempfile::TempDir,
}

/// The program, if it is there.
pub(crate) fn find(named: Option<&Path>) -> anyhow::Result<PathBuf> {
    let found = match named {
        Some(path) => path.is_file().then(|| path.to_owned()),
        None => {
            #[expect(
                clippy::disallowed_methods,
                reason = "where programs are is for the environment to say"
            )]
            let path = std::env::var("PATH").unwrap_or_default();
            std::env::split_paths(&path)
                .map(|folder| folder.join("etcd"))
                .find(|program| program.is_file())
        }
    };
    found.context("etcd is not installed; `apt-get install etcd-server` brings it")
}

impl Etcd {
    /// Starts them with their data below a folder, on the first three addresses of a network.
    pub(crate) async fn start(program: &Path, below: &Path, subnet: &str) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("bulkhead-bench-etcd.")
            .tempdir_in(below)?;
        let names: Vec<(String, String)> = (1..=3)
            .map(|number| (format!("e{number}"), format!("{subnet}.{number}")))
            .collect();
        let all: Vec<String> = names
            .iter()
            .map(|(name, ip)| format!("{name}=http://{ip}:2380"))
            .collect();
        let mut etcd = Self {
            members: Vec::new(),
            addresses: names.iter().map(|(_, ip)| format!("{ip}:2379")).collect(),
            version: String::new(),
            _folder: folder,
        };
        for (name, ip) in &names {
            let folder = etcd._folder.path();
            let log = fs::File::create(folder.join(format!("{name}.log")))?;
            let member = Command::new(program)
                .args(["--name", name, "--data-dir"])
                .arg(folder.join(name))
                .args(["--listen-client-urls", &format!("http://{ip}:2379")])
                .args(["--advertise-client-urls", &format!("http://{ip}:2379")])
                .args(["--listen-peer-urls", &format!("http://{ip}:2380")])
                .args(["--initial-advertise-peer-urls", &format!("http://{ip}:2380")])
                .args(["--initial-cluster", &all.join(",")])
                .args(["--initial-cluster-state", "new", "--log-level", "error"])
                // The default is for a small disk; it bounds no write of these tests.
                .args(["--quota-backend-bytes", "8589934592"])
                .env(
                    "ETCD_UNSUPPORTED_ARCH",
                    std::env::consts::ARCH.replace("aarch64", "arm64"),
                )
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .with_context(|| format!("could not start {}", program.display()))?;
            etcd.members.push(member);
        }
        let mut probe = Client::new(&etcd.addresses[0], b"x".to_vec())?;
        until(
            "etcd takes a write",
            Duration::from_secs(30),
            async || match probe.next() {
                Ok(put) => probe.send(put).await.is_ok(),
                Err(_) => false,
            },
        )
        .await?;
        etcd.version = probe.status().await?.version;
        Ok(etcd)
    }

    /// Connections to the member that leads, each made.
    pub(crate) async fn to_leader(&self, count: usize, value: &[u8]) -> anyhow::Result<Vec<Client>> {
        for address in &self.addresses {
            let client = Client::new(address, Vec::new())?;
            let status = client.status().await?;
            if status.header.is_some_and(|it| it.member == status.leader) {
                let mut clients = Vec::with_capacity(count);
                for _ in 0..count {
                    let client = Client::new(address, value.to_vec())?;
                    client.status().await?;
                    clients.push(client);
                }
                return Ok(clients);
            }
        }
        bail!("no member of etcd leads")
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.members.iter().map(Child::id).collect()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            // It may have ended by itself; then there is nothing to end.
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}
