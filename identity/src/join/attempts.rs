//! What a joiner must not lose between two tries: its key and the request's id, with what it asked for.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_proto::wire::JoinRequest;
use bulkhead_proto::{RequestId, Role};
use prost::Message;
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

use super::{Enrolment, JoinError};
use crate::Key;
use crate::seam::{Entropy as _, SystemEntropy};
use crate::store;

/// The key and the request id of the last join, for the next one that asks for the same.
///
/// A program holds it for its life. On disk it is only while an operator is waited for: a program that ended at another
/// time in between counts as another node.
#[derive(Debug, Default)]
pub struct Attempts {
    last: Mutex<Option<Attempt>>,
    file: Option<PathBuf>,
    pending: Option<JoinRequest>,
}

#[derive(Debug)]
struct Attempt {
    /// The digest of what was asked for.
    wish: [u8; 32],
    key: Key,
    request_id: RequestId,
}

impl Attempts {
    /// Those of a program of this role, which keeps a wait for approval in this file, for its owner alone. A file that
    /// an earlier life left is gone on with ([`Attempts::pending`]); one that cannot be read counts as none.
    pub fn kept(file: &Path, role: Role) -> Self {
        let mut attempts = Self {
            file: Some(file.to_owned()),
            ..Self::default()
        };
        match read(file) {
            Ok(Some((pending, key, request_id))) => {
                let attempt = Attempt {
                    wish: wish(role, &pending),
                    key,
                    request_id,
                };
                attempts.last = Mutex::new(Some(attempt));
                attempts.pending = Some(pending);
            }
            Ok(None) => {}
            Err(reason) => {
                tracing::warn!(file = %file.display(), reason, "an earlier wait for approval is lost")
            }
        }
        attempts
    }

    /// What an earlier life of this program waited for, until that ended one way or the other.
    pub fn pending(&self) -> Option<JoinRequest> {
        self.last().as_ref().and(self.pending.clone())
    }

    /// The key and request id for this wish: those of the last call where it was the same, else new ones.
    pub(super) fn of(&self, request: &Enrolment) -> Result<(Key, RequestId), JoinError> {
        let wish = wish(request.role, &order(request));
        let mut last = self.last();
        let attempt = match last.take().filter(|attempt| attempt.wish == wish) {
            Some(attempt) => attempt,
            None => Attempt::new(wish)?,
        };
        let key = attempt.key.clone();
        Ok((key, last.insert(attempt).request_id))
    }

    /// Puts the last attempt on disk, since it may be waited for longer than this program lives.
    pub(super) fn keep(&self, request: &Enrolment) {
        let last = self.last();
        let (Some(file), Some(attempt)) = (&self.file, last.as_ref()) else {
            return;
        };
        let kept = Kept {
            order: Some(order(request)),
            key: attempt.key.pkcs8().to_vec(),
            request_id: attempt.request_id.to_wire(),
        };
        if let Err(error) = store::replace(file, &Zeroizing::new(kept.encode_to_vec())) {
            // It waits all the same, for as long as it runs.
            tracing::warn!(file = %file.display(), %error, "a restart of this program would end its wait for approval");
        }
    }

    /// The node is in and its key file is on disk, or its key was refused for good: whoever joins next is another one.
    ///
    /// What is on disk is written over before it goes: under autolock no key of a manager stays in the clear.
    pub fn forget(&self) {
        *self.last() = None;
        if let Some(file) = &self.file
            && let Err(error) = store::erase(file)
        {
            tracing::warn!(file = %file.display(), %error, "what is left of a join could not be removed");
        }
    }

    fn last(&self) -> MutexGuard<'_, Option<Attempt>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attempt {
    fn new(wish: [u8; 32]) -> Result<Self, JoinError> {
        let key = Key::generate().map_err(|_| JoinError::Entropy)?;
        let mut request_id = [0; 16];
        SystemEntropy
            .fill(&mut request_id)
            .map_err(|_| JoinError::Entropy)?;
        let request_id = RequestId::from_bytes(request_id);
        Ok(Self {
            wish,
            key,
            request_id,
        })
    }
}

/// What a join asks for, as a program is told to join.
fn order(request: &Enrolment) -> JoinRequest {
    JoinRequest {
        ticket: request.ticket.to_text().to_string(),
        addresses: request.addresses.clone(),
        listen: request.listen.clone(),
        advertise: request.advertise.clone(),
        name: request.name.clone(),
    }
}

/// The digest of all that the node's record is made from.
fn wish(role: Role, order: &JoinRequest) -> [u8; 32] {
    let mut digest = Sha256::new();
    for part in [
        order.ticket.trim(),
        &role.to_string(),
        &order.advertise,
        &order.name,
    ] {
        digest.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        digest.update(part);
    }
    digest.finalize().into()
}

#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
struct Kept {
    #[prost(message, optional, tag = "1")]
    order: Option<JoinRequest>,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    request_id: Vec<u8>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept(…)")
    }
}

fn read(file: &Path) -> Result<Option<(JoinRequest, Key, RequestId)>, &'static str> {
    let bytes = match store::read(file) {
        Ok(bytes) => bytes,
        Err(store::StoreError::Missing(_)) => return Ok(None),
        Err(_) => return Err("the file cannot be read, or others can"),
    };
    let mut kept = Kept::decode(bytes.as_slice()).map_err(|_| "the file is damaged")?;
    let key = Key::from_pkcs8(&kept.key).map_err(|_| "its key is none")?;
    let request_id = RequestId::try_from(kept.request_id.as_slice()).map_err(|_| "its request id is none")?;
    let order = kept.order.take().ok_or("it says nothing of the join")?;
    Ok(Some((order, key, request_id)))
}
