//! What a manager says of itself in its own record.

use bulkhead_proto::RequestId;
use bulkhead_proto::wire::{Change, Node, change::Change as Step, object::Object as Any};

use super::member::Member;
use crate::ca::renewal::unchanged;
use crate::view;

/// Commits what `change` makes of this manager's record, if that is something else. Where it was overtaken or not
/// proposed it is for the caller to say it again, when it looks the next time.
///
/// # Errors
/// Without random bytes for the request.
pub(super) async fn say(member: &Member, change: impl Fn(&Node) -> Node) -> anyhow::Result<()> {
    let state = member.replica.state();
    let Some(record) = view::node(&state, member.node()) else {
        return Ok(());
    };
    let new = change(record);
    if new == *record || !member.fresh.is_fresh() {
        return Ok(());
    }
    let change = Change {
        change: Some(Step::Replace(view::object(Any::Node(new)))),
    };
    let mut id = [0; 16];
    member.machine.entropy.fill(&mut id)?;
    let actor = format!("manager/{}", member.node());
    let proposed = member.proposer.client(
        &actor,
        RequestId::from_bytes(id),
        vec![unchanged(record)],
        vec![change],
    );
    if let Err(error) = proposed.await {
        tracing::debug!(%error, "what this manager says of itself was not committed");
    }
    Ok(())
}
