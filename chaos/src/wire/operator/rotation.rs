//! Rotations of the root, and how an operator follows them.

use bulkhead_identity::comeback::come_back;
use bulkhead_identity::follow::{Due, Told, due, renew};
use bulkhead_identity::seam::SystemEntropy;
use bulkhead_identity::{Bundle, tls};
use bulkhead_lab::client::new_id;
use bulkhead_proto::wire::{GetClusterStatusRequest, GetRotationRequest, RotateRootRequest};
use tokio::time::{sleep, timeout};

use super::{CALL, Client, Control, Outcome};

/// After so many vain questions in a row an operator asks to come back by its key.
const VAIN: u32 = 4;

impl Client {
    /// Has the root rotated at some time, or not.
    pub(super) async fn rotate(mut self) {
        let trouble = u64::try_from(self.course.plan.trouble.as_micros()).unwrap_or(u64::MAX);
        for _ in 0..self.dice.below(3) {
            sleep(self.dice.micros(0, trouble / 2)).await;
            let Ok(request_id) = new_id() else { return };
            let request = RotateRootRequest {
                request_id,
                ..RotateRootRequest::default()
            };
            let outcome = self
                .change(|mut control| {
                    let request = request.clone();
                    async move { control.rotate_root(request).await }
                })
                .await;
            if matches!(outcome, Outcome::Done(..)) {
                self.course.record.note("the root is rotated");
                self.course.record.count(|counts| counts.rotations += 1);
            }
        }
    }

    /// Takes up new roots and certificates for all clients, as a context does; where it was late it comes back by its key.
    pub(super) async fn follow(mut self) {
        let mut vain = 0;
        loop {
            sleep(self.dice.micros(100_000, 300_000)).await;
            self.refresh();
            let at = self.dice.below(self.controls.len());
            let address = self.course.addresses.manager(at as u64 + 1);
            let current = self.identity.current();
            let asked = timeout(
                CALL,
                self.controls[at].get_cluster_status(GetClusterStatusRequest {}),
            )
            .await;
            let new = match asked {
                Ok(Ok(status)) => {
                    vain = 0;
                    let told = Told {
                        roots: &status.get_ref().roots,
                        former: None,
                        issuer: &status.get_ref().issuer,
                    };
                    match due(&current, &told) {
                        None => continue,
                        Some(Due::Trust) => Bundle::from_ders(status.get_ref().roots.clone())
                            .ok()
                            .map(|bundle| current.with_bundle(bundle)),
                        Some(Due::Renew) => {
                            match tls::channel(&self.identity, &address, tls::Expect::AnyManager) {
                                Ok(channel) => renew(channel, &SystemEntropy).await.ok(),
                                Err(_) => None,
                            }
                        }
                    }
                }
                Ok(Err(_)) | Err(_) => {
                    vain += 1;
                    if vain % VAIN != 0 {
                        continue;
                    }
                    come_back(&current, &address, tls::Expect::AnyManager, &SystemEntropy)
                        .await
                        .ok()
                }
            };
            if let Some(new) = new {
                let _kept = self.identity.replace(new);
            }
        }
    }
}

/// Whom a rotation of the root waits for, and why.
pub(super) async fn lagging(control: &mut Control) -> String {
    let asked = timeout(CALL, control.get_rotation(GetRotationRequest {})).await;
    let Ok(Ok(status)) = asked else {
        return "for whom it waits is not said".into();
    };
    let status = status.into_inner();
    let nodes = status.nodes.iter().filter(|it| it.waited_for);
    let names: Vec<String> = nodes.map(|it| format!("{} {}", it.name, it.lags)).collect();
    format!("{:?}, waits for {names:?} {}", status.phase(), status.paused)
}
