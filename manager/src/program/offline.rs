//! The store of a manager that does not run.

use std::sync::Arc;

use bulkhead_identity::store::ManagerPart;
use bulkhead_proto::NodeId;
use bulkhead_raft::Member as RaftMember;
use bulkhead_raft::file_system::RealFileSystem;
use bulkhead_raft::log_store::Options;
use bulkhead_raft::offline::Store;
use bulkhead_raft::runtime::Blocking;
use bulkhead_raft::state::State;

use super::member::{Machine, data_keys, sealing};

/// The store that a key file speaks of.
pub(super) fn store(machine: &Machine, part: &ManagerPart) -> Store {
    Store {
        fs: Arc::new(RealFileSystem),
        folder: machine.store(part.epoch),
        sealing: sealing(part, data_keys(part)),
        entropy: machine.entropy.clone(),
        log: Options::default(),
    }
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
    Blocking::Threads
        .run(move || Ok(store.plant(&state, me)))
        .await??;
    Ok(())
}
