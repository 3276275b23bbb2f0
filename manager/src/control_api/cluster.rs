//! The cluster object: its settings, its lock, and the rotation of its root.

use std::time::Duration;

use bulkhead_proto::wire::{
    Autolock, CancelRotationRequest, Cluster, ConfirmUnlockKeyRequest, ExternalSigner, GetUnlockKeyResponse,
    KeyRingEpoch, MoveSignerRequest, RotateKeyRingRequest, RotateRootRequest, RotateUnlockKeyRequest,
    Rotation, UpdateClusterRequest,
};
use bulkhead_proto::{Code, limits};
use tonic::Status;

use super::change::{Decision, Plan};
use super::check;
use crate::ca::CaError;
use crate::ca::given::{self, GivenError};
use crate::ca::rotation::{self, Next, NoWayBack, Order};
use crate::ca::{signer, signing_refused};
use crate::key_ring::{KeyRing, KeyRingError};
use crate::lock::{self, LockError};
use crate::refusal::{chain, internal, refuse};

/// Whether this request changed the cluster object lately: whatever leaders and managers did to it since, it is done.
pub(super) fn is_retry(cluster: &Cluster, request: &[u8]) -> bool {
    cluster.requests.iter().any(|it| it == request)
}

/// Changes settings; `renewed` makes a lock with a new key.
pub(super) fn update(
    cluster: &Cluster,
    request: &UpdateClusterRequest,
    renewed: impl Fn() -> Result<Autolock, LockError>,
) -> Result<Decision, Status> {
    if is_retry(cluster, &request.request_id) {
        return Ok(Decision::done(cluster));
    }
    let mut new = cluster.clone();
    if request.node_certificate_validity_ms != 0 {
        let asked = Duration::from_millis(request.node_certificate_validity_ms);
        if !limits::CERTIFICATE_VALIDITIES.contains(&asked) {
            return Err(check::invalid(
                "node_certificate_validity_ms",
                "a node's certificate is valid for 5 minutes to 365 days",
            ));
        }
        new.settings.get_or_insert_default().node_certificate_validity_ms =
            request.node_certificate_validity_ms;
    }
    match request.autolock {
        Some(true) if lock::generation(cluster) == 0 && lock::pending(cluster) == 0 => {
            new.autolock = Some(renewed().map_err(|error| not_locked(&error))?);
        }
        Some(false) => new.autolock = lock::off(cluster).or(new.autolock),
        Some(true) | None => {}
    }
    if request.key_rotation_ms != 0 {
        if !limits::KEY_ROTATIONS.contains(&Duration::from_millis(request.key_rotation_ms)) {
            return Err(check::invalid(
                "key_rotation_ms",
                "an epoch of the key ring lives for 1 hour to 10 years",
            ));
        }
        new.settings.get_or_insert_default().key_rotation_ms = request.key_rotation_ms;
    }
    if new == *cluster {
        return Ok(Decision::done(cluster));
    }
    Ok(Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into())
}

/// Makes the next unlock key; `renewed` makes a lock with it.
pub(super) fn rotate_unlock_key(
    cluster: &Cluster,
    request: &RotateUnlockKeyRequest,
    renewed: impl Fn() -> Result<Autolock, LockError>,
) -> Result<Decision, Status> {
    if is_retry(cluster, &request.request_id) {
        return Ok(Decision::done(cluster));
    }
    if lock::generation(cluster) == 0 && lock::pending(cluster) == 0 {
        return Err(not_locked(&LockError::Off));
    }
    let mut new = cluster.clone();
    new.autolock = Some(renewed().map_err(|error| not_locked(&error))?);
    Ok(Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into())
}

/// Has managers use the newest unlock key, which an operator has now.
pub(super) fn confirm_unlock_key(
    cluster: &Cluster,
    request: &ConfirmUnlockKeyRequest,
) -> Result<Decision, Status> {
    if is_retry(cluster, &request.request_id) || lock::generation(cluster) == request.generation {
        return Ok(Decision::done(cluster));
    }
    let lock = lock::confirmed(cluster, request.generation).ok_or_else(|| {
        refuse(
            Code::Conflict,
            tonic::Code::FailedPrecondition,
            format!("unlock key {} is not the newest", request.generation),
            "look at the newest: `bulkhead cluster unlock-key show`",
        )
    })?;
    let mut new = cluster.clone();
    new.autolock = Some(lock);
    // What stood on disk under the key of before, or in the clear, is to be of no use to who finds it.
    new.reseal += 1;
    Ok(Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into())
}

