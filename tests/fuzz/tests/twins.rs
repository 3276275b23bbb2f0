//! The fuzz targets, with random bytes, whole seeds, and seeds that are damaged here and there.

use bulkhead_fuzz::{TARGETS, Target};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

/// What is done to a seed.
#[derive(Clone, Debug)]
enum Damage {
    Change(Index, u8),
    Insert(Index, u8),
    Cut(Index, Index),
    Repeat(Index, Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let any_index = any::<Index>;
    prop_oneof![
        4 => (any_index(), any::<u8>()).prop_map(|(at, byte)| Damage::Change(at, byte)),
        2 => (any_index(), any::<u8>()).prop_map(|(at, byte)| Damage::Insert(at, byte)),
        1 => (any_index(), any_index()).prop_map(|(from, to)| Damage::Cut(from, to)),
        1 => (any_index(), any_index()).prop_map(|(from, to)| Damage::Repeat(from, to)),
    ]
}

impl Damage {
    fn to(&self, bytes: &mut Vec<u8>, text: bool) {
        let byte = |byte: u8| if text { byte & 0x7f } else { byte };
        let range = |from: &Index, to: &Index| {
            let (from, to) = (from.index(bytes.len() + 1), to.index(bytes.len() + 1));
            from.min(to)..from.max(to)
        };
        match self {
            Self::Change(at, to) if !bytes.is_empty() => {
                let at = at.index(bytes.len());
                bytes[at] = byte(*to);
            }
            Self::Change(..) => {}
            Self::Insert(at, new) => bytes.insert(at.index(bytes.len() + 1), byte(*new)),
            Self::Cut(from, to) => drop(bytes.drain(range(from, to))),
            Self::Repeat(from, to) => {
                let piece = bytes[range(from, to)].to_vec();
                bytes.extend(piece);
            }
        }
    }
}

fn try_out(target: &Target) {
    let seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "{} has nothing to begin with", target.name);
    for seed in &seeds {
        (target.run)(seed);
    }
    let mut runner = TestRunner::new(Config {
        cases: 2_000,
        failure_persistence: None,
        ..Config::default()
    });
    let damaged = (any::<Index>(), vec(damage(), 1..8));
    let tried = runner.run(&damaged, |(which, damages)| {
        let mut bytes = which.get(&seeds).clone();
        for damage in damages {
            damage.to(&mut bytes, target.text);
        }
        (target.run)(&bytes);
        Ok(())
    });
    tried.unwrap_or_else(|error| panic!("{}: {error}", target.name));
    let tried = runner.run(&vec(any::<u8>(), 0..600), |bytes| {
        (target.run)(&bytes);
        Ok(())
    });
    tried.unwrap_or_else(|error| panic!("{}: {error}", target.name));
}

#[test]
fn no_bytes_from_outside_break_a_parser() {
    for target in TARGETS {
        try_out(target);
    }
}
