//! Secrets: sealed before anything else sees them, and never shown again.

use bulkhead_proto::wire::{Cluster, CreateSecretRequest, Kind, RemoveRequest, Secret};
use bulkhead_proto::{Code, limits};
use bulkhead_raft::state::{Key, State};
use tonic::Status;

use super::change::{Decision, Plan, in_use, new_id, users};
use super::check;
use super::object::{Kept, SECRETS, get, label};
use crate::key_ring::KeyRing;
use crate::refusal::{internal, refuse};

/// Seals the value and makes the secret of it. `request` comes without its value.
pub(super) fn create(
    state: &State,
    request: &CreateSecretRequest,
    value: &[u8],
    cluster: &Cluster,
    ring: &KeyRing,
) -> Result<Decision, Status> {
    let id = new_id(&request.secret_id)?;
    if let Some(made) = get::<Secret>(state, &id).filter(|it| it.was_made_by(&request.request_id)) {
        return Ok(Decision::done(made));
    }
    check::name(&request.name)?;
    check::labels(&request.labels)?;
    if value.is_empty() || value.len() > limits::SECRET_BYTES {
        return Err(refuse(
            Code::OverLimit,
            tonic::Code::InvalidArgument,
            format!(
                "a secret has 1 to {} bytes, this one {}",
                limits::SECRET_BYTES,
                value.len()
            ),
            "check what is written into the command; a file that is larger is no secret but an image's content",
        ));
    }
    let sealed = ring
        .seal(cluster, Key::new(Kind::Secret, id), value)
        .map_err(|error| internal("cannot seal secrets", &error))?;
    let secret = Secret {
        id: id.to_vec(),
        name: request.name.clone(),
        value: Some(sealed),
        size: u32::try_from(value.len()).unwrap_or(u32::MAX),
        labels: request.labels.clone(),
        ..Default::default()
    };
    Ok(Plan::about(&id).create(secret).into())
}

/// The secret as an operator may see it.
pub(super) fn shown(secret: &Secret) -> Secret {
    Secret {
        value: None,
        ..secret.clone()
    }
}

/// Removes a secret that no service uses.
pub(super) fn remove(state: &State, request: &RemoveRequest) -> Result<Decision, Status> {
    let secret = SECRETS.find(state, &request.selector)?;
    match users(state, Some(&secret.reference())) {
        users if users.is_empty() => Ok(Plan::about(&secret.id).delete(secret).into()),
        users => Err(in_use(&format!("secret {}", label(secret)), &users)),
    }
}
