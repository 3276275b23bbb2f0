//! The published-port proxy: listens on the host, connects inside the tasks' own networks.
//!
//! A host port belongs to one service on this node and spreads over that service's local replicas. The connecting
//! socket comes from inside the task's network namespace, so this program never enters one.

pub mod balancer;

use crate::runtime::Runtime;
use balancer::{Backend, Balancer};
use bulkhead_launcher::message::TaskId as LaunchId;
use bulkhead_proto::TaskId;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

/// Connections through one port. Further ones wait in the listener's backlog, where they cost no memory here.
const CONNECTIONS: usize = 1024;
/// A replica on the same host answers at once or is not listening.
const CONNECT: Duration = Duration::from_secs(5);
/// After a failed accept, which is almost always a lack of descriptors: give connections time to end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connects to a port inside a task.
pub trait Connect: Send + Sync + 'static {
    /// A connection to 127.0.0.1 of that task.
    fn connect(&self, backend: Backend) -> impl Future<Output = io::Result<TcpStream>> + Send;
}

impl Connect for Runtime {
    async fn connect(&self, backend: Backend) -> io::Result<TcpStream> {
        let task = LaunchId::try_from(backend.task.to_string()).map_err(io::Error::other)?;
        let socket = std::net::TcpStream::from(self.socket(task).await.map_err(io::Error::other)?);
        socket.set_nonblocking(true)?;
        let inside = SocketAddr::from((Ipv4Addr::LOCALHOST, backend.port));
        TcpSocket::from_std_stream(socket).connect(inside).await
    }
}

/// A host port that could not be opened; its text goes into the status of the tasks that publish it.
#[derive(Debug, thiserror::Error)]
#[error("host port {port} cannot be opened: {}", reason(source))]
pub struct PortError {
    /// The port on the host.
    pub port: u16,
    /// What the kernel said.
    pub source: io::Error,
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program on this node uses it; stop that, or publish another port".into()
        }
        io::ErrorKind::PermissionDenied => "ports below 1024 need the capability NET_BIND_SERVICE".into(),
        io::ErrorKind::AddrNotAvailable => "this node has no such address".into(),
        _ => error.to_string(),
    }
}

/// The open ports of this node.
#[derive(Debug)]
pub struct Proxy<C> {
    address: IpAddr,
    connector: Arc<C>,
    ports: BTreeMap<u16, Port>,
}

#[derive(Debug)]
struct Port {
    balancer: Arc<Mutex<Balancer>>,
    bound: SocketAddr,
    serving: JoinHandle<()>,
}

impl Drop for Port {
    /// A port that is no longer published closes with its connections: their replicas are gone.
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl<C: Connect> Proxy<C> {
    /// A proxy that listens on `address`.
    pub fn new(address: IpAddr, connector: C) -> Self {
        Proxy {
            address,
            connector: Arc::new(connector),
            ports: BTreeMap::new(),
        }
    }

    /// Opens, changes and closes ports so that these are published. What fails is tried again at the next call.
    pub async fn publish(&mut self, wanted: &BTreeMap<u16, Vec<Backend>>) -> Vec<PortError> {
        self.ports.retain(|port, _| wanted.contains_key(port));
        let mut failed = Vec::new();
        for (&port, backends) in wanted {
            if !self.ports.contains_key(&port) {
                match self.open(port).await {
                    Ok(open) => drop(self.ports.insert(port, open)),
                    Err(source) => failed.push(PortError { port, source }),
                }
            }
            if let Some(open) = self.ports.get(&port) {
                lock(&open.balancer).set(backends);
            }
        }
        failed
    }

    /// Where a published port listens.
    pub fn bound(&self, port: u16) -> Option<SocketAddr> {
        self.ports.get(&port).map(|open| open.bound)
    }

    async fn open(&self, port: u16) -> io::Result<Port> {
        let listener = TcpListener::bind((self.address, port)).await?;
        let balancer = Arc::new(Mutex::new(Balancer::default()));
        Ok(Port {
            bound: listener.local_addr()?,
            serving: tokio::spawn(serve(listener, balancer.clone(), self.connector.clone())),
            balancer,
        })
    }
}

/// Which ports these running tasks publish. Replicas of one service share a port; the managers place no two services
/// with the same port on one node.
pub fn published<'a>(
    running: impl Iterator<Item = (TaskId, &'a [(u16, u16)])>,
) -> BTreeMap<u16, Vec<Backend>> {
    let mut ports: BTreeMap<u16, Vec<Backend>> = BTreeMap::new();
    for (task, list) in running {
        for &(host, port) in list {
            ports.entry(host).or_default().push(Backend { task, port });
        }
    }
    ports
}

async fn serve<C: Connect>(listener: TcpListener, balancer: Arc<Mutex<Balancer>>, connector: Arc<C>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new(); // aborted with this task
    loop {
        let permit = room
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((client, _)) => {
                let (balancer, connector) = (balancer.clone(), connector.clone());
                connections.spawn(async move {
                    forward(client, &balancer, connector.as_ref()).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting on a published port failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Carries one connection. Half-closes pass in both directions: an end that has finished sending may still receive.
async fn forward<C: Connect>(mut client: TcpStream, balancer: &Mutex<Balancer>, connector: &C) {
    let tries = lock(balancer).len();
    for _ in 0..tries {
        let Some(backend) = lock(balancer).take() else {
            return;
        };
        let _taken = Taken { balancer, backend };
        match tokio::time::timeout(CONNECT, connector.connect(backend)).await {
            Ok(Ok(mut replica)) => {
                // Neither end should wait for a packet to fill; a failure costs speed only.
                let _ = (client.set_nodelay(true), replica.set_nodelay(true));
                // An error means that an end has reset the connection: closing both is the answer.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut replica).await;
                return;
            }
            Ok(Err(error)) => tracing::debug!(task = %backend.task, %error, "a replica does not answer"),
            Err(_elapsed) => tracing::debug!(task = %backend.task, "a replica does not answer in time"),
        }
        lock(balancer).failed(backend);
    }
}

/// Gives the connection back however its task ends.
struct Taken<'a> {
    balancer: &'a Mutex<Balancer>,
    backend: Backend,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        lock(self.balancer).give_back(self.backend);
    }
}

/// The balancer is whole after each of its calls, so a panic elsewhere does not spoil it.
fn lock(balancer: &Mutex<Balancer>) -> std::sync::MutexGuard<'_, Balancer> {
    balancer.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
