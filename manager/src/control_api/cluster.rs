//! The cluster object: its settings, and the rotation of its root.

use std::time::Duration;

use bulkhead_proto::wire::{Cluster, RotateRootRequest, Rotation, UpdateClusterRequest};
use bulkhead_proto::{Code, limits};
use tonic::Status;

use super::change::{Decision, Plan};
use super::check;
use super::object::Kept;
use crate::ca::CaError;
use crate::ca::rotation::Order;
use crate::refusal::{internal, refuse};

/// Changes settings.
pub(super) fn update(cluster: &Cluster, request: &UpdateClusterRequest) -> Result<Decision, Status> {
    if cluster.was_made_by(&request.request_id) {
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
    if new == *cluster {
        return Ok(Decision::done(cluster));
    }
    Ok(Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into())
}

/// Begins a rotation of the root; `begin` makes the new one. A manager that missed the last one is in `behind`: it would
/// not find back after another.
pub(super) fn rotate(
    cluster: &Cluster,
    request: &RotateRootRequest,
    behind: Option<&str>,
    begin: impl Fn(Order) -> Result<Rotation, CaError>,
) -> Result<Decision, Status> {
    if cluster.was_made_by(&request.request_id) {
        return Ok(Decision::done(cluster));
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
            "`bulkhead cluster ca status` shows how far it is; begin the next one when it ended",
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
    let order = Order {
        deadline,
        compromised: request.compromised,
    };
    let rotation = begin(order).map_err(|error| internal("cannot make a root", &error))?;
    let mut new = cluster.clone();
    new.rotation = Some(rotation);
    Ok(Plan::about(&cluster.id)
        .unless_changed(cluster)
        .replace(new)
        .into())
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::Meta;

    use super::super::testing::{plan, refused};
    use super::*;

    fn cluster() -> Cluster {
        Cluster {
            id: vec![9; 16],
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
    fn one_rotation_at_a_time_within_its_bounds() {
        let request = |id: u8, deadline_ms| RotateRootRequest {
            request_id: vec![id; 16],
            deadline_ms,
            compromised: false,
        };
        let begin = |order: Order| {
            Ok(Rotation {
                deadline: i64::try_from(order.deadline.as_secs()).expect("small"),
                ..Default::default()
            })
        };
        let status = rotate(&cluster(), &request(1, 9_999), None, begin).expect_err("too short");
        refused(&status, Code::BadField, "10 seconds", "");
        assert_eq!(
            plan(rotate(&cluster(), &request(1, 0), None, begin).expect("planned"))
                .changes
                .len(),
            1
        );
        let again = rotate(&cluster(), &request(4, 0), None, begin).expect("a retry");
        assert!(matches!(again, Decision::Done { .. }));
        let mut under_way = cluster();
        under_way.rotation = Some(Rotation::default());
        let status = rotate(&under_way, &request(1, 0), None, begin).expect_err("the second");
        refused(&status, Code::Conflict, "under way", "cluster ca status");
        let status = rotate(&cluster(), &request(1, 0), Some("m2"), begin).expect_err("it would be lost");
        refused(&status, Code::Unsafe, "manager m2", "node rm --force");
        let mut compromised = request(1, 0);
        compromised.compromised = true;
        plan(rotate(&cluster(), &compromised, Some("m2"), begin).expect("it joins again"));
        let none = rotate(&cluster(), &request(1, 0), None, |_| Err(CaError::NoRoot)).expect_err("no key");
        refused(&none, Code::Internal, "", "");
    }
}
