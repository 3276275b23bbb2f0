//! An operator's own part in a rotation of the root: the context trusts what the cluster trusts, has its certificate signed
//! by the new root, and comes back by its key where the old one was dropped meanwhile. Its end stays what it was.

use std::time::Duration;

use bulkhead_identity::Bundle;
use bulkhead_identity::comeback::come_back;
use bulkhead_identity::follow::{Due, Told, due, renew};
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::tls::Expect;
use bulkhead_proto::wire::ClusterStatus;
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::context::Context;

/// A command does not wait longer for what it does not need itself.
const CALL: Duration = Duration::from_secs(5);

/// Brings the context's key file up to what the cluster says; whether it changed. What fails is tried by the next
/// command: nothing that this one does depends on it.
pub(crate) async fn follow(context: &Context, channel: Channel, status: &ClusterStatus) -> bool {
    let followed = timeout(CALL, brought_up(context, channel, status)).await;
    matches!(followed, Ok(Ok(true)))
}

async fn brought_up(context: &Context, channel: Channel, status: &ClusterStatus) -> anyhow::Result<bool> {
    let mut changed = false;
    let mut current = context.identity()?.current();
    let told = Told {
        roots: &status.roots,
        former: None,
        issuer: &status.issuer,
    };
    if due(&current, &told) == Some(Due::Trust) {
        let bundle = Bundle::from_ders(status.roots.clone())?;
        current = context.replace(current.with_bundle(bundle))?;
        changed = true;
    }
    if due(&current, &told) == Some(Due::Renew) {
        context.replace(renew(channel, &SystemEntropy).await?)?;
        changed = true;
    }
    Ok(changed)
}

/// Asks each manager in turn to take this operator back; whether one did.
pub(crate) async fn come_back_by_key(context: &Context, addresses: &[String]) -> bool {
    let Ok(identity) = context.identity() else {
        return false;
    };
    let current = identity.current();
    for address in addresses {
        if let Ok(credentials) = come_back(&current, address, Expect::AnyManager, &SystemEntropy).await
            && context.replace(credentials).is_ok()
        {
            return true;
        }
    }
    false
}
