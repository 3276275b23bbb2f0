//! What passes between nodes: which faults are in force, and the rules of nftables that make it so.
//!
//! Each node drops what it must not hear, in a namespace of its own, so that one direction can be cut alone. Whoever is
//! no node, as a client of the cluster, is never cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::fault::Fault;

/// Of a hundred frames so many are lost.
const LOST_PERCENT: u32 = 20;
/// The table of our rules; what else a namespace has stays as it is.
pub(super) const TABLE: &str = "bulkhead_chaos";

/// Every connection from one node to the managers' port of another goes to another address in place of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Detour {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) through: SocketAddrV4,
}

/// What one fault does to the network. Nodes are numbers, managers first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cut {
    /// From whom whom nothing reaches.
    pub(super) drops: BTreeSet<(usize, usize)>,
    /// Whom some frames do not reach.
    pub(super) loses: BTreeSet<usize>,
    /// Who answers with a reset.
    pub(super) resets: BTreeSet<usize>,
    /// Which connections go elsewhere.
    pub(super) detours: Vec<Detour>,
}

/// What a fault cuts: of so many managers, and nodes in all, with this node as its target.
pub(super) fn cut(fault: Fault, target: usize, managers: usize, nodes: usize) -> Cut {
    let everybody = || 0..nodes;
    let pairs = |apart: &dyn Fn(usize, usize) -> bool| -> BTreeSet<(usize, usize)> {
        everybody()
            .flat_map(|from| everybody().map(move |to| (from, to)))
            .filter(|(from, to)| from != to && apart(*from, *to))
            .collect()
    };
    // The smaller half of the managers, the target in it, and every other worker.
    let minority = (managers - 1) / 2;
    let is_few = |node: usize| match node < managers {
        true => (node + managers - target % managers) % managers < minority.max(1),
        false => (node - managers) % 2 == 1,
    };
    let drops = match fault {
        Fault::Isolate => pairs(&|from, to| from == target || to == target),
        Fault::Deaf => pairs(&|_, to| to == target),
        Fault::Mute => pairs(&|from, _| from == target),
        Fault::Split => pairs(&|from, to| is_few(from) != is_few(to)),
        // The manager after the minority hears both sides.
        Fault::Bridge => {
            let middle = (target % managers + minority.max(1)) % managers;
            pairs(&|from, to| is_few(from) != is_few(to) && from != middle && to != middle)
        }
        Fault::Ring => pairs(&|from, to| {
            let distance = from.abs_diff(to);
            from < managers && to < managers && distance != 1 && distance != managers - 1
        }),
        _ => BTreeSet::new(),
    };
    Cut {
        drops,
        loses: match fault {
            Fault::Loss => everybody().collect(),
            _ => BTreeSet::new(),
        },
        resets: match fault {
            Fault::Reset => BTreeSet::from([target]),
            _ => BTreeSet::new(),
        },
        detours: Vec::new(),
    }
}

/// The cuts that are in force, each by the number of its strike.
#[derive(Clone, Debug, Default)]
pub(super) struct Links {
    cuts: BTreeMap<usize, Cut>,
}

impl Links {
    pub(super) fn add(&mut self, strike: usize, cut: Cut) {
        self.cuts.insert(strike, cut);
    }

    pub(super) fn remove(&mut self, strike: usize) {
        self.cuts.remove(&strike);
    }

