//! Signers outside of the cluster, which hold a root's key: what is asked of them, and how they fare.
//!
//! A signer is believed nothing. What it sends is held against the order before anything becomes of it, so the worst that
//! a signer can do to its cluster is not to sign. The protocol is in `docs/reference/external-signer.md`.

mod exchange;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_identity::bundle::{Root, RootError};
use bulkhead_identity::order::{Difference, Order};
use bulkhead_identity::outside::{Anchor, AnchorError, Url, UrlError};
use bulkhead_identity::seam::Clock;
use bulkhead_identity::{DialError, Identity};
use bulkhead_proto::wire::{ExternalSigner, SignerStatus};
use bulkhead_proto::{KeyId, limits};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::refusal::chain;

pub(crate) use watch::outside;
pub use watch::watch;

/// Why a signer's certificate is not there.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    /// The address is none.
    #[error("the signer's address is refused")]
    Url(#[from] UrlError),
    /// The authority under which it proves itself is none.
    #[error("the certificate of the signer's authority is refused")]
    Anchor(#[from] AnchorError),
    /// The root that it signs for is none.
    #[error("the root is refused")]
    Root(#[from] RootError),
    /// No connection, or who answers is not who it should be.
    #[error("the signer is not reached")]
    Dial(#[from] DialError),
    /// It did not answer in time.
    #[error("the signer did not answer within {} s", limits::SIGNER_EXCHANGE.as_secs())]
    Late,
    /// It does not speak HTTP/1.1.
    #[error("the signer's answer is no HTTP/1.1")]
    Http(#[from] hyper::Error),
    /// It refused. `said` is cut, and what cannot be printed is gone.
    #[error("the signer refused with status {status}: {said}")]
    Refused {
        /// The HTTP status. One that leads elsewhere is a refusal, too: it is not followed.
        status: u16,
        /// What it said.
        said: String,
    },
    /// Too much.
    #[error("the signer's answer has more than {} bytes", limits::SIGNER_ANSWER_BYTES)]
    Long,
    /// Another format.
    #[error("the signer's answer is not as docs/reference/external-signer.md says: {0}")]
    Format(&'static str),
    /// It lied: what came is not what was ordered.
    #[error("the signer sent another certificate than was asked for")]
    Lie(#[from] Difference),
}

impl SignerError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            SignerError::Url(_) => "write it as https://signer.example:8443/sign",
            SignerError::Anchor(_) => {
                "give the PEM file of the authority that signed the signer's own TLS certificate"
            }
            SignerError::Root(_) => {
                "give the signer's root, made as docs/operations/rotate-the-root.md shows"
            }
            SignerError::Dial(DialError::Tls { .. }) => {
                "check the signer's TLS certificate, --external-signer-ca, that it trusts the cluster's roots, and its log"
            }
            SignerError::Dial(_) | SignerError::Late => {
                "start the signer; check its address, and firewalls between it and every manager"
            }
            SignerError::Refused { .. } => "see the signer's log",
            SignerError::Http(_) | SignerError::Long | SignerError::Format(_) => {
                "check that the address is a signer's: docs/reference/external-signer.md"
            }
            SignerError::Lie(_) => {
                "do not trust this signer before you know why: docs/reference/external-signer.md says what it has to sign"
            }
        }
    }
}

/// When a signer will be needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// When a node renews.
    Later,
    /// When a rotation's next step makes every node renew with it.
    Soon,
}

/// How one signer fares here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// When it was asked last, milliseconds since 1970.
    asked_at: i64,
    /// When it signed last; 0: never.
    worked_at: i64,
    /// Since when it fails, and why at last.
    failing: Option<(i64, String)>,
}

impl Health {
    /// Whether the last answer was good.
    fn works(&self) -> bool {
        self.failing.is_none() && self.worked_at != 0
    }

    /// Whether it is time to ask again.
    fn is_due(&self, need: Need, now_ms: i64) -> bool {
        let pause = match (self.works(), need) {
            (true, Need::Later) => limits::SIGNER_CHECK,
            (false, _) | (true, Need::Soon) => limits::SIGNER_RETRY,
        };
        // A clock that was put back must not silence it.
        !(0..super::millis(pause)).contains(&now_ms.saturating_sub(self.asked_at))
    }

    fn note(&mut self, now_ms: i64, result: Result<(), String>) {
        self.asked_at = now_ms;
        match result {
            Ok(()) => {
                self.worked_at = now_ms;
                self.failing = None;
            }
            Err(reason) => {
                let since = self.failing.take().map_or(now_ms, |(since, _)| since);
                self.failing = Some((since, reason));
            }
        }
    }
}

/// Asks signers as this manager, and remembers how they fare. Clones share the memory.
#[derive(Debug, Clone)]
pub struct Signers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    identity: Identity,
    clock: Arc<dyn Clock>,
    /// By the root's key.
    health: Mutex<BTreeMap<KeyId, Health>>,
    exchanges: Semaphore,
    patience: Duration,
}

