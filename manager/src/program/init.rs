//! How a cluster begins on this manager, and what a joiner keeps.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_identity::join::Enrolled;
use bulkhead_identity::seam::Entropy;
use bulkhead_identity::store::{KeyFile, ManagerPart, StandbyPart};
use bulkhead_identity::{Bundle, Certificate, Credentials, Key, UnlockKey, Unswapped, csr};
use bulkhead_proto::wire::{EnrolResponse, ManagerAddress, Role};
use bulkhead_proto::{MemberId, NodeId, RequestId};
use bulkhead_raft::Member as RaftMember;
use tokio::time::timeout;

use super::Program;
use super::description::describe;
use super::error::ProgramError;
use super::member::{Machine, Member};
use crate::ca::genesis::{FirstManager, FirstOperator, Genesis, Wishes, genesis};
use crate::key_ring::EnvelopeKey;

/// A single manager elects itself within one election timeout.
pub(super) const ELECTION: Duration = Duration::from_secs(10);
/// The member id of a cluster's first manager, as apply gives it.
const FIRST: MemberId = MemberId(1);

/// What `init` is asked to make.
pub(super) struct Order {
    pub(super) listen: String,
    pub(super) advertise: String,
    pub(super) lab: bool,
    pub(super) autolock: bool,
    pub(super) name: String,
    pub(super) operator: Option<FirstOperator>,
}

/// What it made.
pub(super) struct Made {
    pub(super) member: Arc<Member>,
    pub(super) operator: Option<EnrolResponse>,
    pub(super) unlock_key: Option<UnlockKey>,
}

/// A new cluster's first unlock key.
const FIRST_LOCK: u32 = 1;

/// Makes a cluster of this one manager. Where it fails, what it wrote is removed again.
pub(super) async fn init(program: &Arc<Program>, order: Order, actor: &str) -> anyhow::Result<Made> {
    let machine = &program.machine;
    let key = Key::generate()?;
    let envelope_key = EnvelopeKey::generate(&*machine.entropy)?;
    let description = describe();
    let name = if order.name.is_empty() {
        description.hostname.clone()
    } else {
        order.name
    };
    let first = FirstManager {
        node: NodeId::from_bytes(random(&*machine.entropy)?),
        name,
        advertise: order.advertise.clone(),
        key: csr::public_key(&key.csr()?)?,
        envelope_key: envelope_key.public(),
        description,
    };
    let lock = match order.autolock {
        true => Some(UnlockKey::generate(FIRST_LOCK, &*machine.entropy)?),
        false => None,
    };
    let wishes = Wishes {
        lab: order.lab,
        lock: lock.as_ref(),
    };
    let genesis = genesis(first, order.operator, wishes, machine.now_ms(), &*machine.entropy)?;
    let credentials = Credentials {
        key,
        certificate: Certificate::from_der(&genesis.manager.certificate)?,
        chain: Vec::new(),
        bundle: Bundle::from_ders(vec![genesis.root.clone()])?,
    };
    let keys = KeyFile {
        credentials: Arc::new(credentials),
        name: genesis.manager.name.clone(),
        managers: Vec::new(),
        manager: Some(ManagerPart {
            member: FIRST,
            epoch: 1,
            store: random(&*machine.entropy)?,
            made: false,
            data_key: Unswapped::filled(|key| machine.entropy.fill(key))?,
            envelope_key: envelope_key.into_bytes(),
            former_data_key: None,
            listen: order.listen,
            advertise: order.advertise,
        }),
        lock: lock.clone(),
        standby: None,
    };
    keys.save(&machine.keys())?;
    let begun = begin(program, keys, &genesis, actor).await;
    if begun.is_err() {
        // Nothing was handed out yet, so nothing is lost; what cannot be removed makes the next try say so.
        let _ = std::fs::remove_file(machine.keys());
        let _ = machine.remove_store(1);
    }
    let (member, index) = begun?;
    let operator = genesis.operator.map(|operator| EnrolResponse {
        certificate: operator.certificate,
        roots: vec![genesis.root],
        cluster_id: genesis.cluster.to_wire(),
        node_id: operator.node.to_wire(),
        role: Role::Operator.into(),
        managers: vec![ManagerAddress {
            node_id: member.node().to_wire(),
            address: member.advertise.clone(),
            member_id: FIRST.0,
        }],
        epoch: 1,
        index,
        name: operator.name,
        ..Default::default()
    });
    Ok(Made {
        member,
        operator,
        unlock_key: lock,
    })
}

async fn begin(
    program: &Arc<Program>,
    keys: KeyFile,
    genesis: &Genesis,
    actor: &str,
) -> anyhow::Result<(Arc<Member>, u64)> {
    let member = program.start(keys).await?;
    let me = RaftMember {
        node: member.node(),
        address: member.advertise.clone(),
    };
    member.replica.initialise(me).await?;
    let mut leadership = member.replica.leadership();
    timeout(ELECTION, leadership.wait_for(|now| now.leading.is_some()))
        .await
        .context("the manager did not elect itself")??;
    let request = RequestId::from_bytes(random(&*program.machine.entropy)?);
    let outcome = member
        .proposer
        .client(actor, request, Vec::new(), genesis.changes.clone())
        .await?;
    if let Some(rejection) = outcome.rejection {
        anyhow::bail!("the first transaction was refused: {}", rejection.detail);
    }
    super::admission::become_voter(&member, &program.stop).await;
    member.until_fresh().await;
    Ok((member, outcome.index))
}

/// The key file of a manager or standby that was admitted, written down.
pub(super) fn keys_of_joiner(
    program: &Program,
    enrolled: Enrolled,
    listen: String,
    advertise: String,
) -> Result<KeyFile, ProgramError> {
    let machine = &program.machine;
    let standby = StandbyPart { listen, advertise };
    let mut keys = KeyFile {
        credentials: Arc::new(enrolled.credentials),
        name: enrolled.name,
        managers: enrolled.managers,
        manager: None,
        standby: None,
        lock: enrolled.lock,
    };
    match enrolled.member {
        Some(member) => keys.manager = Some(new_part(machine, member, enrolled.epoch, standby)?),
        None => keys.standby = Some(standby),
    }
    keys.save(&machine.keys())?;
    program.attempts.forget();
    Ok(keys)
}

/// What a new manager keeps: a store that is nobody's yet, and keys that nobody else has.
pub(super) fn new_part(
    machine: &Machine,
    member: MemberId,
    epoch: u64,
    place: StandbyPart,
) -> Result<ManagerPart, ProgramError> {
    let entropy = |error| ProgramError::Piece(format!("the system's random source: {error}"));
    Ok(ManagerPart {
        member,
        epoch,
        store: random(&*machine.entropy).map_err(entropy)?,
        made: false,
        data_key: Unswapped::filled(|key| machine.entropy.fill(key)).map_err(entropy)?,
        former_data_key: None,
        envelope_key: Unswapped::filled(|key| machine.entropy.fill(key)).map_err(entropy)?,
        listen: place.listen,
        advertise: place.advertise,
    })
}

pub(super) fn random<const N: usize>(
    entropy: &dyn Entropy,
) -> Result<[u8; N], bulkhead_identity::seam::EntropyError> {
    let mut bytes = [0; N];
    entropy.fill(&mut bytes)?;
    Ok(bytes)
}
