//! Logs of tasks, from the workers that hold them, through whichever manager a worker's stream ends at.
//!
//! What cannot be reached is named in the answer and holds nothing else up.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::{LogRequest, LogUp, LogsRequest, LogsResponse, Node, RelayLogsRequest, Task};
use bulkhead_proto::{NodeId, limits};
use bulkhead_raft::state::State;
use futures::stream::{BoxStream, select_all};
use futures::{FutureExt as _, StreamExt as _};
use tonic::Status;

use super::check;
use super::object::{Kept as _, SERVICES, TASKS, get, id_text};
use crate::dispatcher::Sessions;
use crate::registry::Peers;

/// Tasks whose logs one request gathers; the newest attempts come first.
const TASKS_AT_ONCE: usize = 256;
/// A manager says within this time whether a worker's stream ends there.
const RELAY: Duration = Duration::from_secs(2);
/// A worker that sends nothing for this long, and was not asked to follow, is given up.
const SILENCE: Duration = Duration::from_secs(10);

/// The logs of workers whose streams end at this manager.
pub trait LogSource: Send + Sync {
    /// The log of a task of this node; nothing where its stream ends elsewhere.
    fn open(&self, node: NodeId, request: LogRequest) -> Option<BoxStream<'static, LogUp>>;
}

impl LogSource for Sessions {
    fn open(&self, node: NodeId, request: LogRequest) -> Option<BoxStream<'static, LogUp>> {
        self.logs(node, request).map(|parts| parts.boxed())
    }
}

/// One log: where it is, and how to ask for it.
#[derive(Debug, PartialEq)]
struct Wanted {
    node: NodeId,
    node_name: String,
    request: LogRequest,
}

/// The logs that a request asks for.
fn wanted(state: &State, request: &LogsRequest) -> Result<Vec<Wanted>, Status> {
    let mut tasks: Vec<&Task> = match (request.service.as_str(), request.task.as_str()) {
        (service, "") if !service.is_empty() => {
            let id = &SERVICES.find(state, service)?.id;
            TASKS.all(state).filter(|task| task.service_id == *id).collect()
        }
        ("", task) if !task.is_empty() => vec![TASKS.find(state, task)?],
        _ => return Err(check::invalid("service, task", "name one of them")),
    };
    tasks.sort_by_key(|task| std::cmp::Reverse(task.meta().map_or(0, |meta| meta.created_index)));
    let placed = tasks.into_iter().filter_map(|task| {
        let node = get::<Node>(state, &task.node_id)?;
        Some(Wanted {
            node: NodeId::try_from(node.id()).ok()?,
            node_name: node.name.clone(),
            request: LogRequest {
                stream: 0,
                task_id: task.id.clone(),
                follow: request.follow,
                tail: request.tail,
                since: request.since,
            },
        })
    });
    Ok(placed.take(TASKS_AT_ONCE).collect())
}

/// Gathers them all as they come.
pub(super) fn logs(
    state: &State,
    request: &LogsRequest,
    here: &Arc<dyn LogSource>,
    peers: &Arc<dyn Peers>,
) -> Result<BoxStream<'static, Result<LogsResponse, Status>>, Status> {
    let each = wanted(state, request)?.into_iter().map(|wanted| {
        let (here, peers) = (here.clone(), peers.clone());
        async move { log(wanted, &*here, &*peers).await }
            .flatten_stream()
            .map(Ok)
            .boxed()
    });
    let each: Vec<_> = each.collect();
    if each.is_empty() {
        return Ok(futures::stream::empty().boxed());
    }
    Ok(select_all(each).boxed())
}

/// One log as parts of the answer.
async fn log(wanted: Wanted, here: &dyn LogSource, peers: &dyn Peers) -> BoxStream<'static, LogsResponse> {
    let follow = wanted.request.follow;
    let task = id_text(&wanted.request.task_id);
    let place = format!(
        "task {} on node {}",
        &task[..task.len().min(12)],
        wanted.node_name
    );
    let Some(parts) = open(&wanted, here, peers).await else {
        let missing = vec![format!(
            "{place}: no manager that can be reached has its worker's stream"
        )];
        return futures::stream::iter([LogsResponse {
            lines: Vec::new(),
            missing,
        }])
        .boxed();
    };
    futures::stream::unfold(Some((parts, place)), move |open| async move {
        let (mut parts, place) = open?;
        let next = match follow {
            true => Ok(parts.next().await),
            false => tokio::time::timeout(SILENCE, parts.next()).await,
        };
        let failed = |why: &str| LogsResponse {
            lines: Vec::new(),
            missing: vec![format!("{place}: {why}")],
        };
        match next {
            Ok(Some(Ok(part))) if part.error.is_empty() => {
                let shown = LogsResponse {
                    lines: part.lines,
                    missing: Vec::new(),
                };
                Some((shown, Some((parts, place))))
            }
            Ok(Some(Ok(part))) => {
                let mut shown = failed(&part.error);
                shown.lines = part.lines;
                Some((shown, None))
            }
            Ok(Some(Err(status))) => Some((failed(status.message()), None)),
            Ok(None) => None,
            Err(_) => Some((failed("its worker stopped answering"), None)),
        }
    })
    .boxed()
}

