//! Logs of tasks, from the workers that hold them, through whichever manager a worker's stream ends at.
//!
//! What cannot be reached is named in the answer and holds nothing else up.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bulkhead_proto::wire::peer_client::PeerClient;
use bulkhead_proto::wire::{LogRequest, LogUp, LogsRequest, LogsResponse, Node, RelayLogsRequest, Task};
use bulkhead_proto::{NodeId, limits};
use bulkhead_raft::state::State;
use futures::stream::{BoxStream, select_all};
use futures::{FutureExt as _, StreamExt as _};
use tokio::time::sleep;
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
/// A followed log whose stream broke is asked for again after this time.
const AGAIN: Duration = Duration::from_millis(300);

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

/// Whether a task may still write.
pub(super) type Live = Arc<dyn Fn(&[u8]) -> bool + Send + Sync>;

/// One log: where it is, and how to ask for it.
#[derive(Debug, Clone, PartialEq)]
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
    live: &Live,
) -> Result<BoxStream<'static, Result<LogsResponse, Status>>, Status> {
    let each = wanted(state, request)?.into_iter().map(|wanted| {
        let (here, peers) = (here.clone(), peers.clone());
        let log = match wanted.request.follow {
            true => followed(wanted, here, peers, live.clone()),
            false => once(wanted, here, peers),
        };
        log.map(|part| Ok(part.into_answer())).boxed()
    });
    let each: Vec<_> = each.collect();
    if each.is_empty() {
        return Ok(futures::stream::empty().boxed());
    }
    Ok(select_all(each).boxed())
}

/// A part of the answer.
enum Part {
    /// Lines, or why there are no more.
    Shown(LogsResponse),
    /// Why the stream broke: another one may go on.
    Broken(LogsResponse),
}

impl Part {
    fn into_answer(self) -> LogsResponse {
        match self {
            Part::Shown(answer) | Part::Broken(answer) => answer,
        }
    }
}

/// One log for as long as its task may write: a worker begins a new session now and then, with this manager or another,
/// and the log goes on there after the last line that came. That it is not to be had is said once, at the beginning.
fn followed(
    wanted: Wanted,
    here: Arc<dyn LogSource>,
    peers: Arc<dyn Peers>,
    live: Live,
) -> BoxStream<'static, Part> {
    let newest = Arc::new(AtomicI64::new(wanted.request.since));
    let attempts = futures::stream::unfold(true, move |first| {
        let (mut wanted, newest) = (wanted.clone(), newest.clone());
        let (here, peers, live) = (here.clone(), peers.clone(), live.clone());
        async move {
            if !first {
                sleep(AGAIN).await;
                if !live(&wanted.request.task_id) {
                    return None;
                }
                wanted.request.tail = None;
                wanted.request.since = newest.load(Ordering::Relaxed);
            }
            let parts = once(wanted, here, peers).filter(move |part| {
                let kept = match part {
                    Part::Shown(answer) => {
                        let last = answer.lines.iter().map(|line| line.at.saturating_add(1)).max();
                        newest.fetch_max(last.unwrap_or(0), Ordering::Relaxed);
                        true
                    }
                    Part::Broken(_) => first,
                };
                std::future::ready(kept)
            });
            Some((parts, false))
        }
    });
    attempts.flatten().boxed()
}

/// One log, as long as its stream lasts.
fn once(wanted: Wanted, here: Arc<dyn LogSource>, peers: Arc<dyn Peers>) -> BoxStream<'static, Part> {
    async move { log(wanted, &*here, &*peers).await }
        .flatten_stream()
        .boxed()
}

/// One log as parts of the answer.
async fn log(wanted: Wanted, here: &dyn LogSource, peers: &dyn Peers) -> BoxStream<'static, Part> {
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
        return futures::stream::iter([Part::Broken(LogsResponse {
            lines: Vec::new(),
            missing,
        })])
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
                Some((Part::Shown(shown), Some((parts, place))))
            }
            Ok(Some(Ok(part))) => {
                let mut shown = failed(&part.error);
                shown.lines = part.lines;
                Some((Part::Shown(shown), None))
            }
            Ok(Some(Err(status))) => Some((Part::Broken(failed(status.message())), None)),
            Ok(None) => None,
            Err(_) => Some((Part::Broken(failed("its worker stopped answering")), None)),
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
    use std::sync::Mutex;

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
        let live: Live = Arc::new(|_| true);
        let parts = logs(&world(), &request("shop"), &here, &peers, &live).expect("a stream");
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

    /// A worker whose session begins anew after each line: what it was asked, in order.
    #[derive(Default)]
    struct Restless(Mutex<Vec<LogRequest>>);

    impl LogSource for Restless {
        fn open(&self, _: NodeId, request: LogRequest) -> Option<BoxStream<'static, LogUp>> {
            let mut asked = self.0.lock().expect("no panic");
            let at = 10 * i64::try_from(asked.len()).expect("few") + 10;
            let line = LogLine {
                task_id: request.task_id.clone(),
                at,
                ..Default::default()
            };
            asked.push(request);
            let part = LogUp {
                lines: vec![line],
                ..Default::default()
            };
            Some(futures::stream::iter([part]).boxed())
        }
    }

    #[tokio::test]
    async fn a_followed_log_goes_on_in_the_workers_next_session_until_its_task_is_over() {
        let restless = Arc::new(Restless::default());
        let (here, peers): (Arc<dyn LogSource>, Arc<dyn Peers>) = (restless.clone(), Arc::new(Nobody));
        let asked = restless.clone();
        let live: Live = Arc::new(move |_| asked.0.lock().expect("no panic").len() < 3);
        let one = LogsRequest {
            task: id_text(&[20; 16]),
            follow: true,
            tail: Some(2),
            ..Default::default()
        };
        let parts = logs(&world(), &one, &here, &peers, &live).expect("a stream");
        let parts: Vec<LogsResponse> = parts.map(|it| it.expect("no refusal")).collect().await;
        let lines: Vec<i64> = parts
            .iter()
            .flat_map(|it| &it.lines)
            .map(|line| line.at)
            .collect();
        assert_eq!(lines, [10, 20, 30]);
        let asked = restless.0.lock().expect("no panic");
        let asked: Vec<_> = asked.iter().map(|it| (it.tail, it.since)).collect();
        assert_eq!(asked, [(Some(2), 0), (None, 11), (None, 21)]);
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
