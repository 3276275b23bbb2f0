//! The gRPC health service: a manager serves while its replica is fresh.

use bulkhead_proto::limits;
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};

use crate::freshness::Fresh;

/// The services of a manager, and the program as a whole under the empty name.
const SERVICES: [&str; 6] = [
    "",
    "bulkhead.v1.Control",
    "bulkhead.v1.Dispatcher",
    "bulkhead.v1.Enrolment",
    "bulkhead.v1.Peer",
    "bulkhead.v1.Raft",
];

/// The health service, and what keeps it true until it is stopped.
pub fn health(
    fresh: Fresh,
    stop: CancellationToken,
) -> (
    HealthServer<impl Health>,
    impl Future<Output = ()> + Send + 'static,
) {
    let (reporter, service) = tonic_health::server::health_reporter();
    let follow = async move {
        let mut period = tokio::time::interval(limits::FRESHNESS_PERIOD);
        let mut said = None;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = period.tick() => {}
            }
            let status = if fresh.is_fresh() {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            if said.replace(status) != Some(status) {
                for service in SERVICES {
                    reporter.set_service_status(service, status).await;
                }
            }
        }
        for service in SERVICES {
            reporter
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
    };
    (service, follow)
}
