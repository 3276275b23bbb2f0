//! The layer: reads what the connection proved, asks [`decide`], and puts the [`Principal`] into the request.

use std::sync::Arc;
use std::task::{Context, Poll};

use bulkhead_identity::seam::Clock;
use bulkhead_identity::{ConnectInfo, Peer};
use bulkhead_proto::{Caller, ClusterId, Code, Method, Standing};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::{Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::guard::Guarded;
use super::right::Right;
use super::{Decision, KeyState, Listing, Principal, ReplicaAge, decide, denied, rotated, stale, unlisted};
use crate::audit::Notes;
use crate::ca::clone::{self, Shown};
use crate::freshness::Fresh;
use crate::peers::Peers;
use crate::refusal::refuse;

/// Health says only whether this manager serves, so whoever has a certificate of the cluster may ask.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// Puts [`Authz`] before every service of a server.
#[derive(Debug, Clone)]
pub struct AuthzLayer(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    cluster: ClusterId,
    listing: Listing,
    fresh: Fresh,
    peers: Peers,
    clock: Arc<dyn Clock>,
    notes: Notes,
    stop: CancellationToken,
}

impl AuthzLayer {
    /// Decides for this cluster; `stop` ends every open stream.
    pub fn new(
        cluster: ClusterId,
        listing: Listing,
        fresh: Fresh,
        peers: Peers,
        clock: Arc<dyn Clock>,
        notes: Notes,
        stop: CancellationToken,
    ) -> Self {
        Self(Arc::new(Parts {
            cluster,
            listing,
            fresh,
            peers,
            clock,
            notes,
            stop,
        }))
    }
}

impl<S> Layer<S> for AuthzLayer {
    type Service = Authz<S>;

    fn layer(&self, inner: S) -> Authz<S> {
        Authz {
            parts: self.0.clone(),
            inner,
        }
    }
}

/// A service behind the layer.
#[derive(Debug, Clone)]
pub struct Authz<S> {
    parts: Arc<Parts>,
    inner: S,
}

impl<S> Service<Request<Body>> for Authz<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let waiting = self.inner.clone();
        let mut ready = std::mem::replace(&mut self.inner, waiting);
        let parts = self.parts.clone();
        async move {
            let path = request.uri().path().to_owned();
            let method = Method::from_path(&path);
            let principal = match parts.authorise(&path, method, request.extensions().get()).await {
                Ok(principal) => principal,
                Err(status) => return Ok(status.into_http()),
            };
            let right = method.and_then(|method| parts.right(method, &principal));
            let stop = parts.stop.clone();
            request.extensions_mut().insert(principal);
            let answer = ready.call(request).await?;
            Ok(answer.map(|body| Body::new(Guarded::new(body, right, stop))))
        }
        .boxed()
    }
}

impl Parts {
    async fn authorise(
        &self,
        path: &str,
        method: Option<Method>,
        connection: Option<&ConnectInfo>,
    ) -> Result<Principal, Status> {
        // Without what the connection proved nobody is anybody.
        let (peer, address, opened_ms) = connection.map_or((&Peer::Anonymous, None, 0), |it| {
            (&it.peer, it.address, it.opened_ms)
        });
        let principal = Principal::new(peer, address, opened_ms);
        let standing = method.map(Method::standing);
        let raft = standing == Some(Standing::NotRemoved);
        if let Peer::Node(certificate) = peer
            && standing != Some(Standing::None)
            && self.listing.is_dropped(certificate, raft)
        {
            return Err(rotated());
        }
        let refused = match method {
            Some(method) => match self.decide(method, peer, &principal).await {
                Decision::Allowed => {
                    if raft {
                        self.watch_for_clones(&principal);
                    }
                    return Ok(principal);
                }
                Decision::Clone => {
                    self.watch_for_clones(&principal);
                    tracing::warn!(target: "audit", path, actor = principal.actor, ?address, "call with a superseded key refused");
                    return Err(clone::refused());
                }
                Decision::Denied => denied(principal.caller),
                Decision::Unlisted => unlisted(principal.caller),
                Decision::Unavailable => stale(),
            },
            None if path.starts_with(HEALTH) && principal.caller != Caller::Anonymous => {
                return Ok(principal);
            }
            None => refuse(
                Code::Unsupported,
                tonic::Code::Unimplemented,
                "this manager has no such method",
                "use programs of the same version",
            ),
        };
        match refused.code() {
            tonic::Code::Unavailable => {
                tracing::debug!(path, actor = principal.actor, "call put off: not fresh")
            }
            _ => {
                let from = address.map(|it| it.to_string()).unwrap_or_default();
                tracing::warn!(target: "audit", path, actor = principal.actor, address = from, "call denied");
                // Only a path that is ours: the caller chose the others.
                let called = method.map_or("no method of ours", Method::path);
                let from = address.map(|it| it.ip());
                self.notes
                    .refused(&principal.actor, from, format_args!("call: {called}"));
            }
        }
        Err(refused)
    }

