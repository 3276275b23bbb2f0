use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Replicas that listen on this host's loopback instead of their own.
struct Direct(BTreeMap<TaskId, SocketAddr>);

impl Connect for Direct {
    async fn connect(&self, backend: Backend) -> io::Result<TcpStream> {
        TcpStream::connect(self.0[&backend.task]).await
    }
}

fn task(n: u8) -> TaskId {
    TaskId::from_bytes([n; 16])
}

fn backends(tasks: &[u8]) -> Vec<Backend> {
    tasks
        .iter()
        .map(|n| Backend {
            task: task(*n),
            port: 80,
        })
        .collect()
}

const ANY: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Reads a request to its end, then answers with its name and what it read: half-close or it hangs.
async fn replica(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind((ANY, 0)).await.expect("replica");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = String::new();
                connection.read_to_string(&mut request).await.expect("request");
                connection
                    .write_all(format!("{name}:{request}").as_bytes())
                    .await
                    .expect("answer");
            });
        }
    });
    address
}

/// An address that nobody listens on.
async fn nobody() -> SocketAddr {
    let listener = TcpListener::bind((ANY, 0)).await.expect("listener");
    listener.local_addr().expect("address")
}

async fn ask(address: SocketAddr, request: &str) -> String {
    let mut client = TcpStream::connect(address).await.expect("connect");
    client.write_all(request.as_bytes()).await.expect("request");
    client.shutdown().await.expect("half-close");
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.expect("answer");
    answer
}

#[tokio::test]
async fn a_request_reaches_each_replica_and_half_closes_pass() {
    let connector = Direct(BTreeMap::from([
        (task(1), replica("one").await),
        (task(2), replica("two").await),
    ]));
    let mut proxy = Proxy::new(ANY, connector);
    assert!(
        proxy
            .publish(&BTreeMap::from([(0, backends(&[1, 2]))]))
            .await
            .is_empty()
    );
    let address = proxy.bound(0).expect("open");
    let mut answers = vec![ask(address, "hello").await, ask(address, "hello").await];
    answers.sort();
    assert_eq!(answers, ["one:hello", "two:hello"]);
}

#[tokio::test]
async fn a_replica_that_does_not_answer_is_passed_over() {
    let connector = Direct(BTreeMap::from([
        (task(1), nobody().await),
        (task(2), replica("two").await),
    ]));
    let mut proxy = Proxy::new(ANY, connector);
    proxy.publish(&BTreeMap::from([(0, backends(&[1, 2]))])).await;
    let address = proxy.bound(0).expect("open");
    for _ in 0..3 {
        assert_eq!(ask(address, "x").await, "two:x");
    }
}

#[tokio::test]
async fn without_a_replica_the_connection_is_closed() {
    let mut proxy = Proxy::new(ANY, Direct(BTreeMap::new()));
    proxy.publish(&BTreeMap::from([(0, vec![])])).await;
    let mut client = TcpStream::connect(proxy.bound(0).expect("open"))
        .await
        .expect("connect");
    assert_eq!(client.read(&mut [0; 1]).await.expect("closed"), 0);
}

#[tokio::test]
async fn a_port_in_use_is_told_and_tried_again() {
    let other = TcpListener::bind((ANY, 0)).await.expect("another program");
    let port = other.local_addr().expect("address").port();
    let mut proxy = Proxy::new(ANY, Direct(BTreeMap::from([(task(1), replica("one").await)])));
    let wanted = BTreeMap::from([(port, backends(&[1]))]);
    let failed = proxy.publish(&wanted).await;
    assert_eq!(
        failed[0].to_string(),
        format!(
            "host port {port} cannot be opened: another program on this node uses it; stop that, or publish another port"
        )
    );
    drop(other);
    assert!(proxy.publish(&wanted).await.is_empty());
    assert_eq!(ask((ANY, port).into(), "x").await, "one:x");
}

#[tokio::test]
async fn a_port_that_is_no_longer_published_is_closed() {
    let mut proxy = Proxy::new(ANY, Direct(BTreeMap::from([(task(1), replica("one").await)])));
    proxy.publish(&BTreeMap::from([(0, backends(&[1]))])).await;
    let address = proxy.bound(0).expect("open");
    let mut open = TcpStream::connect(address).await.expect("connect");
    proxy.publish(&BTreeMap::new()).await;
    assert_eq!(proxy.bound(0), None);
    let ended = open.read(&mut [0; 1]).await;
    assert!(
        matches!(ended, Ok(0) | Err(_)),
        "its connections end with it: {ended:?}"
    );
}

#[test]
fn replicas_of_a_service_share_its_port() {
    let ports = published([(task(1), &[(8080, 80)][..]), (task(2), &[(8080, 80), (9090, 90)])].into_iter());
    assert_eq!(ports[&8080], backends(&[1, 2]));
    assert_eq!(
        ports[&9090],
        [Backend {
            task: task(2),
            port: 90
        }]
    );
}
