//! `cluster ticket`: the rights to join.

use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    CreateTicketRequest, CreateTicketResponse, Label, ListRequest, RemoveRequest, RevokeAllTicketsRequest,
    Role,
};
use clap::{Args, Subcommand};
use serde_json::json;
use zeroize::Zeroizing;

use crate::app::App;
use crate::connection::{Connection, pages};
use crate::field;
use crate::output::{Filters, Format, Listing, Row, document, text};
use crate::quantity;
use crate::refusal::{Code, Exit, Refusal};

/// A ticket's text, which is a secret.
pub(crate) type Ticket = Zeroizing<String>;

/// What can be done with tickets.
#[derive(Debug, Subcommand)]
pub(crate) enum TicketVerb {
    /// Makes a ticket and prints it, once
    Create(Create),
    /// Lists the tickets, without their secrets
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        filters: Filters,
    },
    /// Makes tickets worthless; who joined with one stays
    #[command(visible_alias = "rm")]
    Revoke {
        /// Ids or unique prefixes of ids
        #[arg(required_unless_present = "all", value_name = "TICKET")]
        tickets: Vec<String>,
        /// All that there are, in one commit
        #[arg(long, conflicts_with = "tickets")]
        all: bool,
    },
}

/// Flags of `cluster ticket create`.
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// What the holder becomes: worker, manager, standby or operator
    #[arg(long, value_parser = any_role)]
    role: Role,
    /// How long it can be used
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = validity)]
    ttl: Duration,
    /// How many may join with it
    #[arg(long, value_name = "COUNT", default_value_t = limits::TICKET_USES,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::TICKET_USES_MAX)))]
    uses: u32,
    /// A label of the nodes that join with it, key=value
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = field::label_value)]
    label: Vec<Label>,
    /// The node that joins with it is called so, and no other may use it
    #[arg(long, value_name = "NAME")]
    for_node: Option<String>,
    /// Who joins with it waits until 'bulkhead node approve'
    #[arg(long)]
    approve: bool,
}

impl Create {
    /// One ticket with the defaults.
    pub(crate) fn plain(role: Role) -> Self {
        Self {
            role,
            ttl: limits::TICKET_VALIDITY,
            uses: limits::TICKET_USES,
            label: Vec::new(),
            for_node: None,
            approve: false,
        }
    }

    /// As [`Create::plain`], for several.
    pub(crate) fn for_uses(role: Role, uses: u32) -> Self {
        Self {
            uses,
            ..Self::plain(role)
        }
    }
}

fn validity(text: &str) -> Result<Duration, String> {
    let ttl = quantity::duration(text).map_err(|e| e.one_line())?;
    if ttl < Duration::from_secs(1) || ttl > limits::TICKET_VALIDITY_MAX {
        return Err(format!("from 1s to {}", text::rough(limits::TICKET_VALIDITY_MAX)));
    }
    Ok(ttl)
}

/// The role of a node.
pub(crate) fn role(text: &str) -> Result<Role, String> {
    match text {
        "manager" => Ok(Role::Manager),
        "worker" => Ok(Role::Worker),
        _ => Err("one of worker, manager".into()),
    }
}

fn any_role(text: &str) -> Result<Role, String> {
    match text {
        "operator" => Ok(Role::Operator),
        "standby" => Ok(Role::Standby),
        text => role(text).map_err(|_| "one of worker, manager, standby, operator".into()),
    }
}

pub(crate) async fn run(verb: TicketVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        TicketVerb::Create(options) => create(options, app).await,
        TicketVerb::Ls { filters } => ls(app, &filters).await,
        TicketVerb::Revoke { all: true, .. } => {
            app.confirm("Revoke all tickets?")?;
            let request = RevokeAllTicketsRequest {
                request_id: text::new_id().to_vec(),
            };
            let answer = app
                .connect()?
                .change("cluster ticket revoke --all", async |mut c| {
                    c.revoke_all_tickets(request.clone()).await
                })
                .await?;
            let ids: String = answer
                .ids
                .iter()
                .map(|id| format!("{}\n", text::id(id)))
                .collect();
            app.print(&ids)?;
            app.say(&format!("{} tickets were revoked", answer.ids.len()));
            Ok(Exit::Done)
        }
        TicketVerb::Revoke { tickets, all: false } => {
            let mut connection = app.connect()?;
            for selector in tickets {
                let place = format!("ticket {selector}");
                let request = RemoveRequest {
                    request_id: text::new_id().to_vec(),
                    selector,
                    force: false,
                    ..Default::default()
                };
                let answer = connection
                    .change(&place, async |mut c| c.revoke_ticket(request.clone()).await)
                    .await?;
                app.print(&format!("{}\n", text::id(&answer.id)))?;
            }
            Ok(Exit::Done)
        }
    }
}