/// Begins an epoch of the key ring; `begun` is the ring with it. The leader moves everything to it and forgets the others.
pub(super) fn rotate_key_ring(
    cluster: &Cluster,
    request: &RotateKeyRingRequest,
    begun: impl Fn() -> Result<Vec<KeyRingEpoch>, KeyRingError>,
) -> Result<Decision, Status> {
    if is_retry(cluster, &request.request_id) {
        return Ok(Decision::done(cluster));
    }
    if cluster.key_ring.len() > 1 {
        return Err(refuse(
            Code::Conflict,
            tonic::Code::FailedPrecondition,
            "the key ring is being renewed already",
            "`bulkhead cluster status` shows how far it is; begin the next one when it ended",
        ));
    }
    let mut new = cluster.clone();
    new.key_ring = begun().map_err(|error| internal("cannot begin an epoch of the key ring", &error))?;
    Ok(Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into())
}

/// An unlock key, for a person; the newest, in use or not, where no generation is named.
pub(super) fn unlock_key(
    cluster: &Cluster,
    ring: &KeyRing,
    generation: u32,
    index: u64,
) -> Result<GetUnlockKeyResponse, Status> {
    let asked = match generation {
        0 => lock::generation(cluster).max(lock::pending(cluster)),
        asked => asked,
    };
    if asked == 0 {
        return Err(not_locked(&LockError::Off));
    }
    let key =
        lock::key(cluster, ring, asked).map_err(|error| internal("cannot open the unlock key", &error))?;
    let key = key.ok_or_else(|| {
        refuse(
            Code::NotFound,
            tonic::Code::NotFound,
            format!("unlock key {asked} is not kept: no manager of the cluster needs it"),
            "a manager that is locked with it was removed: empty its data folder and join it again",
        )
    })?;
    Ok(GetUnlockKeyResponse {
        index,
        generation: asked,
        unlock_key: key.to_text().to_string(),
    })
}

fn not_locked(error: &LockError) -> Status {
    let (code, hint) = match error {
        LockError::Off => (
            Code::Invalid,
            "turn it on first: `bulkhead cluster update --autolock on`",
        ),
        LockError::Behind(_) => (
            Code::Unsafe,
            "start the manager that `bulkhead cluster status` shows with that key, or remove it",
        ),
        LockError::KeyRing(error) => return internal("cannot use the key ring", error),
    };
    refuse(code, tonic::Code::FailedPrecondition, error.to_string(), hint)
}

/// What a request for a rotation comes to.
#[derive(Debug)]
pub(super) enum Asked {
    /// It stands already.
    Done(Decision),
    /// One begins.
    Begin(Order),
}

/// Whether a rotation of the root may begin. A manager that missed the last one is in `behind`: after another one
/// the others would not meet it over Raft, and it could be needed for the quorum.
pub(super) fn may_rotate(
    cluster: &Cluster,
    request: &RotateRootRequest,
    behind: Option<&str>,
) -> Result<Asked, Status> {
    if is_retry(cluster, &request.request_id) {
        return Ok(Asked::Done(Decision::done(cluster)));
    }
    let deadline = match request.deadline_ms {
        0 => limits::ROTATION_DEADLINE,
        asked => Duration::from_millis(asked),
    };
    if !limits::ROTATION_DEADLINES.contains(&deadline) {
        return Err(check::invalid(
            "deadline_ms",
            "a rotation waits for 10 seconds to 30 days",
        ));
    }
    if cluster.rotation.is_some() {
        return Err(refuse(
            Code::Conflict,
            tonic::Code::FailedPrecondition,
            "a rotation of the root is under way",
            "`bulkhead cluster ca status` shows how far it is; begin the next one when it ended, or take this one back with \
             `bulkhead cluster ca cancel` while the old root still signs",
        ));
    }
    if let (Some(manager), false) = (behind, request.compromised) {
        return Err(refuse(
            Code::Unsafe,
            tonic::Code::FailedPrecondition,
            format!(
                "manager {manager} has no certificate of the present root yet, and would not find back after another"
            ),
            "start it and wait until it is back, or remove it: `bulkhead node rm --force`",
        ));
    }
    Ok(Asked::Begin(Order {
        deadline,
        compromised: request.compromised,
    }))
}

