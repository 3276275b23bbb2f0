//! What a manager says of its machine. It guards nothing.

use bulkhead_proto::wire::NodeDescription;
use bulkhead_raft::state::LEVEL;

/// This machine, as `node inspect` shows it.
pub(super) fn describe() -> NodeDescription {
    let system = nix::sys::utsname::uname();
    let text = |part: Option<&std::ffi::OsStr>| {
        part.map(|it| it.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let system = system.as_ref().ok();
    NodeDescription {
        hostname: text(system.map(|it| it.nodename())),
        architecture: std::env::consts::ARCH.to_owned(),
        operating_system: text(system.map(|it| it.sysname())),
        kernel: text(system.map(|it| it.release())),
        cpu_millis: std::thread::available_parallelism().map_or(0, |cores| cores.get() as u64 * 1_000),
        program_version: env!("CARGO_PKG_VERSION").to_owned(),
        level: LEVEL,
        ..Default::default()
    }
}
