//! The store of a manager that does not run.

use bulkhead_identity::store::ManagerPart;
use bulkhead_proto::NodeId;
use bulkhead_raft::log_store::LogStore;
use bulkhead_raft::offline::Store;
use bulkhead_raft::state::State;
use bulkhead_raft::{Member as RaftMember, StartError};

use super::member::{Machine, data_keys, sealing};

/// The store that a key file speaks of.
pub(super) fn store(machine: &Machine, part: &ManagerPart) -> Store {
    Store {
        fs: machine.fs.clone(),
        folder: machine.store(part.epoch),
        sealing: sealing(part, data_keys(part)),
        entropy: machine.entropy.clone(),
        log: machine.log.clone(),
    }
}

/// Makes the empty store of a key file, which is not to say that there is one before there is.
pub(super) async fn make(machine: &Machine, part: &ManagerPart) -> Result<(), StartError> {
    let (folder, sealing) = (machine.store(part.epoch), sealing(part, data_keys(part)));
    let entropy = machine.entropy.clone();
    let (fs, log) = (machine.fs.clone(), machine.log.clone());
    let made = machine
        .blocking
        .run(move || Ok(LogStore::open(fs, &folder, sealing, entropy, log).map(drop)));
    made.await.map_err(StartError::Thread)??;
    Ok(())
}

/// Makes the store that a key file is going to speak of. One that an earlier try left is removed: no key file ever spoke
/// of it.
pub(super) async fn plant(
    machine: &Machine,
    part: &ManagerPart,
    node: NodeId,
    state: State,
) -> anyhow::Result<()> {
    machine.remove_store(part.epoch)?;
    let store = store(machine, part);
    let me = RaftMember {
        node,
        address: part.advertise.clone(),
    };
    machine
        .blocking
        .run(move || Ok(store.plant(&state, me)))
        .await??;
    Ok(())
}
