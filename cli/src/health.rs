//! `health`: whether one program is ready, for health checks of containers and units.

use bulkhead_proto::wire::{GetLocalStatusRequest, LocalStatus, Phase};
use clap::Args;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use serde_json::json;

use crate::app::App;
use crate::output::{Format, document, text};
use crate::refusal::{Code, Exit, Refusal, from_status};

/// A health check that takes longer has failed.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// Flags of `health`.
#[derive(Debug, Args)]
pub(crate) struct Health {
    /// Becomes this user first, the program's own: a container's root may not open another user's socket
    #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u32).range(1..))]
    user: Option<u32>,
}

pub(crate) async fn run(options: Health, app: &mut App<'_>) -> Result<Exit, Refusal> {
    options.user.map_or(Ok(()), become_user)?;
    let status = status(&mut app.program()?.local()).await?;
    let text = match app.global.format.unwrap_or(Format::Table) {
        Format::Table => format!("{}\n", verdict(&status)),
        format => document(
            &json!({
                "phase": phase(&status), "role": text::role(status.role()), "ready": status.ready,
                "leader": status.leader, "detail": status.detail, "name": status.name,
                "node_id": text::id(&status.node_id), "cluster_id": text::id(&status.cluster_id),
                "certificate_not_after": text::time(status.certificate_not_after),
            }),
            format,
        ),
    };
    app.print(&text)?;
    if status.ready {
        return Ok(Exit::Done);
    }
    let (code, help) = match status.phase() {
        Phase::Locked => (Code::Locked, "give it its unlock key: 'bulkhead cluster unlock'"),
        _ => (
            Code::NotReady,
            "wait, or read the program's log; a program without a cluster needs 'bulkhead cluster init' or 'join'",
        ),
    };
    Err(Refusal::new(code, "health", verdict(&status), help))
}

/// User, group and no other groups; for ever, before anything is asked.
fn become_user(id: u32) -> Result<(), Refusal> {
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|e| {
            let help = "only root can become another user: call it as that user, without --user";
            Refusal::new(Code::BadField, "--user", e.to_string(), help)
        })
}

/// What a program says of itself over its local socket.
pub(crate) async fn status(
    local: &mut bulkhead_proto::wire::local_client::LocalClient<tonic::transport::Channel>,
) -> Result<LocalStatus, Refusal> {
    match tokio::time::timeout(PATIENCE, local.get_status(GetLocalStatusRequest {})).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(from_status(&status, "local socket")),
        Err(_) => {
            let reason = format!("no answer within {} s", PATIENCE.as_secs());
            Err(Refusal::new(
                Code::NotReady,
                "local socket",
                reason,
                "read the program's log",
            ))
        }
    }
}

pub(crate) fn phase(status: &LocalStatus) -> &'static str {
    match status.phase() {
        Phase::Unspecified => "unknown",
        Phase::Uninitialised => "uninitialised",
        Phase::Joining => "joining",
        Phase::Member => "member",
        Phase::Stopped => "stopped",
        Phase::Locked => "locked",
    }
}

fn verdict(status: &LocalStatus) -> String {
    let ready = if status.ready { "ready" } else { "not ready" };
    let detail = match status.detail.as_str() {
        "" => String::new(),
        detail => format!(": {detail}"),
    };
    format!(
        "{ready} ({} {}){detail}",
        text::role(status.role()),
        phase(status)
    )
}
