//! One conversation with a cluster: finds a manager that answers, and tries again where that is safe.
//!
//! Every change carries ids that the caller chose, so the same change sent twice is one. Hence a broken connection or an
//! election is waited out; what stays open after that is said to be unknown, never failed.

use std::path::Path;
use std::time::Duration;

use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::local_client::LocalClient;
use bulkhead_proto::wire::{ClusterStatus, GetClusterStatusRequest, MemberStatus, RemoveRequest};
use bulkhead_proto::{Code, KeyId, limits};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status};

use bulkhead_identity::tls::{self, Expect};

use crate::context::{Context, reorder};
use crate::follow::{come_back_by_key, follow};
use crate::output::text;
use crate::refusal::{Refusal, from_status};

/// A manager that says nothing for this long is passed over for the next.
const PROBE: Duration = Duration::from_secs(1);
/// One try of an ordinary request.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Tries end after this time: an election is over long before, and a person still waits.
const RETRY: Duration = Duration::from_secs(10);
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_millis(800);

/// The control service of one manager.
pub(crate) type Control = ControlClient<Channel>;

/// How long a request may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// One try.
    pub(crate) attempt: Duration,
    /// All of them.
    pub(crate) total: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            attempt: ATTEMPT,
            total: RETRY,
        }
    }
}

impl Patience {
    /// Where a manager may have to ask a signer outside of the cluster, twice for a rotation.
    pub(crate) fn for_signing() -> Self {
        let signed = 2 * limits::SIGNER_EXCHANGE;
        Self {
            attempt: ATTEMPT + signed,
            total: RETRY + signed,
        }
    }

    /// For blobs, whose one try may be long.
    pub(crate) fn for_blobs() -> Self {
        Self {
            attempt: Duration::from_secs(600),
            total: Duration::from_secs(600),
        }
    }
}

/// A way to one manager; the channel connects when it is used.
#[derive(Debug, Clone)]
struct Endpoint {
    address: String,
    channel: Channel,
}

/// What a retry means for the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing changes.
    Read,
    /// Something may have changed although no answer came.
    Change,
}

/// What one manager said.
#[derive(Debug)]
pub(crate) struct Answered {
    /// Its name, or its address where nobody knows its name.
    pub(crate) who: String,
    /// What it said, or why it said nothing.
    pub(crate) status: Result<ClusterStatus, String>,
}

/// A conversation with the managers of one cluster, or with one program's socket.
#[derive(Debug)]
pub(crate) struct Connection {
    endpoints: Vec<Endpoint>,
    /// The one that answers; `None`: to be found.
    chosen: Option<usize>,
    /// Where the search begins.
    next: usize,
    /// The key that it speaks with. `None`: a socket.
    key: Option<KeyId>,
    /// Where to remember who answered. `None`: a socket, which is one program, so there is nobody else to ask.
    context: Option<Context>,
}

impl Connection {
    /// With the cluster of a context, as its operator.
    pub(crate) fn through(context: Context) -> Result<Self, Refusal> {
        let identity = context.identity()?;
        let addresses = context.managers()?;
        let endpoint = |address: &String| {
            let channel = tls::channel(&identity, address, Expect::AnyManager).map_err(|e| {
                let help = "correct the context's list of managers, or make the context again";
                Refusal::new(Code::Unreachable, address, e.to_string(), help)
            })?;
            Ok(Endpoint {
                address: address.clone(),
                channel,
            })
        };
        Ok(Self {
            endpoints: addresses.iter().map(endpoint).collect::<Result<_, _>>()?,
            chosen: None,
            next: 0,
            key: Some(identity.current().certificate.key_id()),
            context: Some(context),
        })
    }

    /// Through the local socket of one program.
    pub(crate) fn to_socket(path: &Path) -> Result<Self, Refusal> {
        let address = path.display().to_string();
        if !path.exists() {
            let help = "check the path, and that the program runs";
            return Err(Refusal::new(
                Code::Unreachable,
                address,
                "there is no such socket",
                help,
            ));
        }
        let channel = tonic::transport::Endpoint::from_shared(format!("unix://{address}"))
            .map_err(|e| Refusal::new(Code::BadField, "--socket", e.to_string(), "name a plain path"))?
            .connect_lazy();
        Ok(Self {
            endpoints: vec![Endpoint { address, channel }],
            chosen: Some(0),
            next: 0,
            key: None,
            context: None,
        })
    }