/// Asks the cluster for a ticket.
pub(crate) async fn issue(
    connection: &mut Connection,
    options: &Create,
) -> Result<CreateTicketResponse, Refusal> {
    let request = CreateTicketRequest {
        request_id: text::new_id().to_vec(),
        ticket_id: text::new_id().to_vec(),
        role: options.role.into(),
        ttl_ms: u64::try_from(options.ttl.as_millis()).unwrap_or(u64::MAX),
        uses: options.uses,
        labels: options.label.clone(),
        for_node: options.for_node.clone().unwrap_or_default(),
        approve: options.approve,
    };
    connection
        .change("cluster ticket", async |mut c| {
            c.create_ticket(request.clone()).await
        })
        .await
}

/// A ticket for so many nodes, with the usual lifetime.
pub(crate) async fn issue_for(connection: &mut Connection, role: Role, uses: u32) -> Result<Ticket, Refusal> {
    let mut answer = issue(connection, &Create::for_uses(role, uses)).await?;
    Ok(Zeroizing::new(std::mem::take(&mut answer.ticket)))
}

pub(crate) async fn create(options: Create, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let mut answer = issue(&mut app.connect()?, &options).await?;
    let ticket: Ticket = Zeroizing::new(std::mem::take(&mut answer.ticket));
    let managers: Vec<&str> = answer.managers.iter().map(|m| m.address.as_str()).collect();
    match app.global.format {
        Some(format @ (Format::Json | Format::Jsonl)) => {
            let value = json!({
                "id": text::id(&answer.id), "ticket": ticket.as_str(), "role": text::role(options.role),
                "expires_at": text::time(answer.expires_at), "uses": options.uses, "managers": managers,
                "for_node": options.for_node, "approve": options.approve,
            });
            app.print(&document(&value, format))?;
        }
        Some(Format::Table) | None => app.print(&format!("{}\n", ticket.as_str()))?,
    }
    if !app.global.quiet {
        for line in next_steps(&options, answer.expires_at, &managers) {
            app.say(&line);
        }
    }
    Ok(Exit::Done)
}

/// What the holder does with a ticket.
fn next_steps(options: &Create, expires_at: i64, managers: &[&str]) -> Vec<String> {
    let (role, uses) = (options.role, options.uses);
    let until = text::time(expires_at);
    let called = options.for_node.as_ref().map(|name| format!(" as '{name}'"));
    let first = format!(
        "this ticket lets {uses} {}{} join{} until {}; it is shown once",
        text::role(role),
        if uses == 1 { "" } else { "s" },
        called.unwrap_or_default(),
        until.as_str().unwrap_or("it is revoked")
    );
    let addresses = if managers.is_empty() {
        "HOST:PORT".to_owned()
    } else {
        managers.join(" ")
    };
    let command = match role {
        Role::Operator => format!("  bulkhead operator join --ticket-file FILE {addresses}"),
        Role::Manager | Role::Standby => {
            format!(
                "  bulkhead cluster join --socket DIR/manager.sock --ticket-file FILE --advertise HOST:PORT {addresses}"
            )
        }
        Role::Worker | Role::Unspecified => {
            format!("  bulkhead cluster join --socket DIR/worker/worker.sock --ticket-file FILE {addresses}")
        }
    };
    let mut steps = vec![
        first,
        "put it into a file (or pipe it, with '-' as the file), and run there:".into(),
        command,
    ];
    if options.approve {
        steps.push(
            "who joins waits: 'bulkhead node ls' shows it, 'bulkhead node approve NAME' lets it in".into(),
        );
    }
    steps
}

