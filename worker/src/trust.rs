//! What this node trusts follows what the cluster trusts; and a node that no manager takes any more, since its certificate
//! ended or its root was rotated away while it was off, comes back by its key.

use std::time::Duration;

use bulkhead_identity::comeback::come_back;
use bulkhead_identity::seam::Entropy;
use bulkhead_identity::tls::Expect;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::keep::Keep;
use crate::session::{Connected, Trust, chain};

/// A node without a session for this long asks the managers whether its certificate is the reason.
const ALONE: Duration = Duration::from_secs(5);
/// And asks again at most this often.
const AGAIN: Duration = Duration::from_secs(15);

/// Follows the cluster, for ever.
pub(crate) async fn follow(
    keep: &Keep,
    mut trust: watch::Receiver<Trust>,
    mut connected: watch::Receiver<Option<Connected>>,
    entropy: &dyn Entropy,
) {
    let mut next = Instant::now();
    loop {
        let alone = async {
            sleep_until(next).await;
            // Gone is the session's sender only when this program ends.
            let _ = connected.wait_for(Option::is_none).await;
            timeout(ALONE, connected.wait_for(Option::is_some)).await.is_err()
        };
        // Cancel-safe: both only say that it is time to look.
        let alone = tokio::select! {
            biased;
            changed = trust.changed() => {
                if changed.is_err() {
                    return;
                }
                false
            }
            alone = alone => alone,
        };
        if alone {
            come_back_by_key(keep, entropy).await;
            next = Instant::now() + AGAIN;
            continue;
        }
        let roots = trust.borrow_and_update().roots.clone();
        if roots.is_empty() {
            continue;
        }
        match keep.trust(roots) {
            Ok(false) => {}
            Ok(true) => tracing::info!(target: "audit", "this node trusts other roots now"),
            Err(error) => {
                tracing::error!(error = %chain(&error), "the cluster's roots could not be taken up")
            }
        }
    }
}

async fn come_back_by_key(keep: &Keep, entropy: &dyn Entropy) {
    for manager in keep.managers() {
        let current = keep.identity().current();
        match come_back(&current, &manager.address, Expect::AnyManager, entropy).await {
            Ok(credentials) => match keep.renew(credentials) {
                Ok(()) => {
                    tracing::info!(target: "audit", "this node came back by its committed key");
                    return;
                }
                Err(error) => tracing::error!(error = %chain(&error), "new credentials could not be kept"),
            },
            Err(error) => {
                tracing::info!(manager = manager.address, error = %chain(&error), "not taken back there");
            }
        }
    }
}
