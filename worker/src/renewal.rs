//! Renews this node's certificate long before it ends.

use crate::keep::{Keep, KeepError};
use crate::session::{Connected, Trust, chain};
use bulkhead_identity::follow::{self, Due};
use bulkhead_identity::seam::{Clock, Entropy};
use bulkhead_identity::{
    Bundle, BundleError, Certificate, Credentials, Key, KeyError, ProfileError, renewal,
};
use bulkhead_proto::{limits, wire};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use wire::dispatcher_client::DispatcherClient;

/// The clock is asked again at least this often: it may have been set.
const LOOK: Duration = Duration::from_secs(600);
/// One attempt.
const ATTEMPT: Duration = Duration::from_secs(15);
/// Between attempts: a rotation of the root waits for this node. Without a session there is none.
const RETRY: Duration = Duration::from_secs(2);

/// Why an attempt failed.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("no manager answers")]
    Late,
    #[error("the manager refused")]
    Refused(#[from] Box<tonic::Status>),
    #[error("no new key")]
    Key(#[from] KeyError),
    #[error("the certificate that came does not fit the profile")]
    Profile(#[from] ProfileError),
    #[error("the roots that came do not fit")]
    Roots(#[from] BundleError),
    #[error("the certificate that came is not for the key that was sent")]
    OtherKey,
    #[error(transparent)]
    Keep(#[from] KeepError),
}

/// Renews whenever it is due, for ever.
pub async fn run(
    keep: &Keep,
    mut connected: watch::Receiver<Option<Connected>>,
    mut trust: watch::Receiver<Trust>,
    clock: &dyn Clock,
    entropy: &dyn Entropy,
) {
    loop {
        let current = keep.identity().current();
        let due = renewal::due_at(
            current.certificate.not_before_ms(),
            current.certificate.not_after_ms(),
            random(entropy),
        );
        tokio::select! {
            biased;
            () = sleep_until(due, clock) => {}
            () = other_issuer(keep, &mut trust) => {}
        }
        // One key for all attempts: a manager that has issued for it already answers the same certificate.
        let pending = loop {
            match Pending::new(entropy) {
                Ok(pending) => break pending,
                Err(error) => tracing::error!(error = %chain(&error), "no key for a new certificate"),
            }
            tokio::time::sleep(RETRY).await;
        };
        while let Err(error) = pending.attempt(keep, &mut connected).await {
            tracing::warn!(error = %chain(&error), "the certificate could not be renewed; will be tried again");
            tokio::time::sleep(RETRY).await;
        }
        tracing::info!(target: "audit", "this node has a new certificate");
    }
}

struct Pending {
    key: Key,
    csr: Vec<u8>,
    request: Vec<u8>,
}

impl Pending {
    fn new(entropy: &dyn Entropy) -> Result<Self, RenewError> {
        let key = Key::generate()?;
        let csr = key.csr()?;
        let request = [random(entropy).to_le_bytes(), random(entropy).to_le_bytes()].concat();
        Ok(Pending { key, csr, request })
    }

    async fn attempt(
        &self,
        keep: &Keep,
        connected: &mut watch::Receiver<Option<Connected>>,
    ) -> Result<(), RenewError> {
        let asked = async {
            let connected = connected
                .wait_for(Option::is_some)
                .await
                .map_err(|_| RenewError::Late)?
                .clone();
            let channel = connected.ok_or(RenewError::Late)?.channel;
            // Not while there is no session: then it is coming back by its key that helps.
            let turn = keep.turn().await;
            let mut client = DispatcherClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES);
            let request = wire::RenewRequest {
                csr: self.csr.clone(),
                request_id: self.request.clone(),
                role: wire::Role::Unspecified.into(),
            };
            let answer = client.renew(request).await.map_err(Box::new)?.into_inner();
            Ok::<_, RenewError>((turn, answer))
        };
        let (_turn, answer) = timeout(ATTEMPT, asked).await.map_err(|_| RenewError::Late)??;
        let certificate = Certificate::from_der(&answer.certificate)?;
        if certificate.key_id() != self.key.key_id() {
            return Err(RenewError::OtherKey);
        }
        let bundle = match answer.roots.is_empty() {
            true => keep.identity().current().bundle.clone(),
            false => Bundle::from_ders(answer.roots)?,
        };
        keep.renew(Credentials {
            key: self.key.clone(),
            certificate,
            chain: answer.chain,
            bundle,
        })?;
        Ok(())
    }
}

/// Resolves once another root signs than the one that issued this node's certificate.
async fn other_issuer(keep: &Keep, trust: &mut watch::Receiver<Trust>) {
    let mut changed = keep.identity().changed();
    loop {
        let told = trust.borrow_and_update().clone();
        // Roots that this node does not trust yet are waited for.
        if follow::due(&keep.identity().current(), &told.told()) == Some(Due::Renew) {
            return;
        }
        tokio::select! {
            told = trust.changed() => if told.is_err() { return std::future::pending().await },
            _ = changed.changed() => {}
        }
    }
}

async fn sleep_until(due_ms: i64, clock: &dyn Clock) {
    loop {
        let now = i64::try_from(clock.wall_millis()).unwrap_or(i64::MAX);
        let Ok(left @ 1..) = u64::try_from(due_ms.saturating_sub(now)) else {
            return;
        };
        tokio::time::sleep(Duration::from_millis(left).min(LOOK)).await;
    }
}

/// Spreads renewals; without randomness they merely come at the same time.
fn random(entropy: &dyn Entropy) -> u64 {
    let mut bytes = [0; 8];
    match entropy.fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => 0,
    }
}