    /// The service of the program behind a local socket.
    pub(crate) fn local(&self) -> LocalClient<Channel> {
        LocalClient::new(self.endpoints[0].channel.clone())
    }

    /// Asks, without changing anything.
    pub(crate) async fn ask<R>(
        &mut self,
        place: &str,
        call: impl AsyncFn(Control) -> Result<Response<R>, Status>,
    ) -> Result<R, Refusal> {
        self.call(Effect::Read, Patience::default(), place, call).await
    }

    /// Changes something. The request inside `call` is the same on each try, ids included.
    pub(crate) async fn change<R>(
        &mut self,
        place: &str,
        call: impl AsyncFn(Control) -> Result<Response<R>, Status>,
    ) -> Result<R, Refusal> {
        self.call(Effect::Change, Patience::default(), place, call).await
    }

    /// [`Connection::change`] where a certificate is signed for it.
    pub(crate) async fn change_signed<R>(
        &mut self,
        place: &str,
        call: impl AsyncFn(Control) -> Result<Response<R>, Status>,
    ) -> Result<R, Refusal> {
        self.call(Effect::Change, Patience::for_signing(), place, call)
            .await
    }

    /// Calls until it is answered, refused or out of patience.
    pub(crate) async fn call<R>(
        &mut self,
        effect: Effect,
        patience: Patience,
        place: &str,
        call: impl AsyncFn(Control) -> Result<Response<R>, Status>,
    ) -> Result<R, Refusal> {
        let deadline = Instant::now() + patience.total;
        let mut backoff = FIRST_BACKOFF;
        let mut sent = false;
        loop {
            let failure = match self.choose().await {
                Err(refusal) => refusal,
                Ok(at) => {
                    let until = deadline.min(Instant::now() + patience.attempt);
                    match timeout_at(until, call(self.client(at))).await {
                        Ok(Ok(answer)) => return Ok(answer.into_inner()),
                        Ok(Err(status)) => match after(&status) {
                            Next::Give => return Err(from_status(&status, place)),
                            Next::Again { sent: this } => {
                                sent |= this;
                                self.move_on(at);
                                from_status(&status, place)
                            }
                        },
                        Err(_) => {
                            sent = true;
                            self.move_on(at);
                            let reason = format!("{} did not answer in time", self.endpoints[at].address);
                            Refusal::new(
                                Code::Unreachable,
                                place,
                                reason,
                                "'bulkhead cluster status' shows who is up",
                            )
                        }
                    }
                }
            };
            if Instant::now() + backoff >= deadline {
                return Err(give_up(effect, sent, place, failure));
            }
            sleep(backoff).await;
            backoff = LONGEST_BACKOFF.min(backoff * 2);
        }
    }

    /// The state of the cluster, even from a manager that is not up to date.
    pub(crate) async fn status(&mut self) -> Result<ClusterStatus, Refusal> {
        self.ask("cluster status", async |mut control| {
            control.get_cluster_status(GetClusterStatusRequest {}).await
        })
        .await
    }