async fn ls(app: &mut App<'_>, filters: &Filters) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    let tickets = pages!(
        connection,
        "tickets",
        list_tickets,
        ListRequest::default(),
        tickets
    );
    let now = text::now_ms();
    let row = |ticket: &bulkhead_proto::wire::Ticket| {
        let id = text::id(&ticket.id);
        Row {
            cells: vec![
                app.id_cell(&id),
                text::role(ticket.role()).into(),
                ticket.uses_left.to_string(),
                text::distance(ticket.expires_at, now),
                match ticket.for_node.as_str() {
                    "" => "-".into(),
                    name => name.to_owned(),
                },
                match (ticket.approve, ticket.waiting.len()) {
                    (false, _) => "-".into(),
                    (true, waiting) => format!("{waiting} wait"),
                },
            ],
            json: json!({
                "id": id, "role": text::role(ticket.role()), "uses_left": ticket.uses_left,
                "expires_at": text::time(ticket.expires_at), "labels": text::labels(&ticket.labels),
                "for_node": ticket.for_node, "approve": ticket.approve, "waiting": ticket.waiting.len(),
            }),
            id,
        }
    };
    let listing = Listing {
        headers: &["ID", "ROLE", "USES LEFT", "EXPIRES", "FOR NODE", "APPROVAL"],
        keys: &["id", "role"],
        rows: tickets.iter().map(row).collect(),
    };
    app.list(listing, filters)?;
    Ok(Exit::Done)
}

/// Writes `manager/ticket` and `worker/ticket` for machines that join by themselves. Each role's lies in a folder of its
/// own, so that workers can be shown theirs and never the managers'.
pub(crate) async fn write_files(
    connection: &mut Connection,
    folder: &Path,
    uses: u32,
) -> Result<(), Refusal> {
    for role in [Role::Manager, Role::Worker] {
        let ticket = issue_for(connection, role, uses).await?;
        write_file(&folder.join(text::role(role)), &ticket)?;
    }
    Ok(())
}

/// Writes a ticket for its owner alone, as `folder/ticket`. The name appears with the whole ticket: someone may wait for
/// it.
fn write_file(folder: &Path, ticket: &str) -> Result<(), Refusal> {
    let path = folder.join("ticket");
    let partial = folder.join("ticket.partial");
    let write = || {
        use std::io::Write;
        match std::fs::DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            _ => {} // a folder that is there, as a mounted one, keeps its mode
        }
        let mut file = std::fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(format!("{ticket}\n").as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&partial, &path)
    };
    write().map_err(|e: std::io::Error| {
        let place = path.display().to_string();
        Refusal::new(
            Code::Unwritable,
            place,
            e.to_string(),
            "name a folder that is there and writable",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_step_is_a_whole_command() {
        let steps = next_steps(&Create::for_uses(Role::Worker, 2), 1_000, &["m1:7443", "m2:7443"]);
        assert!(
            steps[0].starts_with("this ticket lets 2 workers join until 1970-01-01"),
            "{steps:?}"
        );
        assert_eq!(
            steps[2],
            "  bulkhead cluster join --socket DIR/worker/worker.sock --ticket-file FILE m1:7443 m2:7443"
        );
    }

    #[test]
    fn a_ticket_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let worker = folder.path().join("worker");
        let mode = |path: &Path| {
            let facts = std::fs::metadata(path).expect("it is there");
            facts.permissions().mode() & 0o777
        };
        for text in ["T", "U"] {
            write_file(&worker, text).expect("a writable folder");
            let ticket = worker.join("ticket");
            assert_eq!(
                std::fs::read_to_string(&ticket).expect("it is there"),
                format!("{text}\n")
            );
            assert_eq!((mode(&worker), mode(&ticket)), (0o700, 0o600));
        }
        assert!(write_file(&folder.path().join("none/worker"), "T").is_err());
    }

    #[test]
    fn roles_and_lifetimes_are_bounded() {
        assert!(role("operator").is_err() && any_role("operator").is_ok() && any_role("root").is_err());
        for (text, good) in [
            ("1h", true),
            ("30d", true),
            ("31d", false),
            ("0", false),
            ("10ms", false),
        ] {
            assert_eq!(validity(text).is_ok(), good, "{text}");
        }
    }
}
