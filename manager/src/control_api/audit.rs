//! The audit log, page by page.

use bulkhead_proto::limits;
use bulkhead_proto::wire::{AuditAction, AuditNote, AuditRecord, ListAuditResponse, change::Change};
use bulkhead_raft::state::State;

/// The kept records after this one, as many as one answer holds: with every text at its limit still half a message.
pub(super) fn list(state: &State, after: u64) -> ListAuditResponse {
    let log = state.audit();
    ListAuditResponse {
        index: state.index(),
        records: log
            .since(after)
            .take(limits::LIST_ENTRIES)
            .map(|it| AuditRecord::clone(it))
            .collect(),
        anchor: Some(log.anchor().to_wire()),
        head: Some(log.head().to_wire()),
    }
}

/// The note that an operator was shown the unlock key.
pub(super) fn shown(actor: &str, generation: u32) -> Change {
    Change::Note(AuditNote {
        action: AuditAction::Access.into(),
        actor: actor.to_owned(),
        detail: format!("unlock key {generation} was shown"),
        count: 1,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{secret, state};
    use super::*;

    #[test]
    fn a_page_begins_after_the_record_asked_for_and_names_both_ends() {
        let state = state((1..=9).map(|n| secret(n, &format!("s{n}"))));
        let answer = list(&state, 8);
        let numbers: Vec<u64> = answer.records.iter().map(|it| it.sequence).collect();
        assert_eq!(numbers, [9, 10]);
        assert_eq!(answer.index, state.index());
        assert_eq!(answer.head, Some(state.audit().head().to_wire()));
        assert_eq!(answer.anchor, Some(state.audit().anchor().to_wire()));
        assert_eq!(list(&state, 10).records, []);
    }
}
