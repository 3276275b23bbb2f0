//! What this node says of itself. It guards nothing: managers show it and plan with it.

use bulkhead_launcher::message::NodeFacts;
use bulkhead_proto::wire;
use nix::sys::utsname::uname;

/// The highest command level that this program supports.
const LEVEL: u32 = 1;

/// The node as the launcher has found it.
pub fn description(facts: &NodeFacts) -> wire::NodeDescription {
    wire::NodeDescription {
        hostname: host_name(),
        architecture: std::env::consts::ARCH.into(),
        operating_system: std::env::consts::OS.into(),
        kernel: facts.kernel.clone(),
        cpu_millis: facts.cpu_millis,
        memory_bytes: facts.memory_bytes,
        features: features(facts),
        program_version: env!("CARGO_PKG_VERSION").into(),
        level: LEVEL,
        ..Default::default()
    }
}

/// The host's name, the wish for the node's own.
fn host_name() -> String {
    uname().map_or_else(
        |_| String::new(),
        |names| names.nodename().to_string_lossy().into_owned(),
    )
}

fn features(facts: &NodeFacts) -> Vec<wire::Feature> {
    let feature = |name: &str, state: String| wire::Feature {
        name: name.into(),
        state,
    };
    let present = |is: bool| if is { "present" } else { "absent" }.to_owned();
    let landlock = match facts.landlock_abi {
        0 => present(false),
        abi => format!("version {abi}"),
    };
    let mut all = vec![
        feature("cgroup", facts.cgroup.clone()),
        feature("controllers", facts.controllers.join(" ")),
        feature("landlock", landlock),
        feature("tmpfs-noswap", present(facts.tmpfs_noswap)),
        feature("time-namespace", present(facts.time_namespace)),
    ];
    all.extend(
        facts
            .fallbacks
            .iter()
            .map(|text| feature("fallback", text.clone())),
    );
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_absent_is_said() {
        let facts = NodeFacts {
            kernel: "6.1.0".into(),
            landlock_abi: 0,
            cgroup: "v2".into(),
            controllers: vec!["memory".into(), "pids".into()],
            tmpfs_noswap: false,
            time_namespace: true,
            memory_bytes: 1,
            cpu_millis: 2_000,
            fallbacks: vec!["no tmpfs noswap: secrets are kept in a sealed ramfs".into()],
        };
        let said = description(&facts);
        let shown: Vec<_> = said
            .features
            .iter()
            .map(|f| format!("{}={}", f.name, f.state))
            .collect();
        assert_eq!(
            shown,
            [
                "cgroup=v2",
                "controllers=memory pids",
                "landlock=absent",
                "tmpfs-noswap=absent",
                "time-namespace=present",
                "fallback=no tmpfs noswap: secrets are kept in a sealed ramfs",
            ]
        );
        assert_eq!(
            (said.kernel.as_str(), said.cpu_millis, said.level),
            ("6.1.0", 2_000, 1)
        );
    }
}
