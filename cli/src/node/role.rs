//! `node promote` and `node demote`: from standby to manager and back, and what that means for secrets.

use bulkhead_proto::wire::{Node, NodeStatus, Role};

use super::{exposed_by_manager, judged, one};
use crate::app::App;
use crate::connection::Connection;
use crate::output::text;
use crate::refusal::{Exit, Refusal};
use crate::wait::{self, Patience};

/// Makes managers of standbys, one after the other: each changes the quorum.
pub(super) async fn promote(
    app: &mut App<'_>,
    nodes: Vec<String>,
    detach: bool,
    patience: Patience,
) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    for selector in nodes {
        let (place, request) = judged(selector);
        let answer = connection
            .change(&place, async |mut c| c.promote_node(request.clone()).await)
            .await?;
        let id = text::id(&answer.id);
        app.print(&format!("{id}\n"))?;
        if detach {
            continue;
        }
        let help = "it goes on by itself once the standby hears of it: 'bulkhead node ls' shows its role";
        let ended = until(
            app,
            &mut connection,
            &id,
            patience,
            "node promote",
            help,
            |found| match found.node.role() {
                Role::Manager if found.votes => None,
                Role::Manager => Some("receives the log and the key ring"),
                _ => Some("is to hear of it"),
            },
        );
        ended.await?;
    }
    Ok(Exit::Done)
}

/// Makes a standby of a manager.
pub(super) async fn demote(
    app: &mut App<'_>,
    selector: String,
    clean: bool,
    detach: bool,
    patience: Patience,
) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    let was = one(&mut connection, &selector).await?;
    let (place, mut request) = judged(selector);
    request.clean = clean;
    let answer = connection
        .change(&place, async |mut c| c.demote_node(request.clone()).await)
        .await?;
    let id = text::id(&answer.id);
    app.print(&format!("{id}\n"))?;
    if was.role() != Role::Manager {
        return Ok(Exit::Done);
    }
    if !detach {
        let help = "it goes on by itself: 'bulkhead node ls' shows its role";
        let ended = until(
            app,
            &mut connection,
            &id,
            patience,
            "node demote",
            help,
            |found| match found.node.role() {
                // It speaks as one only once its store is gone.
                Role::Standby if found.node.status() == NodeStatus::Ready => None,
                Role::Standby => Some("wipes its store"),
                _ if found.votes => Some("is to leave the quorum"),
                _ => Some("left the quorum"),
            },
        );
        ended.await?;
    }
    match clean {
        true => app.say(
            "nothing is renewed for it: the machine stays trusted to have kept no copy of what it could open",
        ),
        false => exposed_by_manager(&mut connection, app).await?,
    }
    Ok(Exit::Done)
}

/// A node as it is now.
struct Found {
    node: Node,
    votes: bool,
}

/// Waits until nothing is left of which `lacks` speaks.
async fn until(
    app: &mut App<'_>,
    connection: &mut Connection,
    id: &str,
    patience: Patience,
    place: &str,
    help: &str,
    lacks: impl Fn(&Found) -> Option<&'static str>,
) -> Result<Exit, Refusal> {
    let mut progress = app.progress();
    let done = async {
        loop {
            let node = one(connection, id).await?;
            let status = connection.status().await?;
            let votes = status.members.iter().any(|it| it.node_id == node.id && it.voter);
            let found = Found { node, votes };
            let Some(lack) = lacks(&found) else {
                progress.set(&found.node.name, text::role(found.node.role()));
                return Ok(Exit::Done);
            };
            progress.set(&found.node.name, lack);
            tokio::time::sleep(wait::POLL).await;
        }
    };
    wait::bounded(patience, place, help, done).await
}