    /// What each manager that is known says of the cluster, or why it says nothing.
    pub(crate) async fn each_status(&mut self) -> Result<Vec<Answered>, Refusal> {
        // Who is known is what a manager said last.
        let members = self.status().await?.members;
        let mut all = Vec::new();
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            let mut control = self.client(at);
            let status = match timeout(PROBE, control.get_cluster_status(GetClusterStatusRequest {})).await {
                Ok(Ok(answer)) => Ok(answer.into_inner()),
                Ok(Err(status)) => Err(chain(&status)),
                Err(_) => Err(format!("no answer within {} s", PROBE.as_secs())),
            };
            // Behind a socket only the answer says who it is.
            let is_it = |it: &&MemberStatus| match &status {
                Ok(status) => it.node_id == status.node_id,
                Err(_) => it.address == endpoint.address,
            };
            let name = members
                .iter()
                .find(is_it)
                .map_or_else(|| endpoint.address.clone(), |it| it.name.clone());
            all.push(Answered { who: name, status });
        }
        let met = |member: &&MemberStatus| all.iter().any(|it: &Answered| it.who == member.name);
        let unknown: Vec<&MemberStatus> = members.iter().filter(|member| !met(member)).collect();
        let missing = unknown.into_iter().map(|member| Answered {
            who: member.name.clone(),
            status: Err("this connection does not reach it".to_owned()),
        });
        let missing: Vec<Answered> = missing.collect();
        all.extend(missing);
        Ok(all)
    }

    /// Looks for a manager anew with the next call, as a new command does.
    pub(crate) fn look_again(&mut self) {
        if self.context.is_some() {
            self.chosen = None;
        }
    }

    fn client(&self, at: usize) -> Control {
        ControlClient::new(self.endpoints[at].channel.clone())
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES)
    }

    fn move_on(&mut self, from: usize) {
        if self.context.is_some() {
            self.chosen = None;
            self.next = from + 1;
        }
    }

    /// The manager that answered before; else the first fresh one, else one that answers at all.
    async fn choose(&mut self) -> Result<usize, Refusal> {
        if let Some(at) = self.chosen {
            return Ok(at);
        }
        match self.look().await {
            Err(refusal) if self.came_back(&refusal).await => self.look().await,
            found => found,
        }
    }

    /// Where the certificate was turned away, its root may have been rotated away: speaks with the newer one that another
    /// command got meanwhile, or comes back by the operator's key.
    async fn came_back(&mut self, refusal: &Refusal) -> bool {
        let Some(context) = self.context.clone() else {
            return false;
        };
        // Either side may be the one that does not know the other's root any more.
        let turned_away = ["fatal alert", "rotated away", "UnknownIssuer"]
            .iter()
            .any(|words| refusal.says(words));
        let on_disk = context
            .identity()
            .ok()
            .map(|it| it.current().certificate.key_id());
        if on_disk == self.key {
            let addresses: Vec<String> = self.endpoints.iter().map(|it| it.address.clone()).collect();
            if !turned_away || !come_back_by_key(&context, &addresses).await {
                return false;
            }
        }
        match Self::through(context) {
            Ok(again) => {
                *self = again;
                true
            }
            Err(_) => false,
        }
    }

    async fn look(&mut self) -> Result<usize, Refusal> {
        let count = self.endpoints.len();
        let (mut stale, mut reasons) = (None, Vec::new());
        for at in (0..count).map(|step| (self.next + step) % count) {
            let address = &self.endpoints[at].address;
            let mut control = self.client(at);
            match timeout(PROBE, control.get_cluster_status(GetClusterStatusRequest {})).await {
                Ok(Ok(answer)) => {
                    let status = answer.into_inner();
                    if !status.stale {
                        self.chosen = Some(at);
                        self.remember(at, &status);
                        if let Some(context) = self.context.clone()
                            && follow(&context, self.endpoints[at].channel.clone(), &status).await
                        {
                            // From here on with the new certificate, to the same manager.
                            let address = std::mem::take(&mut self.endpoints[at].address);
                            *self = Self::through(context)?;
                            self.chosen = self.endpoints.iter().position(|it| it.address == address);
                            return Ok(self.chosen.unwrap_or(0));
                        }
                        return Ok(at);
                    }
                    stale = stale.or(Some(at));
                }
                // Being turned away is an answer, and no other manager would say otherwise.
                Ok(Err(status)) if after(&status) == Next::Give => return Err(from_status(&status, address)),
                Ok(Err(status)) => reasons.push(format!("{address}: {}", chain(&status))),
                Err(_) => reasons.push(format!("{address}: no answer within {} s", PROBE.as_secs())),
            }
        }
        if let Some(at) = stale {
            self.chosen = Some(at);
            return Ok(at);
        }
        let reason = if reasons.is_empty() {
            "the context lists no manager".to_owned()
        } else {
            reasons.join("; ")
        };
        if is_about_time(&reason)
            && let Some(refusal) = Box::pin(self.clocks_differ(&reason)).await
        {
            return Err(refusal);
        }
        let help = match reason.contains("UnknownIssuer") {
            true => {
                "the managers prove a root that this context does not know: it was rotated away as compromised, or more \
                 than once, or they are of another cluster; become an operator again with a ticket"
            }
            false => "check that the managers run and that their ports can be reached from here",
        };
        Err(Refusal::new(Code::Unreachable, "managers", reason, help))
    }

    /// A certificate was not believed for its time: where the clocks are apart, that is why.
    async fn clocks_differ(&self, reason: &str) -> Option<Refusal> {
        for endpoint in self.endpoints.iter().filter(|_| self.context.is_some()) {
            let asked = text::now_ms();
            if let Ok(Ok(theirs)) = timeout(PROBE, tls::ask_clock(&endpoint.address)).await {
                let ours = asked.midpoint(text::now_ms());
                return clocks_apart(ours, theirs, &endpoint.address, reason);
            }
        }
        None
    }

    /// Keeps who answered, and who else there is, for the next command.
    fn remember(&self, at: usize, status: &ClusterStatus) {
        let Some(context) = &self.context else { return };
        let kept: Vec<String> = self.endpoints.iter().map(|e| e.address.clone()).collect();
        let members: Vec<String> = status
            .members
            .iter()
            .map(|member| member.address.clone())
            .collect();
        if let Some(list) = reorder(&kept, Some(at), &members) {
            // Only a shortcut: without it the next command looks for a manager as this one did.
            let _ = context.keep_managers(&list);
        }
    }
}

