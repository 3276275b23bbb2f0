//! Generated protobuf messages, clients and servers. Whatever came from outside is still unchecked in these types:
//! convert it with [`crate::domain`] at the edge.
#![allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

use std::fmt;

tonic::include_proto!("bulkhead.v1");

/// The compiled descriptors of every message and service, for tests that walk them.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

macro_rules! redacted {
    ($($message:ident { $($shown:ident),* };)*) => {$(
        impl fmt::Debug for $message {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($message))$(.field(stringify!($shown), &self.$shown))*.finish_non_exhaustive()
            }
        }
    )*};
}

redacted! {
    AssignedSecret { id, name };
    CreateSecretRequest { secret_id, name, labels };
    EnrolRequest { advertise, name };
    CreateTicketResponse { index, id, expires_at };
    JoinRequest { addresses, listen, advertise, name };
    EnrolResponse { node_id, role, member_id, index, name, unlock_generation };
    RenewResponse { index, member_id, unlock_generation };
    InitResponse { node_id, name };
    UnlockRequest {};
    GetUnlockKeyResponse { index, generation };
    RotateRootRequest { deadline_ms, compromised, root, external_signer };
    RestoreOrder { listen, advertise, name, forget };
    BackupKey { epoch };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_a_secret_prints_without_it() {
        const CANARY: &str = "canary-8d1f";
        let bytes = CANARY.as_bytes().to_vec();
        let secret = AssignedSecret {
            id: vec![1],
            name: "db".into(),
            value: bytes.clone(),
        };
        let assignments = Assignments {
            secrets: vec![secret],
            ..Default::default()
        };
        let down = SessionDown {
            message: Some(session_down::Message::Assignments(assignments)),
        };
        let printed = [
            format!("{down:?}"),
            format!(
                "{:?}",
                CreateSecretRequest {
                    value: bytes.clone(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                EnrolRequest {
                    ticket_secret: bytes.clone(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                CreateTicketResponse {
                    ticket: CANARY.into(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                RotateRootRequest {
                    root_key: bytes.clone(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                JoinRequest {
                    ticket: CANARY.into(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                EnrolResponse {
                    unlock_key: bytes.clone(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                RenewResponse {
                    unlock_key: bytes.clone(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                InitResponse {
                    unlock_key: CANARY.into(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                UnlockRequest {
                    unlock_key: CANARY.into()
                }
            ),
            format!(
                "{:?}",
                GetUnlockKeyResponse {
                    unlock_key: CANARY.into(),
                    ..Default::default()
                }
            ),
            format!(
                "{:?}",
                RestoreRequest {
                    message: Some(restore_request::Message::Order(RestoreOrder {
                        recovery_key: bytes.clone(),
                        ..Default::default()
                    }))
                }
            ),
            format!(
                "{:?}",
                BackupManifest {
                    keys: vec![BackupKey {
                        epoch: 1,
                        key: bytes.clone()
                    }],
                    ..Default::default()
                }
            ),
        ];
        let as_list = format!("{bytes:?}");
        for text in printed {
            assert!(!text.contains(CANARY) && !text.contains(&as_list), "{text}");
        }
    }
}