async fn open(
    wanted: &Wanted,
    here: &dyn LogSource,
    peers: &dyn Peers,
) -> Option<BoxStream<'static, Result<LogUp, Status>>> {
    if let Some(parts) = here.open(wanted.node, wanted.request.clone()) {
        return Some(parts.map(Ok).boxed());
    }
    for (_, channel) in peers.others() {
        let mut peer = PeerClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES);
        let request = RelayLogsRequest {
            request: Some(wanted.request.clone()),
        };
        if let Ok(Ok(parts)) = tokio::time::timeout(RELAY, peer.relay_logs(request)).await {
            return Some(parts.into_inner().boxed());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::{LogLine, Role};
    use bulkhead_proto::{Code, MemberId};
    use tonic::transport::Channel;

    use super::super::testing::{image, node, refused, service, state, task};
    use super::*;

    struct Here;

    impl LogSource for Here {
        fn open(&self, node: NodeId, request: LogRequest) -> Option<BoxStream<'static, LogUp>> {
            let line = LogLine {
                task_id: request.task_id,
                text: b"hello".to_vec(),
                ..Default::default()
            };
            let part = LogUp {
                lines: vec![line],
                ..Default::default()
            };
            let last = LogUp {
                error: "the log is damaged".into(),
                ..Default::default()
            };
            (node.as_bytes() == &[4; 16]).then(|| futures::stream::iter([part, last]).boxed())
        }
    }

    struct Nobody;

    impl Peers for Nobody {
        fn others(&self) -> Vec<(MemberId, Channel)> {
            vec![(
                MemberId(2),
                tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy(),
            )]
        }
    }

    fn world() -> State {
        let on = |id: u8, node: u8| task(id, 9, |task| task.node_id = vec![node; 16]);
        state([
            node(4, "here", Role::Worker),
            node(5, "gone", Role::Worker),
            image(1, "web:1"),
            service(9, "shop", 2, |spec| spec.image_id = vec![1; 16]),
            on(20, 4),
            on(21, 5),
            task(22, 9, |_| {}),
        ])
    }

    fn request(service: &str) -> LogsRequest {
        LogsRequest {
            service: service.into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn what_cannot_be_reached_is_named_and_the_rest_comes() {
        let here: Arc<dyn LogSource> = Arc::new(Here);
        let peers: Arc<dyn Peers> = Arc::new(Nobody);
        let parts = logs(&world(), &request("shop"), &here, &peers).expect("a stream");
        let parts: Vec<LogsResponse> = parts.map(|it| it.expect("no refusal")).collect().await;
        let lines: Vec<_> = parts.iter().flat_map(|it| &it.lines).collect();
        assert_eq!((lines.len(), &lines[0].text[..]), (1, &b"hello"[..]));
        let mut missing: Vec<&String> = parts.iter().flat_map(|it| &it.missing).collect();
        missing.sort();
        assert_eq!(missing.len(), 2, "{missing:?}");
        assert!(
            missing.iter().any(|it| it.contains("node gone: no manager")),
            "{missing:?}"
        );
        assert!(
            missing
                .iter()
                .any(|it| it.contains("node here: the log is damaged")),
            "{missing:?}"
        );
    }

    #[test]
    fn logs_are_of_one_service_or_task() {
        let check = |service: &str, task: &str, code| {
            let asked = LogsRequest {
                task: task.into(),
                ..request(service)
            };
            refused(&wanted(&world(), &asked).expect_err("refused"), code, "", "");
        };
        check("", "", Code::BadField);
        check("shop", "x", Code::BadField);
        check("nope", "", Code::NotFound);
        assert_eq!(wanted(&world(), &request("shop")).expect("two placed").len(), 2);
    }
}