/// Every object of a list, page by page.
macro_rules! pages {
    ($connection:expr, $place:expr, $method:ident, $request:expr, $field:ident) => {{
        let mut request = $request;
        let mut all = Vec::new();
        loop {
            let answer = $connection
                .ask($place, async |mut control| control.$method(request.clone()).await)
                .await?;
            all.extend(answer.$field);
            if answer.next.is_empty() {
                break all;
            }
            request.after = answer.next;
        }
    }};
}
pub(crate) use pages;

/// The one object that a selector names, as a list of one.
macro_rules! one {
    ($connection:expr, $noun:literal, $method:ident, $field:ident, $selector:expr) => {{
        let request = bulkhead_proto::wire::ListRequest {
            selector: $selector.to_owned(),
            ..Default::default()
        };
        let place = format!(concat!($noun, " {}"), $selector);
        let found = $crate::connection::pages!($connection, &place, $method, request, $field);
        found
            .into_iter()
            .next()
            .ok_or_else(|| $crate::connection::absent(&place, $noun))
    }};
}
pub(crate) use one;

/// A list that came back empty for a name.
pub(crate) fn absent(place: &str, noun: &str) -> Refusal {
    let help = format!("'bulkhead {noun} ls' shows what there is");
    Refusal::new(
        Code::NotFound,
        place,
        "there is none of this name, id or prefix",
        help,
    )
}

/// Removes what has this id. Never a name: a manager that stood still may handle a request long after it was sent to another
/// one, and would remove what is newer under that name.
pub(crate) fn removal(id: &[u8]) -> RemoveRequest {
    RemoveRequest {
        request_id: text::new_id().to_vec(),
        selector: text::id(id),
        ..Default::default()
    }
}

/// Whether a connection failed because a certificate is not yet, or no more, valid by one side's clock.
fn is_about_time(reason: &str) -> bool {
    let words = reason.to_lowercase();
    words.contains("expired") || words.contains("not valid yet")
}

/// Names both clocks where they are too far apart to agree about certificates.
fn clocks_apart(ours: i64, theirs: i64, address: &str, reason: &str) -> Option<Refusal> {
    let apart = Duration::from_millis(ours.abs_diff(theirs));
    if apart <= limits::CLOCK_SKEW {
        return None;
    }
    let time = |ms: i64| text::time(ms).as_str().unwrap_or("1970").to_owned();
    let reason = format!(
        "this machine's clock says {}, the one at {address} says {}: they are {} apart; {reason}",
        time(ours),
        time(theirs),
        text::rough(apart)
    );
    let help =
        "set both clocks, best by NTP, and try again; 'bulkhead node ls' shows the clocks of all nodes";
    Some(Refusal::new(Code::ClockSkew, "managers", reason, help))
}

/// What to do after a failed try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// The answer stands.
    Give,
    /// Try again; `sent`: this try may have had its effect.
    Again { sent: bool },
}

