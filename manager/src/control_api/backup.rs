//! The recovery key, and the backups that are sealed to it.

use bulkhead_identity::recovery;
use bulkhead_proto::Code;
use bulkhead_proto::wire::{BackupChunk, Cluster, RecoveryKey, SetRecoveryKeyRequest};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tonic::Status;

use super::change::{Decision, Plan};
use super::{Parts, check, cluster};
use crate::backup::{MakeError, make};
use crate::refusal::{internal, refuse};

/// Sets the key that backups are sealed to from now on.
pub(super) fn set_key(
    cluster: &Cluster,
    request: &SetRecoveryKeyRequest,
    now_ms: i64,
) -> Result<Decision, Status> {
    if super::cluster::is_retry(cluster, &request.request_id) {
        return Ok(Decision::done(cluster));
    }
    if !recovery::is_public(&request.public_key) {
        return Err(check::invalid(
            "public_key",
            "it is no X25519 key that something can be sealed to",
        ));
    }
    match &cluster.recovery_key {
        Some(key) if key.public == request.public_key => return Ok(Decision::done(cluster)),
        Some(key) if !request.replace => {
            return Err(refuse(
                Code::Conflict,
                tonic::Code::FailedPrecondition,
                format!(
                    "the cluster has the recovery key {}",
                    recovery::fingerprint(&key.public)
                ),
                "keep using it, or repeat with --replace; backups that were made before open with the old one alone",
            ));
        }
        Some(_) | None => {}
    }
    let mut new = cluster.clone();
    new.recovery_key = Some(RecoveryKey {
        public: request.public_key.clone(),
        since: now_ms,
    });
    Ok(Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into())
}

/// The backup of the newest state, part by part.
pub(super) fn create(
    parts: &Parts,
    actor: &str,
    now_ms: i64,
) -> Result<BoxStream<'static, Result<BackupChunk, Status>>, Status> {
    let state = parts.replica.state();
    let cluster = cluster(&state)?;
    let made = make(&state, cluster, &parts.key_ring, &*parts.entropy, now_ms).map_err(|error| match error {
        MakeError::NoRecoveryKey => refuse(
            Code::NoRecoveryKey,
            tonic::Code::FailedPrecondition,
            "the cluster has no recovery key, so nobody could open a backup",
            "on a manager's machine: `bulkhead --socket DIR/manager.sock cluster recovery-key create -o FILE`; keep that file elsewhere",
        ),
        error => internal("cannot make a backup", &error),
    })?;
    tracing::info!(target: "audit", actor, index = state.index(), "a backup is made");
    let fresh = parts.fresh.clone();
    // Sealed or not, all of the cluster is in it: who asks must be listed until its last part has left.
    let sent = move |data| match fresh.is_fresh() {
        true => Ok(BackupChunk { data }),
        false => Err(crate::authz::stale()),
    };
    Ok(stream::iter(made).map(sent).boxed())
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::recovery::RecoveryKey as Key;
    use bulkhead_identity::seam::SystemEntropy;

    use super::super::testing::{plan, refused};
    use super::*;

    #[test]
    fn a_recovery_key_is_replaced_only_when_that_is_said() {
        let public = || {
            let key = Key::generate(&SystemEntropy).expect("random");
            key.public().to_vec()
        };
        let (one, two) = (public(), public());
        let request = |key: &[u8], replace| SetRecoveryKeyRequest {
            request_id: vec![1; 16],
            public_key: key.to_vec(),
            replace,
        };
        let cluster = |key: Option<&[u8]>| Cluster {
            id: vec![9; 16],
            recovery_key: key.map(|key| RecoveryKey {
                public: key.to_vec(),
                since: 3,
            }),
            ..Default::default()
        };
        let first = set_key(&cluster(None), &request(&one, false), 5).expect("planned");
        assert_eq!(plan(first).changes.len(), 1);
        let again = set_key(&cluster(Some(&one)), &request(&one, false), 5).expect("done");
        assert!(matches!(again, Decision::Done { .. }));
        let status = set_key(&cluster(Some(&one)), &request(&two, false), 5).expect_err("another");
        refused(&status, Code::Conflict, &recovery::fingerprint(&one), "--replace");
        plan(set_key(&cluster(Some(&one)), &request(&two, true), 5).expect("planned"));
        for bad in [vec![0; 32], vec![7; 5]] {
            let status = set_key(&cluster(None), &request(&bad, false), 5).expect_err("no key");
            refused(&status, Code::BadField, "X25519", "");
        }
    }
}