    /// What `nft -f -` reads in the namespace of a node: the whole of our rules there, in place of those before.
    pub(super) fn script(&self, node: usize, addresses: &[Ipv4Addr], port: u16) -> String {
        let mut rules = String::new();
        let of = |from: &BTreeSet<usize>| {
            let list: Vec<String> = from
                .iter()
                .filter_map(|at| addresses.get(*at))
                .map(ToString::to_string)
                .collect();
            list.join(", ")
        };
        let others: BTreeSet<usize> = (0..addresses.len()).filter(|it| *it != node).collect();
        let unheard: BTreeSet<usize> = self
            .cuts
            .values()
            .flat_map(|cut| &cut.drops)
            .filter(|(_, to)| *to == node)
            .map(|(from, _)| *from)
            .collect();
        // Writing to a string never fails.
        if !unheard.is_empty() {
            let _written = writeln!(rules, "    ip saddr {{ {} }} drop", of(&unheard));
        }
        if self.cuts.values().any(|cut| cut.loses.contains(&node)) {
            let _written = writeln!(
                rules,
                "    ip saddr {{ {} }} numgen random mod 100 < {LOST_PERCENT} drop",
                of(&others)
            );
        }
        if self.cuts.values().any(|cut| cut.resets.contains(&node)) {
            let _written = writeln!(
                rules,
                "    ip saddr {{ {} }} tcp flags & (syn | rst) == 0 reject with tcp reset",
                of(&others)
            );
        }
        let (mut turns, mut stale) = (String::new(), String::new());
        let detours = self.cuts.values().flat_map(|cut| &cut.detours);
        for detour in detours.filter(|it| it.from == node) {
            let Some(address) = addresses.get(detour.to) else {
                continue;
            };
            let _written = writeln!(
                turns,
                "    ip daddr {address} tcp dport {port} dnat ip to {}",
                detour.through
            );
            // What was connected before ends, so that it comes back by the detour.
            let _written = writeln!(
                stale,
                "    ip daddr {address} tcp dport {port} reject with tcp reset"
            );
        }
        let mut script = format!("table inet {TABLE} {{}}\ndelete table inet {TABLE}\n");
        if rules.is_empty() && turns.is_empty() {
            return script;
        }
        let _written = write!(
            script,
            "table inet {TABLE} {{\n  chain in {{\n    type filter hook input priority 0; policy accept;\n{rules}  }}\n"
        );
        if !turns.is_empty() {
            let _written = write!(
                script,
                "  chain turn {{\n    type nat hook output priority -100; policy accept;\n{turns}  }}\n  \
                 chain out {{\n    type filter hook output priority 0; policy accept;\n{stale}  }}\n"
            );
        }
        script.push_str("}\n");
        script
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(cut: &Cut, from: usize, to: usize) -> bool {
        !cut.drops.contains(&(from, to))
    }

    #[test]
    fn one_direction_is_cut_alone() {
        let deaf = cut(Fault::Deaf, 1, 3, 5);
        assert!((0..5).all(|other| other == 1 || (!reaches(&deaf, other, 1) && reaches(&deaf, 1, other))));
        let mute = cut(Fault::Mute, 1, 3, 5);
        assert!((0..5).all(|other| other == 1 || (reaches(&mute, other, 1) && !reaches(&mute, 1, other))));
        let isolated = cut(Fault::Isolate, 4, 3, 5);
        assert_eq!(isolated.drops.len(), 8);
    }

    #[test]
    fn a_split_leaves_a_quorum_without_its_target() {
        for managers in [3, 5, 7] {
            for target in 0..managers {
                let split = cut(Fault::Split, target, managers, managers + 3);
                let with = (0..managers).filter(|other| *other == target || reaches(&split, target, *other));
                let with: Vec<usize> = with.collect();
                assert!(with.len() * 2 < managers, "{managers} {target} {with:?}");
                let quorum: Vec<usize> = (0..managers).filter(|it| !with.contains(it)).collect();
                for one in &quorum {
                    assert!(
                        quorum
                            .iter()
                            .all(|other| one == other || reaches(&split, *one, *other))
                    );
                }
            }
        }
    }

    #[test]
    fn a_bridge_hears_both_sides_and_a_ring_its_neighbours() {
        for target in 0..3 {
            let bridge = cut(Fault::Bridge, target, 3, 3);
            let middle = (target + 1) % 3;
            let other = (target + 2) % 3;
            assert!(!reaches(&bridge, target, other) && !reaches(&bridge, other, target));
            assert!(
                [target, other]
                    .iter()
                    .all(|it| reaches(&bridge, *it, middle) && reaches(&bridge, middle, *it))
            );
        }
        let ring = cut(Fault::Ring, 0, 5, 7);
        for at in 0..5 {
            let hears = (0..5)
                .filter(|other| *other != at && reaches(&ring, *other, at))
                .count();
            assert_eq!(hears, 2, "{at}");
        }
        assert!(reaches(&ring, 6, 0), "workers are in no ring");
    }

    #[test]
    fn rules_are_those_of_all_cuts_and_gone_with_them() {
        let addresses: Vec<Ipv4Addr> = (1..=3).map(|host| Ipv4Addr::new(10, 77, 0, host)).collect();
        let mut links = Links::default();
        links.add(1, cut(Fault::Deaf, 0, 3, 3));
        links.add(2, cut(Fault::Reset, 0, 3, 3));
        let through = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 254), 4_000);
        links.add(
            3,
            Cut {
                detours: vec![Detour {
                    from: 0,
                    to: 2,
                    through,
                }],
                ..Cut::default()
            },
        );
        let script = links.script(0, &addresses, 7443);
        assert!(
            script.contains("ip saddr { 10.77.0.2, 10.77.0.3 } drop"),
            "{script}"
        );
        assert!(script.contains("reject with tcp reset"), "{script}");
        assert!(
            script.contains("ip daddr 10.77.0.3 tcp dport 7443 dnat ip to 10.77.0.254:4000"),
            "{script}"
        );
        assert!(!links.script(1, &addresses, 7443).contains("drop"));
        for strike in 1..=3 {
            links.remove(strike);
        }
        let nothing = format!("table inet {TABLE} {{}}\ndelete table inet {TABLE}\n");
        assert_eq!(links.script(0, &addresses, 7443), nothing);
    }
}
