//! Names of nodes: made from what was wished, as a DNS label, and unique.

use bulkhead_proto::Role;
use bulkhead_proto::limits::NAME_CHARS;
use bulkhead_proto::wire::Kind;
use bulkhead_raft::state::State;

/// A free name as close as possible to the wish: `db`, then `db-2`.
pub(crate) fn free(state: &State, wish: &str, role: Role) -> String {
    let base = match label(wish) {
        label if label.is_empty() => role.to_string(),
        label => label,
    };
    let taken = |name: &str| state.by_name(Kind::Node, name).is_some();
    if !taken(&base) {
        return base;
    }
    (2u64..)
        .map(|number| {
            let suffix = format!("-{number}");
            let stem: String = base.chars().take(NAME_CHARS - suffix.len()).collect();
            format!("{}{suffix}", stem.trim_end_matches('-'))
        })
        .find(|name| !taken(name))
        .expect("fewer nodes than numbers")
}

/// This name and no other, if no node has it.
pub(super) fn only(state: &State, name: &str) -> Option<String> {
    let free = state.by_name(Kind::Node, name).is_none();
    free.then(|| name.to_owned())
}

/// The wish as a DNS label (RFC 1035 §2.3.1); empty where nothing of it is left. A host's domain is dropped.
fn label(wish: &str) -> String {
    let host = wish.split('.').next().unwrap_or_default();
    let label: String = host
        .chars()
        .map(|c| match c.to_ascii_lowercase() {
            c if c.is_ascii_lowercase() || c.is_ascii_digit() => c,
            _ => '-',
        })
        .skip_while(|&c| c == '-')
        .take(NAME_CHARS)
        .collect();
    label.trim_end_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_becomes_a_label() {
        let long = "x".repeat(100);
        for (wish, name) in [
            ("web-1", "web-1"),
            ("Web_1.example.org", "web-1"),
            ("--a--", "a"),
            ("", "worker"),
            ("…", "worker"),
            ("\u{0}\n", "worker"),
            (long.as_str(), &long[..NAME_CHARS]),
        ] {
            assert_eq!(free(&State::default(), wish, Role::Worker), name, "{wish:?}");
        }
    }
}