impl Signers {
    /// Signers that are asked as this node.
    pub fn new(identity: Identity, clock: Arc<dyn Clock>) -> Self {
        Self::with_patience(identity, clock, limits::SIGNER_EXCHANGE)
    }

    fn with_patience(identity: Identity, clock: Arc<dyn Clock>, patience: Duration) -> Self {
        Self(Arc::new(Inner {
            identity,
            clock,
            health: Mutex::default(),
            exchanges: Semaphore::new(limits::SIGNER_EXCHANGES),
            patience,
        }))
    }

    /// The certificate that is ordered, DER, signed with the key of `root`: checked against the order.
    ///
    /// # Errors
    /// [`SignerError`], within [`limits::SIGNER_EXCHANGE`].
    pub async fn sign(
        &self,
        signer: &ExternalSigner,
        root: &[u8],
        order: &Order,
    ) -> Result<Vec<u8>, SignerError> {
        let root = Root::from_der(root)?;
        let exchange = async {
            // It is never closed; that many at once are what a signer has to bear of one manager.
            let _one_of_them = self.0.exchanges.acquire().await.ok();
            exchange::exchange(&self.0.identity, signer, &root, order).await
        };
        let answer = timeout(self.0.patience, exchange).await;
        let checked = answer.unwrap_or(Err(SignerError::Late)).and_then(|der| {
            order.check(&root, &der)?;
            Ok(der)
        });
        self.note(root.key_id(), &checked);
        checked
    }

    fn note(&self, root: KeyId, result: &Result<Vec<u8>, SignerError>) {
        match result {
            Err(SignerError::Lie(difference)) => {
                let reason = chain(difference);
                tracing::error!(target: "audit", %root, reason, "the external signer sent another certificate than was asked for");
            }
            Err(error) => tracing::warn!(%root, error = chain(error), "the external signer does not sign"),
            Ok(_) => {}
        }
        let said = result.as_ref().map(drop).map_err(|error| chain(error));
        let now = self.now_ms();
        let mut health = self.0.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.entry(root).or_default().note(now, said);
    }

    pub(super) fn now_ms(&self) -> i64 {
        i64::try_from(self.0.clock.wall_millis()).unwrap_or(i64::MAX)
    }

    /// How the signer of this root fares, if it was ever asked.
    fn health(&self, root: KeyId) -> Option<Health> {
        let health = self.0.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.get(&root).cloned()
    }

    /// Whether the signer of this root signed when it was asked last.
    pub fn works(&self, root: KeyId) -> bool {
        self.health(root).is_some_and(|health| health.works())
    }

    /// The same for people.
    pub fn status(&self, root: KeyId, signer: &ExternalSigner) -> SignerStatus {
        let health = self.health(root).unwrap_or_default();
        let (failing_since, reason) = health.failing.unwrap_or_default();
        SignerStatus {
            root: root.to_wire(),
            url: signer.url.clone(),
            failing_since,
            reason,
            worked_at: health.worked_at,
        }
    }

    /// Forgets the signers of other roots than these: a cluster that rotates for years has had many.
    fn keep(&self, roots: &[KeyId]) {
        let mut health = self.0.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.retain(|root, _| roots.contains(root));
    }
}

/// Checks what an operator says of a signer, before anybody is asked.
///
/// # Errors
/// [`SignerError`].
pub fn check(signer: &ExternalSigner) -> Result<(), SignerError> {
    signer.url.parse::<Url>()?;
    Anchor::from_der(&signer.ca)?;
    Ok(())
}