/// The root that a rotation is to lead to: a new one, one that was brought with its key, or one whose key is outside.
pub(super) fn next_root(
    cluster: &Cluster,
    request: &RotateRootRequest,
    key: &[u8],
    now_ms: i64,
) -> Result<Next, Status> {
    let refused = |error: GivenError| {
        refuse(
            Code::BadRoot,
            tonic::Code::InvalidArgument,
            format!("the given root is refused: {}", chain(&error)),
            error.hint(),
        )
    };
    if request.compromised && !request.root.is_empty() {
        given::leaves_compromised(cluster, &request.root).map_err(refused)?;
    }
    let Some(signer) = &request.external_signer else {
        if request.root.is_empty() && key.is_empty() {
            return Next::generate(cluster, now_ms).map_err(|error| no_root(&error));
        }
        let given = given::given(cluster, &request.root, key, now_ms).map_err(refused)?;
        return Ok(Next::Here(Box::new(given)));
    };
    if !key.is_empty() {
        return Err(check::invalid(
            "root_key",
            "the key of a root that an external signer signs for stays with the signer",
        ));
    }
    given::fits(cluster, &request.root, now_ms).map_err(refused)?;
    check_signer(signer)?;
    Ok(Next::Outside {
        root: request.root.clone(),
        signer: signer.clone(),
    })
}

fn check_signer(signer: &ExternalSigner) -> Result<(), Status> {
    signer::check(signer).map_err(|error| {
        refuse(
            Code::BadField,
            tonic::Code::InvalidArgument,
            chain(&error),
            error.hint(),
        )
    })
}

/// Why there is no root to rotate to, or no way to it from the present one.
pub(super) fn no_root(error: &CaError) -> Status {
    signing_refused("cannot make a root", error)
}

/// What it means that the signer of the present root does not certify the next one.
pub(super) fn no_way(cluster: &Cluster, error: &CaError) -> Status {
    match (error, &cluster.external_signer) {
        (CaError::Signer { source, .. }, Some(_)) => refuse(
            Code::SignerFails,
            tonic::Code::Unavailable,
            format!(
                "the present root's signer does not certify the next root: {}",
                chain(&**source)
            ),
            "let it sign a cross-certificate (docs/reference/external-signer.md); if it is gone for good, rotate with \
             --compromised: nodes that are down then must join again",
        ),
        _ => no_root(error),
    }
}

/// The rotation as it is committed.
pub(super) fn begun(cluster: &Cluster, rotation: Rotation) -> Decision {
    Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(rotation::begun(cluster, rotation))
        .into()
}

/// Whether a root's signer may be looked for elsewhere; nothing where it stands already.
pub(super) fn may_move_signer(
    cluster: &Cluster,
    request: &MoveSignerRequest,
) -> Result<Option<ExternalSigner>, Status> {
    if is_retry(cluster, &request.request_id) {
        return Ok(None);
    }
    let signer = request.external_signer.clone().unwrap_or_default();
    check_signer(&signer)?;
    if signer::outside(cluster).is_empty() {
        return Err(refuse(
            Code::Conflict,
            tonic::Code::FailedPrecondition,
            "no external signer signs for a root of this cluster",
            "`bulkhead cluster ca rotate --ca-cert FILE --external-signer URL --external-signer-ca FILE` rotates to one",
        ));
    }
    Ok(Some(signer))
}

/// The signer of this root, the present one or the one that a rotation leads to, is there from now on.
pub(super) fn moved_signer(cluster: &Cluster, root: &[u8], signer: ExternalSigner) -> Decision {
    let mut new = cluster.clone();
    match &mut new.rotation {
        Some(rotation) if rotation.root == root => rotation.external_signer = Some(signer),
        _ => new.external_signer = Some(signer),
    }
    Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into()
}

