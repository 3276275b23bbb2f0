//! Giving up privileges for ever.

use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
    set_capabilities_secure_bits, set_keep_capabilities, set_no_new_privs,
};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::io;

const NONE: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

/// Becomes `uid` and `gid` without other groups, with every capability set empty, so that not even
/// user 0 gains one by executing a program, and with no_new_privs.
pub(crate) fn become_powerless(uid: u32, gid: u32) -> io::Result<()> {
    // Locked: user 0 is nobody special from here on, and setuid keeps nothing.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )?;
    empty_bounding_set(CapabilitySet::empty())?;
    change_ids(uid, gid)?;
    clear_ambient_capability_set()?;
    set_capabilities(None, NONE)?;
    set_no_new_privs(true)?;
    Ok(())
}

/// Becomes `uid` and `gid` with at most one capability, to bind low ports: what the worker runs with.
/// It is left out where the launcher itself does not have it.
pub(crate) fn become_worker(uid: u32, gid: u32) -> io::Result<()> {
    let had = rustix::thread::capabilities(None)?.permitted;
    let keep = had & CapabilitySet::NET_BIND_SERVICE;
    set_keep_capabilities(true)?;
    empty_bounding_set(keep)?;
    change_ids(uid, gid)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: keep,
            permitted: keep,
            inheritable: keep,
        },
    )?;
    clear_ambient_capability_set()?;
    if !keep.is_empty() {
        configure_capability_in_ambient_set(keep, true)?;
    }
    set_no_new_privs(true)?;
    Ok(())
}

/// Gives up every capability of this process in its own user namespace; as the owner of a task's user
/// namespace, user 0 still rules over that task.
pub(crate) fn drop_all() -> io::Result<()> {
    clear_ambient_capability_set()?;
    set_capabilities(None, NONE)?;
    set_no_new_privs(true)?;
    Ok(())
}

fn change_ids(uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Without CAP_SETPCAP, as in a container, the bounding set cannot shrink; no_new_privs then
/// keeps any of it from being gained.
fn empty_bounding_set(keep: CapabilitySet) -> io::Result<()> {
    let each = (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit));
    for capability in each.filter(|one| !keep.contains(*one)) {
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL) => return Ok(()), // past the last that this kernel has
            Err(rustix::io::Errno::PERM) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
