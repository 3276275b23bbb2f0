//! A way between two nodes that is slow, or changes bytes: this kernel may have no device that does it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What happens to what goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Harm {
    /// Each piece comes later by up to this.
    Delay(Duration),
    /// One of so many pieces has a byte changed.
    Corrupt(u32),
}

/// Connections at once through one way; a node has few.
const CONNECTIONS: usize = 256;
const PIECE_BYTES: usize = 16 << 10;

/// A way to one address. It ends, with all that goes through it, when this is dropped.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) address: SocketAddrV4,
    _task: tokio::task::JoinHandle<()>,
    stop: tokio::task::AbortHandle,
}

impl Proxy {
    /// Listens at a free port of this address.
    pub(super) async fn open(
        own: Ipv4Addr,
        to: SocketAddrV4,
        harm: Harm,
        seed: u64,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind((own, 0)).await?;
        let SocketAddr::V4(address) = listener.local_addr()? else {
            return Err(std::io::ErrorKind::AddrNotAvailable.into());
        };
        let task = tokio::spawn(serve(listener, to, harm, seed));
        Ok(Self {
            address,
            stop: task.abort_handle(),
            _task: task,
        })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.abort(); // and with it the set of its connections
    }
}

async fn serve(listener: TcpListener, to: SocketAddrV4, harm: Harm, seed: u64) {
    let mut connections = JoinSet::new();
    for number in 0_u64.. {
        while connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        let Ok((one, _)) = listener.accept().await else {
            sleep(Duration::from_millis(10)).await; // out of descriptors for a moment
            continue;
        };
        while connections.try_join_next().is_some() {}
        let random = SmallRng::seed_from_u64(seed.wrapping_add(number));
        connections.spawn(async move {
            let Ok(other) = TcpStream::connect(to).await else {
                return;
            };
            let _flat = (one.set_nodelay(true), other.set_nodelay(true)); // slower, otherwise
            let ((mut from_one, mut to_one), (mut from_other, mut to_other)) =
                (one.into_split(), other.into_split());
            let mut again = random.clone();
            let mut random = random;
            // The first direction that ends takes the other one with it: to both ends it is one connection.
            tokio::select! {
                () = pass(&mut from_one, &mut to_other, harm, &mut random) => {}
                () = pass(&mut from_other, &mut to_one, harm, &mut again) => {}
            }
        });
    }
}

async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    harm: Harm,
    random: &mut SmallRng,
) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let read = match from.read(&mut piece).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        match harm {
            Harm::Delay(most) => sleep(most.mul_f64(random.random())).await,
            Harm::Corrupt(of) => {
                if random.random_ratio(1, of) {
                    let at = random.random_range(0..read);
                    piece[at] ^= 1 << random.random_range(0..8);
                }
            }
        }
        if to.write_all(&piece[..read]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn through(harm: Harm) -> (Vec<u8>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let SocketAddr::V4(to) = listener.local_addr().expect("its own") else {
            unreachable!("bound to IPv4")
        };
        let proxy = Proxy::open(Ipv4Addr::LOCALHOST, to, harm, 1)
            .await
            .expect("a port");
        let sent: Vec<u8> = (0..200_000_u32).map(|it| it.to_le_bytes()[0]).collect();
        let mut client = TcpStream::connect(proxy.address).await.expect("connected");
        let copy = sent.clone();
        let writer = tokio::spawn(async move {
            client.write_all(&copy).await.expect("sent");
            client.shutdown().await.expect("ended");
            let mut rest = Vec::new();
            let _read = client.read_to_end(&mut rest).await; // until the other side ends
        });
        let (mut server, _) = listener.accept().await.expect("connected");
        let mut got = Vec::new();
        let _read = server.read_to_end(&mut got).await.expect("all of it");
        drop(server);
        writer.await.expect("done");
        (sent, got)
    }

    #[tokio::test]
    async fn what_is_late_comes_whole() {
        let (sent, got) = through(Harm::Delay(Duration::from_millis(2))).await;
        assert!(sent == got);
    }

    #[tokio::test]
    async fn what_is_changed_is_changed_a_little() {
        let (sent, got) = through(Harm::Corrupt(2)).await;
        assert_eq!(sent.len(), got.len());
        let differ = sent.iter().zip(&got).filter(|(one, other)| one != other).count();
        assert!((1..100).contains(&differ), "{differ}");
    }
}
