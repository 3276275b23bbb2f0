//! A cluster from a backup, on a manager that is in none.
//!
//! This manager becomes the only voter of the next epoch, under keys of its own that the cluster's root signs: the backup
//! holds the root's key. Whoever restores becomes an operator, since the old ones may be gone with their keys.

use std::sync::Arc;

use anyhow::Context as _;
use bulkhead_identity::backup::BackupError;
use bulkhead_identity::recovery::RecoveryKey;
use bulkhead_identity::store::{KeyFile, ManagerPart};
use bulkhead_identity::{Bundle, Certificate, Credentials, Key, Unswapped, csr};
use bulkhead_proto::wire::{EnrolResponse, Node, Raised, RestoreRequest, restore_request::Message};
use bulkhead_proto::{Code, NodeId, Role};
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::Program;
use super::description::describe;
use super::init::{ELECTION, random};
use super::member::Member;
use super::offline;
use crate::backup::{Backup, ReadError, Reader};
use crate::ca::genesis::{self, FirstOperator};
use crate::ca::{self, Ca, Validity, names, refound, trust};
use crate::key_ring::{EnvelopeKey, KeyRing};
use crate::refusal::refuse;
use crate::view;
use crate::{lock, loss};

/// What is asked for.
pub(super) struct Order {
    pub(super) listen: String,
    pub(super) advertise: String,
    pub(super) name: String,
    pub(super) forget: Vec<String>,
    pub(super) operator: FirstOperator,
    pub(super) actor: String,
}

/// What came of it.
pub(super) struct Restored {
    pub(super) member: Arc<Member>,
    pub(super) operator: EnrolResponse,
    pub(super) raised: Raised,
}

/// Reads the backup that follows the order.
pub(super) async fn receive(
    messages: &mut Streaming<RestoreRequest>,
    key: &RecoveryKey,
) -> Result<Backup, Status> {
    let mut reader = Reader::new(key);
    while let Some(message) = messages.message().await? {
        match message.message {
            Some(Message::Data(data)) => reader.push(&data).map_err(|error| refused(&error))?,
            Some(Message::Order(_)) | None => {
                return Err(refuse(
                    Code::Invalid,
                    tonic::Code::InvalidArgument,
                    "something else than the backup follows the order",
                    "use the command of this version",
                ));
            }
        }
    }
    reader.finish().map_err(|error| refused(&error))
}

fn refused(error: &ReadError) -> Status {
    let (code, hint) = match error {
        ReadError::File(BackupError::NotBackup | BackupError::Version) => (
            Code::NotBackup,
            "name a file that `bulkhead cluster backup create` wrote",
        ),
        ReadError::File(BackupError::Key { .. }) => (
            Code::WrongRecoveryKey,
            "name the recovery key that was in force when the backup was made",
        ),
        ReadError::File(_) | ReadError::State(_) | ReadError::Manifest | ReadError::Header => (
            Code::DamagedBackup,
            "use another copy of it, or an older backup; `bulkhead cluster backup verify` checks one without a cluster",
        ),
    };
    refuse(
        code,
        tonic::Code::InvalidArgument,
        format!("the backup is refused: {error}"),
        hint,
    )
}