    /// Tells of the caller where its key is superseded. Raft methods take it all the same: they know no list but that of dead
    /// keys.
    fn watch_for_clones(&self, principal: &Principal) {
        if let (Some(subject), Some(key)) = (&principal.subject, principal.key_id)
            && self.fresh.is_fresh()
            && self.listing.of(subject, key, principal.opened_ms) == KeyState::Superseded
        {
            self.notes.saw_clone(Shown {
                node: subject.node,
                key,
                address: principal.address.map(|it| it.ip()),
                opened_ms: principal.opened_ms,
            });
        }
    }

    async fn decide(&self, method: Method, peer: &Peer, principal: &Principal) -> Decision {
        if let Peer::Node(certificate) = peer {
            let listed = !matches!(method.standing(), Standing::None | Standing::NotRemoved);
            // The handshake saw it valid; the connection may be older than the certificate's end.
            let now = i64::try_from(self.clock.wall_millis()).unwrap_or(i64::MAX);
            let expired = listed && now > certificate.not_after_ms();
            if certificate.subject().cluster != self.cluster || expired {
                return Decision::Denied;
            }
        }
        let first = self.decide_now(method, principal);
        let known = || !matches!(self.key(principal), KeyState::Unknown | KeyState::Superseded);
        if first == Decision::Allowed && method.sees_latest() {
            return match self.fresh.see_latest(&self.peers).await {
                true => self.decide_now(method, principal),
                false => Decision::Unavailable,
            };
        }
        if first == Decision::Allowed || !method.callers().contains(principal.caller) || known() {
            return first;
        }
        // Admitted, or certified anew, a moment ago on another manager, perhaps: learn what is committed, once, and decide again.
        self.fresh.catch_up(&self.peers).await;
        self.decide_now(method, principal)
    }

    fn decide_now(&self, method: Method, principal: &Principal) -> Decision {
        let age = match self.fresh.is_fresh() {
            true => ReplicaAge::Fresh,
            false => ReplicaAge::Stale,
        };
        decide(method, principal.caller, self.key(principal), age)
    }

    fn key(&self, principal: &Principal) -> KeyState {
        match (&principal.subject, principal.key_id) {
            (Some(subject), Some(key)) => self.listing.of(subject, key, principal.opened_ms),
            _ => KeyState::Unknown,
        }
    }

    /// What an open stream needs; nothing where no list decides, or where the call is what ends it: whoever withdraws
    /// is to hear that it did.
    fn right(&self, method: Method, principal: &Principal) -> Option<Right> {
        let current = match method.standing() {
            _ if method == Method::DispatcherWithdraw => return None,
            Standing::Listed => true,
            Standing::NotRemoved => false,
            Standing::ListedMaybeStale | Standing::None => return None,
        };
        Some(Right {
            fresh: self.fresh.clone(),
            listing: self.listing.clone(),
            clock: self.clock.clone(),
            caller: principal.caller,
            key: principal.subject.zip(principal.key_id).filter(|_| current),
            opened_ms: principal.opened_ms,
            certificate: principal.certificate.clone(),
            current,
        })
    }
}
