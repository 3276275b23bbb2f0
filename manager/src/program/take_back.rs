//! How a manager whose store is damaged, gone or put back from a copy comes back: what it acknowledged is not all there any
//! more, so it never votes or acknowledges as that member again. A leader with a quorum of the others counts it as a new
//! member, which begins with an empty store.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::comeback::come_back;
use bulkhead_identity::store::KeyFile;
use bulkhead_identity::tls::{self, Expect};
use bulkhead_identity::{Credentials, Identity, Unswapped};
use bulkhead_proto::wire::{ManagerAddress, TakeBackRequest, TakeBackResponse};
use bulkhead_proto::{MemberId, NodeId};
use tokio::time::{Instant, sleep, timeout};

use super::error::ProgramError;
use super::init::random;
use super::member::Machine;
use crate::peers;
use crate::refusal::chain;

/// The others may be electing a leader, or still count this manager as one that answers.
const PATIENCE: Duration = Duration::from_secs(15);
/// After nobody could help.
const PAUSE: Duration = Duration::from_millis(500);
/// One call.
const CALL: Duration = Duration::from_secs(12);
/// One that nobody took for this long asks whether its certificate is the reason.
const ALONE: Duration = Duration::from_secs(5);

/// The key file of the new member, saved. What is left of the store is put aside.
///
/// # Errors
/// [`ProgramError::Lost`] where nobody took it back; then nothing was changed, and it can be tried again.
pub(super) async fn take_back(
    machine: &Machine,
    mut keys: KeyFile,
    lost: String,
) -> Result<KeyFile, ProgramError> {
    tracing::error!(
        lost,
        "this manager's store is lost: it asks the others to take it back as a new member"
    );
    let own = keys.subject().node;
    let others: Vec<Other> = keys.managers.iter().filter_map(|it| other(it, own)).collect();
    let Some(epoch) = keys.manager.as_ref().map(|part| part.epoch) else {
        return Err(ProgramError::NotAManager(machine.data.clone()));
    };
    let random_failed = |error| ProgramError::Piece(format!("the system's random source: {error}"));
    let store: [u8; 16] = random(&*machine.entropy).map_err(random_failed)?;
    let request = TakeBackRequest {
        store: store.to_vec(),
        request_id: random::<16>(&*machine.entropy).map_err(random_failed)?.to_vec(),
    };
    let begun = Instant::now();
    let (mut refusals, mut asked) = (Vec::new(), false);
    let taken = loop {
        match ask(&keys.credentials, &others, &request, &mut refusals).await? {
            Some(taken) if taken.epoch == epoch => break taken,
            Some(taken) => refusals = vec![format!("the cluster is in epoch {} by now", taken.epoch)],
            None => {}
        }
        if begun.elapsed() > PATIENCE || others.is_empty() {
            return Err(ProgramError::Lost {
                lost,
                why: match refusals.is_empty() {
                    true => "this manager knows no other".to_owned(),
                    false => refusals.join("; "),
                },
            });
        }
        if begun.elapsed() > ALONE && !asked {
            asked = true;
            by_key(machine, &mut keys, &others).await?;
        }
        sleep(PAUSE).await;
    };
    machine.put_aside(epoch).map_err(|source| ProgramError::Folder {
        path: machine.store(epoch),
        source,
    })?;
    let data_key = Unswapped::filled(|key| machine.entropy.fill(key)).map_err(random_failed)?;
    if let Some(part) = &mut keys.manager {
        part.member = MemberId(taken.member_id);
        part.store = store;
        part.made = false;
        part.data_key = data_key;
        part.former_data_key = None;
    }
    keys.save(&machine.keys())?;
    tracing::warn!(
        target: "audit",
        node = %own,
        raft.member = taken.member_id,
        aside = %machine.damaged().display(),
        "this manager is a new member, with an empty store"
    );
    Ok(keys)
}

struct Other {
    node: NodeId,
    address: String,
}

fn other(manager: &ManagerAddress, own: NodeId) -> Option<Other> {
    let node = NodeId::try_from(manager.node_id.as_slice()).ok()?;
    (node != own).then(|| Other {
        node,
        address: manager.address.clone(),
    })
}

/// The answer of the one that leads. What the others said instead is in `refusals` then.
async fn ask(
    credentials: &Arc<Credentials>,
    others: &[Other],
    request: &TakeBackRequest,
    refusals: &mut Vec<String>,
) -> Result<Option<TakeBackResponse>, ProgramError> {
    let identity = Identity::new(credentials.clone())?;
    refusals.clear();
    for other in others {
        let channel = match tls::channel(&identity, &other.address, Expect::Manager(other.node)) {
            Ok(channel) => channel,
            Err(error) => {
                refusals.push(format!("{}: {}", other.address, chain(&error)));
                continue;
            }
        };
        match timeout(CALL, peers::client(channel).take_back(request.clone())).await {
            Ok(Ok(answer)) => return Ok(Some(answer.into_inner())),
            Ok(Err(status)) => refusals.push(format!("{}: {}", other.address, status.message())),
            Err(_) => refusals.push(format!("{}: no answer", other.address)),
        }
    }
    Ok(None)
}

/// A certificate that ended, or of a root that was dropped, is no reason to stay away.
async fn by_key(machine: &Machine, keys: &mut KeyFile, others: &[Other]) -> Result<(), ProgramError> {
    for other in others {
        let expect = Expect::Manager(other.node);
        match come_back(&keys.credentials, &other.address, expect, &*machine.entropy).await {
            Ok(new) => {
                let bundle = new.bundle.clone();
                let bundle = bundle.with_former(keys.credentials.bundle.former());
                keys.credentials = match bundle {
                    Ok(bundle) => Credentials { bundle, ..new }.into(),
                    Err(_) => new.into(),
                };
                keys.save(&machine.keys())?;
                return Ok(());
            }
            Err(error) => tracing::debug!(
                manager = other.address,
                error = chain(&error),
                "not taken back there by its key"
            ),
        }
    }
    Ok(())
}