/// Raises the cluster of a backup on this manager. Where it fails, what it wrote is removed again.
pub(super) async fn restore(
    program: &Arc<Program>,
    order: Order,
    backup: Backup,
) -> anyhow::Result<Restored> {
    let machine = &program.machine;
    let key = Key::generate()?;
    let public = csr::public_key(&key.csr()?)?;
    let envelope_key = EnvelopeKey::generate(&*machine.entropy)?;
    let node = NodeId::from_bytes(random(&*machine.entropy)?);
    let ring = KeyRing::new(node, envelope_key.clone(), machine.entropy.clone()).with_keys(backup.keys);
    let before = view::cluster(&backup.state).context("there is no cluster in the backup")?;
    let now = machine.now_ms();
    let refounded = refound::refounded(before, &ring, now)?;
    let authority = Ca::new(ring.clone());
    let raising = loss::Order {
        keep: None,
        forget: &order.forget,
        key_ring: ring.enveloped_for(before, node, &ring.public())?,
        roots: Some(&refounded.cluster),
        now_ms: now,
        actor: &order.actor,
    };
    let newest = ring.newest(before)?;
    let unlock_key = lock::wanted(before, &ring)?;
    let mut raised = loss::raise(&backup.state, raising, |state| {
        let description = describe();
        let wish = match order.name.as_str() {
            "" => description.hostname.clone(),
            name => name.to_owned(),
        };
        let issue = |node, role, key| {
            let validity = Validity::of_role(role, before, now);
            authority.issue_here(&refounded.cluster, node, role, key, validity)
        };
        let name = names::free(state, &wish, Role::Manager);
        let signed = issue(node, Role::Manager, &public)?;
        let manager = Node {
            address: order.advertise.clone(),
            envelope_key: ring.public().to_vec(),
            opened_epoch: newest,
            locked_with: lock::generation(before),
            resealed: before.reseal,
            description: Some(description),
            ..genesis::record(node, Role::Manager, name, signed, now)
        };
        let asked = &order.operator;
        let mut name = names::free(state, &asked.name, Role::Operator);
        if name == manager.name {
            name = names::free(state, &format!("operator-{name}"), Role::Operator);
        }
        let signed = issue(asked.node, Role::Operator, &asked.key)?;
        let operator = genesis::record(asked.node, Role::Operator, name, signed, now);
        Ok::<_, anyhow::Error>(vec![manager, operator])
    })?;

    raised.report.new_root = refounded.is_new;
    let cluster = view::cluster(&raised.state).context("there is no cluster in the raised state")?;
    let record = view::node(&raised.state, node).context("this manager is not in the raised state")?;
    let operator = view::node(&raised.state, order.operator.node).context("the operator is not in it")?;
    let operator = EnrolResponse {
        certificate: newest_certificate(operator)?.to_vec(),
        roots: trust::roots(cluster),
        chain: trust::chain(cluster),
        cluster_id: cluster.id.clone(),
        node_id: operator.id.clone(),
        role: operator.role,
        managers: ca::manager_addresses(&raised.state),
        epoch: cluster.epoch,
        index: raised.state.index(),
        name: operator.name.clone(),
        ..Default::default()
    };
    let credentials = Credentials {
        key,
        certificate: Certificate::from_der(newest_certificate(record)?)?,
        chain: trust::chain(cluster),
        bundle: Bundle::from_ders(trust::roots(cluster))?.with_former(trust::former(cluster))?,
    };
    let part = ManagerPart {
        member: raised.member,
        epoch: cluster.epoch,
        store: random(&*machine.entropy)?,
        made: true,
        data_key: Unswapped::filled(|key| machine.entropy.fill(key))?,
        envelope_key: envelope_key.into_bytes(),
        former_data_key: None,
        listen: order.listen,
        advertise: order.advertise,
    };
    let name = record.name.clone();
    offline::plant(machine, &part, node, raised.state).await?;
    let epoch = part.epoch;
    let keys = KeyFile {
        credentials: Arc::new(credentials),
        name,
        managers: Vec::new(),
        manager: Some(part),
        lock: unlock_key,
        standby: None,
    };
    keys.save(&machine.keys())?;
    match begin(program, keys).await {
        Ok(member) => {
            tracing::warn!(
                target: "audit",
                actor = order.actor,
                epoch,
                from_index = raised.report.from_index,
                backup_at = backup.header.at,
                forgotten = ?raised.report.forgotten,
                "the cluster was restored from a backup"
            );
            Ok(Restored {
                member,
                operator,
                raised: raised.report,
            })
        }
        Err(error) => {
            // Nothing was handed out yet, so nothing is lost; what cannot be removed makes the next try say so.
            let _ = std::fs::remove_file(machine.keys());
            let _ = machine.remove_store(epoch);
            Err(error)
        }
    }
}

fn newest_certificate(node: &Node) -> anyhow::Result<&[u8]> {
    let key = node.keys.last().context("a new record has a key")?;
    Ok(&key.certificate)
}

async fn begin(program: &Arc<Program>, keys: KeyFile) -> anyhow::Result<Arc<Member>> {
    let member = program.start(keys).await?;
    let mut leadership = member.replica.leadership();
    timeout(ELECTION, leadership.wait_for(|now| now.leading.is_some()))
        .await
        .context("the manager did not elect itself")??;
    super::admission::become_voter(&member, &program.stop).await;
    member.until_fresh().await;
    Ok(member)
}