/// Takes a rotation back, while the old root signs.
pub(super) fn cancel(
    cluster: &Cluster,
    request: &CancelRotationRequest,
    most_renewed: impl FnOnce() -> bool,
) -> Result<Decision, Status> {
    if is_retry(cluster, &request.request_id) {
        return Ok(Decision::done(cluster));
    }
    let refused = |message: &str, hint: &str| {
        Err(refuse(
            Code::Conflict,
            tonic::Code::FailedPrecondition,
            message,
            hint,
        ))
    };
    match rotation::cancelled(cluster, most_renewed) {
        Ok(new) => Ok(Plan::about(&cluster.id)
            .unless_changed(cluster)
            .replace(new)
            .into()),
        Err(NoWayBack::NoRotation) => refused(
            "no rotation of the root is under way",
            "there is nothing to cancel; `bulkhead cluster ca status` shows the root",
        ),
        Err(NoWayBack::Issuing) => refused(
            "the new root signs already: nodes that have a certificate of it would be cut off",
            "let it end, as `bulkhead cluster ca status` shows; then rotate again if the new root is not to stay",
        ),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_identity::Authority;
    use bulkhead_proto::ClusterId;
    use bulkhead_proto::wire::{Meta, RotationPhase};

    use super::super::testing::{plan, refused};
    use super::*;

    /// In 2026.
    const NOW: i64 = 1_780_000_000_000;

    fn cluster() -> Cluster {
        Cluster {
            id: vec![9; 16],
            requests: vec![vec![4; 16]],
            meta: Some(Meta {
                version: 3,
                last_request: vec![4; 16],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_validity_of_certificates_has_bounds_and_a_retry_changes_nothing() {
        let request = |id: u8, validity: Duration| UpdateClusterRequest {
            request_id: vec![id; 16],
            node_certificate_validity_ms: u64::try_from(validity.as_millis()).expect("small"),
            ..Default::default()
        };
        let update = |cluster: &Cluster, request: &UpdateClusterRequest| {
            super::update(cluster, request, || Err(LockError::Off))
        };
        let minutes = |count: u64| Duration::from_secs(60 * count);
        for validity in [minutes(4), minutes(366 * 24 * 60)] {
            let status = update(&cluster(), &request(1, validity)).expect_err("out of bounds");
            refused(&status, Code::BadField, "5 minutes to 365 days", "");
        }
        let planned = plan(update(&cluster(), &request(1, minutes(5))).expect("planned"));
        assert_eq!(planned.changes.len(), 1);
        assert_eq!(planned.preconditions.len(), 1);
        for nothing in [request(4, minutes(5)), request(1, Duration::ZERO)] {
            let decided = update(&cluster(), &nothing).expect("decided");
            assert!(matches!(decided, Decision::Done { version: 3, .. }));
        }
    }

    #[test]
    fn autolock_goes_on_and_off_and_its_key_rotates_only_while_it_is_on() {
        let locked = |generation| Autolock {
            on: true,
            generation,
            confirmed: generation,
            ..Default::default()
        };
        let request = |id: u8, autolock| UpdateClusterRequest {
            request_id: vec![id; 16],
            autolock,
            ..Default::default()
        };
        let of = |decision: Decision| {
            let planned = plan(decision);
            let Some(bulkhead_proto::wire::change::Change::Replace(object)) = &planned.changes[0].change
            else {
                panic!("it replaces")
            };
            let Some(bulkhead_proto::wire::object::Object::Cluster(cluster)) = &object.object else {
                panic!("the cluster")
            };
            cluster.autolock.clone().expect("a lock")
        };
        let on = update(&cluster(), &request(1, Some(true)), || Ok(locked(1))).expect("planned");
        assert_eq!(of(on), locked(1));
        let mut with_lock = cluster();
        with_lock.autolock = Some(locked(1));
        for nothing in [request(1, Some(true)), request(1, None)] {
            let decided = update(&with_lock, &nothing, || panic!("no new key")).expect("decided");
            assert!(matches!(decided, Decision::Done { .. }));
        }
        let off = update(&with_lock, &request(1, Some(false)), || panic!("no new key")).expect("planned");
        assert!(!of(off).on);
        let decided = update(&cluster(), &request(1, Some(false)), || panic!("no new key")).expect("decided");
        assert!(matches!(decided, Decision::Done { .. }));

        let request = |id: u8| RotateUnlockKeyRequest {
            request_id: vec![id; 16],
        };
        let status = rotate_unlock_key(&cluster(), &request(1), || Ok(locked(1))).expect_err("it is off");
        refused(&status, Code::Invalid, "autolock is off", "--autolock on");
        let next = rotate_unlock_key(&with_lock, &request(1), || Ok(locked(2))).expect("planned");
        assert_eq!(of(next), locked(2));
        let again = rotate_unlock_key(&with_lock, &request(4), || panic!("a retry")).expect("decided");
        assert!(matches!(again, Decision::Done { .. }));
        let mut seen_by_none = with_lock.clone();
        seen_by_none.autolock = Some(Autolock {
            generation: 2,
            ..locked(1)
        });
        let confirm = |cluster: &Cluster, generation| {
            let request = ConfirmUnlockKeyRequest {
                request_id: vec![1; 16],
                generation,
            };
            confirm_unlock_key(cluster, &request)
        };
        let confirmed = confirm(&seen_by_none, 2).expect("planned");
        assert_eq!(of(confirmed), locked(2));
        let decided = confirm(&with_lock, 1).expect("decided");
        assert!(matches!(decided, Decision::Done { .. }));
        let status = confirm(&seen_by_none, 3).expect_err("there is none");
        refused(&status, Code::Conflict, "unlock key 3", "unlock-key show");
        let behind =
            rotate_unlock_key(&with_lock, &request(1), || Err(LockError::Behind(1))).expect_err("behind");
        refused(&behind, Code::Unsafe, "unlock key 1", "cluster status");
    }

    #[test]
    fn one_rotation_at_a_time_within_its_bounds() {
        let request = |id: u8, deadline_ms| RotateRootRequest {
            request_id: vec![id; 16],
            deadline_ms,
            ..Default::default()
        };
        let order = |asked: Result<Asked, Status>| match asked.expect("allowed") {
            Asked::Begin(order) => order,
            Asked::Done(decision) => panic!("{decision:?}"),
        };
        let status = may_rotate(&cluster(), &request(1, 9_999), None).expect_err("too short");
        refused(&status, Code::BadField, "10 seconds", "");
        let usual = order(may_rotate(&cluster(), &request(1, 0), None));
        assert_eq!(usual.deadline, limits::ROTATION_DEADLINE);
        let planned = plan(begun(&cluster(), Rotation::default()));
        assert_eq!((planned.changes.len(), planned.preconditions.len()), (1, 1));
        let again = may_rotate(&cluster(), &request(4, 0), None).expect("a retry");
        assert!(matches!(again, Asked::Done(Decision::Done { .. })));
        let mut under_way = cluster();
        under_way.rotation = Some(Rotation::default());
        let status = may_rotate(&under_way, &request(1, 0), None).expect_err("the second");
        refused(&status, Code::Conflict, "under way", "cluster ca status");
        let status = may_rotate(&cluster(), &request(1, 0), Some("m2")).expect_err("it would be lost");
        refused(&status, Code::Unsafe, "manager m2", "node rm --force");
        let mut compromised = request(1, 0);
        compromised.compromised = true;
        assert!(order(may_rotate(&cluster(), &compromised, Some("m2"))).compromised);
        refused(&no_root(&CaError::NoRoot), Code::Internal, "", "");
    }

    fn rooted() -> (Cluster, Authority) {
        let authority = Authority::generate(ClusterId::from_bytes([9; 16]), NOW).expect("a root");
        let cluster = Cluster {
            root_certificate: authority.root_der().to_vec(),
            ..cluster()
        };
        (cluster, authority)
    }

    #[test]
    fn a_given_root_that_does_not_fit_is_refused_with_what_to_do() {
        let (cluster, present) = rooted();
        let mut request = RotateRootRequest {
            root: present.root_der().to_vec(),
            ..Default::default()
        };
        let status = next_root(&cluster, &request, present.key_pkcs8(), NOW).expect_err("the same again");
        refused(
            &status,
            Code::BadRoot,
            "the cluster's root already",
            "give another one",
        );
        request.external_signer = Some(signer("https://signer.example:8443"));
        let status = next_root(&cluster, &request, &[], NOW).expect_err("the same again");
        refused(&status, Code::BadRoot, "the cluster's root already", "");
    }

    fn signer(url: &str) -> ExternalSigner {
        ExternalSigner {
            url: url.to_owned(),
            ca: rooted().1.root_der().to_vec(),
        }
    }

    #[test]
    fn an_external_signer_is_given_without_the_key_and_with_an_address_of_its_own() {
        let (cluster, _) = rooted();
        let outside = rooted().1;
        let request = |signer| RotateRootRequest {
            root: outside.root_der().to_vec(),
            external_signer: Some(signer),
            ..Default::default()
        };
        let good = request(signer("https://signer.example:8443/sign"));
        let next = next_root(&cluster, &good, &[], NOW).expect("good");
        assert!(matches!(next, Next::Outside { .. }) && next.root() == outside.root_der());
        let status = next_root(&cluster, &good, outside.key_pkcs8(), NOW).expect_err("its key");
        refused(&status, Code::BadField, "stays with the signer", "");
        for url in ["http://signer.example:8443", "https://a:b@signer.example:1", ""] {
            let status = next_root(&cluster, &request(signer(url)), &[], NOW).expect_err("no address");
            refused(
                &status,
                Code::BadField,
                "address is refused",
                "https://signer.example",
            );
        }
        let mut no_ca = signer("https://signer.example:8443");
        no_ca.ca = b"none".to_vec();
        let status = next_root(&cluster, &request(no_ca), &[], NOW).expect_err("no certificate");
        refused(&status, Code::BadField, "authority is refused", "PEM");
    }

    #[test]
    fn a_signer_that_does_not_certify_the_next_root_can_be_gone_without() {
        let (mut cluster, _) = rooted();
        let error = CaError::Signer {
            url: String::new(),
            source: Box::new(signer::SignerError::Late),
        };
        let status = no_way(&cluster, &error);
        refused(&status, Code::SignerFails, "did not answer", "start the signer");
        cluster.external_signer = Some(signer("https://signer.example:8443"));
        refused(
            &no_way(&cluster, &error),
            Code::SignerFails,
            "did not answer",
            "--compromised",
        );
    }

    #[test]
    fn a_signer_moves_where_there_is_one() {
        let request = |id: u8, url: &str| MoveSignerRequest {
            request_id: vec![id; 16],
            external_signer: Some(signer(url)),
        };
        let url = "https://signer.example:8443";
        let status = may_move_signer(&cluster(), &request(1, url)).expect_err("there is none");
        refused(&status, Code::Conflict, "no external signer", "ca rotate");
        let outside = Cluster {
            external_signer: Some(signer(url)),
            ..rooted().0
        };
        assert_eq!(
            may_move_signer(&outside, &request(4, url)).expect("a retry"),
            None
        );
        let status = may_move_signer(&outside, &request(1, "ftp://a:1")).expect_err("no address");
        refused(&status, Code::BadField, "https://", "");
        let moved = may_move_signer(&outside, &request(1, url)).expect("it moves");
        let planned = plan(moved_signer(
            &outside,
            &outside.root_certificate,
            moved.expect("an address"),
        ));
        assert_eq!((planned.changes.len(), planned.preconditions.len()), (1, 1));
    }

    #[test]
    fn a_rotation_is_taken_back_while_the_old_root_signs_and_no_later() {
        let request = |id: u8| CancelRotationRequest {
            request_id: vec![id; 16],
        };
        let status = cancel(&cluster(), &request(1), || false).expect_err("none is under way");
        refused(&status, Code::Conflict, "no rotation", "nothing to cancel");
        let under_way = |phase: RotationPhase| Cluster {
            rotation: Some(Rotation {
                phase: phase.into(),
                ..Default::default()
            }),
            ..cluster()
        };
        let planned = plan(cancel(&under_way(RotationPhase::Bundle), &request(1), || true).expect("planned"));
        assert_eq!((planned.changes.len(), planned.preconditions.len()), (1, 1));
        let mut begun = under_way(RotationPhase::Bundle);
        for exposed in [false, true] {
            begun.rotation.get_or_insert_default().exposed = exposed;
            let want = Cluster {
                reseal: 1,
                root_exposed: exposed,
                ..cluster()
            };
            assert_eq!(rotation::cancelled(&begun, || true), Ok(want));
        }
        let status = cancel(&under_way(RotationPhase::Issue), &request(1), || false).expect_err("too late");
        refused(&status, Code::Conflict, "signs already", "let it end");
        let again = cancel(&cluster(), &request(4), || false).expect("a retry");
        assert!(matches!(again, Decision::Done { .. }));
    }
}