fn after(status: &Status) -> Next {
    use tonic::Code as Grpc;
    if let Some(code) = crate::refusal::code_of(status) {
        return match code {
            Code::NoQuorum | Code::NotReady | Code::Busy => Next::Again { sent: false },
            Code::OutcomeUnknown => Next::Again { sent: true },
            _ => Next::Give,
        };
    }
    let source = std::error::Error::source(status);
    match status.code() {
        Grpc::Unavailable => Next::Again {
            sent: !never_connected(source),
        },
        Grpc::DeadlineExceeded => Next::Again { sent: true },
        // With a source it was the transport that failed; without, the manager said so itself.
        Grpc::Unknown | Grpc::Cancelled | Grpc::Internal if source.is_some() => Next::Again {
            sent: !never_connected(source),
        },
        _ => Next::Give,
    }
}

fn never_connected(mut cause: Option<&(dyn std::error::Error + 'static)>) -> bool {
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The innermost cause, which says what went wrong; the layers around it only repeat that something did.
fn chain(status: &Status) -> String {
    let mut cause = std::error::Error::source(status);
    let mut text = status.message().to_owned();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

fn give_up(effect: Effect, sent: bool, place: &str, last: Refusal) -> Refusal {
    if effect == Effect::Read || !sent {
        return last;
    }
    let reason = format!("the change was sent, and no answer came: {}", last.reason());
    let help = "it may have been made; look with 'ls' or 'inspect' before you try again";
    Refusal::new(Code::OutcomeUnknown, place, reason, help)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::CODE_KEY;

    fn coded(code: Code) -> Status {
        let mut status = Status::unavailable("x");
        status
            .metadata_mut()
            .insert(CODE_KEY, code.as_str().parse().expect("ASCII"));
        status
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let connect = tonic::ConnectError("refused".into());
        let refused = Status::from_error(Box::new(connect));
        let cases = [
            (refused, Next::Again { sent: false }),
            (Status::unavailable("gone"), Next::Again { sent: true }),
            (Status::deadline_exceeded("late"), Next::Again { sent: true }),
            (Status::permission_denied("no"), Next::Give),
            (Status::internal("bug"), Next::Give),
            (Status::not_found("no"), Next::Give),
            (coded(Code::NoQuorum), Next::Again { sent: false }),
            (coded(Code::NotReady), Next::Again { sent: false }),
            (coded(Code::OutcomeUnknown), Next::Again { sent: true }),
            (coded(Code::StorageFull), Next::Give),
        ];
        for (status, want) in cases {
            assert_eq!(after(&status), want, "{status:?}");
        }
    }

    #[test]
    fn a_certificate_refused_for_its_time_names_both_clocks_where_they_differ() {
        let expired = "m1: invalid peer certificate: certificate expired: verification time 1 (UNIX)";
        for (reason, about) in [
            (expired, true),
            ("received fatal alert: CertificateExpired", true),
            (
                "invalid peer certificate: certificate not valid yet: verification time 1",
                true,
            ),
            ("invalid peer certificate: UnknownIssuer", false),
            ("no answer within 1 s", false),
        ] {
            assert_eq!(is_about_time(reason), about, "{reason}");
        }
        assert_eq!(clocks_apart(30_000, 0, "m1", expired), None);
        let refusal = clocks_apart(1_000, 7_201_000, "m1", expired).expect("apart");
        assert_eq!(refusal.code(), Code::ClockSkew);
        for part in [
            "1970-01-01T00:00:01Z",
            "m1 says 1970-01-01T02:00:01Z",
            "2h apart",
            expired,
        ] {
            assert!(refusal.reason().contains(part), "{refusal}");
        }
    }

    #[test]
    fn only_a_change_that_was_sent_is_unknown() {
        let last = || Refusal::new(Code::NoQuorum, "x", "no leader", "wait");
        assert_eq!(
            give_up(Effect::Change, true, "x", last()).code(),
            Code::OutcomeUnknown
        );
        assert_eq!(give_up(Effect::Change, false, "x", last()).code(), Code::NoQuorum);
        assert_eq!(give_up(Effect::Read, true, "x", last()).code(), Code::NoQuorum);
    }
}
