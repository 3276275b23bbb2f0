//! A second opinion on files, from another part of the kernel than the mounts.
//!
//! Read and execute everywhere, write only where the task has writable memory; signals and
//! abstract sockets stay inside. A kernel without (all of) it gives what it has: the mounts hold alone.

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use std::io;

/// The newest version that this knows.
const KNOWN: ABI = ABI::V6;

/// Restricts this thread, as seen from the task's root. `writable` are folders.
pub(crate) fn restrict(writable: &[&str]) -> io::Result<()> {
    enforce(writable).map_err(io::Error::other)
}

fn enforce(writable: &[&str]) -> Result<(), RulesetError> {
    let everything = AccessFs::from_all(KNOWN);
    let look = AccessFs::Execute | AccessFs::ReadFile | AccessFs::ReadDir;
    let devices = AccessFs::WriteFile | AccessFs::IoctlDev;
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(everything)?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?;
    let places = [("/", look), ("/dev", look | devices)];
    let writable = writable.iter().map(|path| (*path, everything));
    for (path, access) in places.into_iter().chain(writable) {
        // A declared place always exists; should it not, then nothing can be written there either.
        if let Ok(folder) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(folder, access))?;
        }
    }
    rules.restrict_self()?;
    Ok(())
}
