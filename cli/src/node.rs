//! `node`: the machines of the cluster, managers and workers.

mod role;

use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    Availability, ClusterStatus, GetExposureRequest, Label, ListRequest, ListTasksRequest, Node, NodeStatus,
    RemoveRequest, Role, TaskState, UpdateNodeRequest, WaitingNode,
};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::app::App;
use crate::connection::{self, Connection, pages, removal};
use crate::field;
use crate::output::{Filters, Format, Listing, Row, text};
use crate::refusal::{Exit, Refusal};
use crate::secret;
use crate::wait::{self, Patience};

/// What can be done with nodes.
#[derive(Debug, Subcommand)]
pub(crate) enum NodeVerb {
    /// Lists the nodes
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        filters: Filters,
    },
    /// Shows nodes whole
    Inspect {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
        /// Also which secrets they hold, or held, and by which rule
        #[arg(long)]
        exposure: bool,
    },
    /// Changes a node's labels, or clears the alarm about a manager's clone
    Update(Update),
    /// Takes the tasks off nodes and gives them no new ones
    Drain {
        #[command(flatten)]
        which: Which,
        /// Does not wait until the tasks are gone
        #[arg(short, long)]
        detach: bool,
        #[command(flatten)]
        patience: Patience,
    },
    /// Gives nodes no new tasks
    Pause(Which),
    /// Gives nodes tasks again
    Activate(Which),
    /// Cuts off nodes that are not trusted any more, and lists the secrets that they held
    Quarantine {
        #[command(flatten)]
        which: Which,
        /// Even a manager of the quorum that is lost for good
        #[arg(long)]
        force: bool,
    },
    /// Makes managers of standbys
    Promote {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
        /// Does not wait until they vote
        #[arg(short, long)]
        detach: bool,
        #[command(flatten)]
        patience: Patience,
    },
    /// Makes a standby of a manager, and renews the key ring and the root that it could open
    Demote {
        /// Name, id or unique prefix of an id
        node: String,
        /// Renews nothing: the machine is trusted to keep no copy of what it could open
        #[arg(long)]
        clean: bool,
        /// Does not wait until it is one
        #[arg(short, long)]
        detach: bool,
        #[command(flatten)]
        patience: Patience,
    },
    /// Lets in who waits with a ticket that asks for approval
    Approve {
        /// Names, or starts of ids or of keys, that 'node ls' shows as waiting
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Turns away who waits with a ticket that asks for approval
    Reject {
        /// Names, or starts of ids or of keys, that 'node ls' shows as waiting
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Removes nodes from the cluster for ever
    #[command(visible_alias = "remove")]
    Rm {
        #[command(flatten)]
        which: Which,
        /// Even a node that is ready
        #[arg(long)]
        force: bool,
        /// A manager that nobody else ever read: no new key ring and no new root for it
        #[arg(long)]
        clean: bool,
    },
}

/// One or several nodes.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// Names, ids or unique prefixes of ids
    #[arg(required = true, value_name = "NODE")]
    nodes: Vec<String>,
}

/// Flags of `node update`.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Name, id or unique prefix of an id
    node: String,
    /// Sets a label, key=value
    #[arg(long, value_name = "KEY=VALUE", value_parser = field::label_value)]
    label_add: Vec<Label>,
    /// Removes a label
    #[arg(long, value_name = "KEY")]
    label_rm: Vec<String>,
    /// active, pause or drain
    #[arg(long, value_parser = availability)]
    availability: Option<Availability>,
    /// Of a manager: the copy of its superseded key was found, or was an old backup
    #[arg(long)]
    clear_alarm: bool,
}

fn availability(text: &str) -> Result<Availability, String> {
    match text {
        "active" => Ok(Availability::Active),
        "pause" => Ok(Availability::Pause),
        "drain" => Ok(Availability::Drain),
        _ => Err("one of active, pause, drain".into()),
    }
}

pub(crate) async fn run(verb: NodeVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        NodeVerb::Ls { filters } => ls(app, &filters).await?,
        NodeVerb::Inspect { nodes, exposure } => {
            let mut connection = app.connect()?;
            let status = connection.status().await?;
            let mut found = Vec::new();
            for selector in &nodes {
                let mut node = json(&one(&mut connection, selector).await?, &status);
                if exposure {
                    let request = GetExposureRequest {
                        node: selector.clone(),
                        ..Default::default()
                    };
                    let exposed =
                        secret::exposure(&mut connection, &format!("node {selector}"), request).await?;
                    node["exposure"] = exposed.iter().map(secret::exposed_json).collect();
                }
                found.push(node);
            }
            app.inspect(&found)?;
        }
        NodeVerb::Update(update) => {
            let request = UpdateNodeRequest {
                selector: update.node,
                availability: update.availability.unwrap_or_default().into(),
                label_add: update.label_add,
                label_rm: update.label_rm,
                clear_alarm: update.clear_alarm,
                ..Default::default()
            };
            change(app, request).await?;
        }
        NodeVerb::Drain {
            which,
            detach,
            patience,
        } => {
            set(app, &which, Availability::Drain).await?;
            if !detach {
                return drained(app, &which.nodes, patience).await;
            }
        }
        NodeVerb::Pause(which) => set(app, &which, Availability::Pause).await?,
        NodeVerb::Activate(which) => set(app, &which, Availability::Active).await?,
        NodeVerb::Quarantine { which, force } => {
            app.confirm(&format!("Cut off {} for ever?", which.nodes.join(", ")))?;
            for selector in which.nodes {
                quarantine(app, selector, force).await?;
            }
        }
        NodeVerb::Promote {
            nodes,
            detach,
            patience,
        } => return role::promote(app, nodes, detach, patience).await,
        NodeVerb::Demote {
            node,
            clean,
            detach,
            patience,
        } => return role::demote(app, node, clean, detach, patience).await,
        NodeVerb::Approve { nodes } => {
            let mut connection = app.connect()?;
            for selector in nodes {
                let (place, request) = judged(selector);
                let answer = connection
                    .change_signed(&place, async |mut c| c.approve_node(request.clone()).await)
                    .await?;
                app.print(&format!("{}\n", text::id(&answer.id)))?;
            }
        }
        NodeVerb::Reject { nodes } => {
            let mut connection = app.connect()?;
            for selector in nodes {
                let (place, request) = judged(selector);
                let answer = connection
                    .change(&place, async |mut c| c.reject_node(request.clone()).await)
                    .await?;
                app.print(&format!("{}\n", text::id(&answer.id)))?;
            }
        }
        NodeVerb::Rm { which, force, clean } => {
            app.confirm(&format!("Remove {} for ever?", which.nodes.join(", ")))?;
            let mut connection = app.connect()?;
            for selector in which.nodes {
                let place = format!("node {selector}");
                let node = one(&mut connection, &selector).await?;
                let request = RemoveRequest {
                    force,
                    clean,
                    ..removal(&node.id)
                };
                let answer = connection
                    .change(&place, async |mut c| c.remove_node(request.clone()).await)
                    .await?;
                app.print(&format!("{}\n", text::id(&answer.id)))?;
                match (node.role() == Role::Manager, clean) {
                    (false, _) => {}
                    (true, true) => app.say(
                        "nothing is renewed: whoever has its disk and its key file can still open every secret and the root's key",
                    ),
                    (true, false) => exposed_by_manager(&mut connection, app).await?,
                }
            }
        }
    }
    Ok(Exit::Done)
}

/// A manager could open everything: what the cluster does about that, and what is left to do.
async fn exposed_by_manager(connection: &mut Connection, app: &mut App<'_>) -> Result<(), Refusal> {
    app.say(
        "it could open every secret and the root's key: the key ring and the root are renewed by themselves",
    );
    app.say("('bulkhead cluster status' and 'bulkhead cluster ca status' show how far)");
    let secrets = pages!(
        connection,
        "secrets",
        list_secrets,
        ListRequest::default(),
        secrets
    );
    let names: Vec<&str> = secrets.iter().map(|secret| secret.name.as_str()).collect();
    if !names.is_empty() {
        app.say(&format!(
            "where it was not trustworthy, change these secrets where they come from: {}",
            names.join(", ")
        ));
    }
    Ok(())
}

fn judged(selector: String) -> (String, RemoveRequest) {
    let place = format!("node {selector}");
    let request = RemoveRequest {
        request_id: text::new_id().to_vec(),
        selector,
        ..Default::default()
    };
    (place, request)
}

/// Cuts one node off, and says which secrets are no secrets any more.
async fn quarantine(app: &mut App<'_>, selector: String, force: bool) -> Result<(), Refusal> {
    let mut connection = app.connect()?;
    let place = format!("node {selector}");
    let held = GetExposureRequest {
        node: selector.clone(),
        ..Default::default()
    };
    let request = RemoveRequest {
        force,
        ..removal(&one(&mut connection, &selector).await?.id)
    };
    let answer = connection
        .change(&place, async |mut c| c.quarantine_node(request.clone()).await)
        .await?;
    app.print(&format!("{}\n", text::id(&answer.id)))?;
    let exposed = secret::exposure(&mut connection, &place, held).await?;
    let mut names: Vec<&str> = exposed.iter().map(|it| it.secret_name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    app.say(&match names.as_slice() {
        [] => format!("{place} is cut off; it held no secret that is known of"),
        names => format!(
            "{place} is cut off; it held: {}\nreplace each: store the new value under a new name, and update the services \
             that use it ('bulkhead secret trace NAME' lists them)",
            names.join(", ")
        ),
    });
    Ok(())
}

async fn set(app: &mut App<'_>, which: &Which, availability: Availability) -> Result<(), Refusal> {
    for selector in &which.nodes {
        let request = UpdateNodeRequest {
            selector: selector.clone(),
            availability: availability.into(),
            ..Default::default()
        };
        change(app, request).await?;
    }
    Ok(())
}

async fn change(app: &mut App<'_>, mut request: UpdateNodeRequest) -> Result<(), Refusal> {
    request.request_id = text::new_id().to_vec();
    let place = format!("node {}", request.selector);
    let answer = app
        .connect()?
        .change(&place, async |mut c| c.update_node(request.clone()).await)
        .await?;
    app.print(&format!("{}\n", text::id(&answer.id)))
}

/// Waits until no task runs on the nodes.
async fn drained(app: &mut App<'_>, nodes: &[String], patience: Patience) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    let mut progress = app.progress();
    let poll = async {
        loop {
            let mut left = 0;
            for node in nodes {
                let request = ListTasksRequest {
                    node: node.clone(),
                    ..Default::default()
                };
                let tasks = pages!(connection, "tasks", list_tasks, request, tasks);
                let live = tasks.iter().filter(|t| {
                    let state = t
                        .task
                        .as_ref()
                        .and_then(|t| t.status.as_ref())
                        .map_or(0, |s| s.state);
                    state < TaskState::Complete as i32
                });
                let count = live.count();
                progress.set(node, &format!("{count} tasks left"));
                left += count;
            }
            if left == 0 {
                return Ok(Exit::Done);
            }
            tokio::time::sleep(wait::POLL).await;
        }
    };
    let help = "the tasks go on leaving; 'bulkhead node ls' and 'bulkhead task ls' show how far it is";
    wait::bounded(patience, "node drain", help, poll).await
}

async fn ls(app: &mut App<'_>, filters: &Filters) -> Result<(), Refusal> {
    let mut connection = app.connect()?;
    let status = connection.status().await?;
    let (nodes, waiting) = all(&mut connection).await?;
    let now = text::now_ms();
    let mut rows: Vec<Row> = nodes
        .iter()
        .map(|node| {
            let json = json(node, &status);
            let id = text::id(&node.id);
            let word = |key: &str| json[key].as_str().unwrap_or("-").to_owned();
            let leader = if json["leader"] == true { "leader" } else { "" };
            Row {
                cells: vec![
                    app.id_cell(&id),
                    node.name.clone(),
                    word("role"),
                    word("state"),
                    word("availability"),
                    node.address.clone(),
                    leader.into(),
                    clock(node),
                    text::distance(issued_at(node), now),
                    text::distance(not_after(node), now),
                    node.description
                        .as_ref()
                        .map_or_else(String::new, |d| d.program_version.clone()),
                ],
                id,
                json,
            }
        })
        .collect();
    rows.extend(waiting.iter().map(|it| waiting_row(app, it, now)));
    let listing = Listing {
        headers: &[
            "ID",
            "NAME",
            "ROLE",
            "STATE",
            "AVAILABILITY",
            "ADDRESS",
            "LEADER",
            "CLOCK",
            "RENEWED",
            "CERTIFICATE ENDS",
            "VERSION",
        ],
        keys: &["id", "name", "role", "state", "availability", "leader", "address"],
        rows,
    };
    app.list(listing, filters)?;
    if !app.global.quiet && app.global.format.is_none_or(|it| it == Format::Table) {
        for node in &nodes {
            if let Some(warning) = clone_warning(node) {
                app.say(&warning);
            }
        }
        for it in &waiting {
            let who = it.who.clone().unwrap_or_default();
            app.say(&format!(
                "{} waits for 'bulkhead node approve {}' or 'node reject {}': from {}, key {}",
                who.name,
                who.name,
                who.name,
                or_unknown(&who.seen),
                hex(&who.key_id)
            ));
        }
    }
    Ok(())
}

/// What an operator has to know and do where somebody has a copy of a node's key.
fn clone_warning(node: &Node) -> Option<String> {
    let clone = node.clone_seen.as_ref()?;
    let (name, from) = (&node.name, or_unknown(&clone.address));
    let at = text::time(clone.at);
    let next = match node.quarantined_at {
        0 => format!(
            "it is a manager, and not put into quarantine by itself: see docs/operations/lost-and-untrusted-nodes.md, \
             then 'bulkhead node update --clear-alarm {name}'"
        ),
        _ => format!("it is in quarantine: 'bulkhead node inspect --exposure {name}' lists what it held"),
    };
    Some(format!(
        "somebody at {from} showed a superseded key of {name} at {}: a copy of it, or an old backup; {next}",
        at.as_str().unwrap_or("-")
    ))
}

/// Who waits for approval, as a node that is not one yet.
fn waiting_row(app: &App<'_>, it: &WaitingNode, now: i64) -> Row {
    let who = it.who.clone().unwrap_or_default();
    let id = text::id(&who.node_id);
    let json = json!({
        "id": id,
        "name": who.name,
        "role": text::role(it.role()),
        "state": "waiting",
        "address": who.seen,
        "advertised": who.address,
        "key_id": hex(&who.key_id),
        "ticket": text::id(&it.ticket_id),
        "since": text::time(who.since),
        "until": text::time(it.until),
    });
    let about = who.description.unwrap_or_default();
    Row {
        cells: vec![
            app.id_cell(&id),
            who.name,
            text::role(it.role()).into(),
            "waiting".into(),
            "-".into(),
            who.seen,
            String::new(),
            "-".into(),
            text::distance(it.until, now),
            about.program_version,
        ],
        json,
        id,
    }
}

fn or_unknown(address: &str) -> &str {
    match address {
        "" => "an unknown address",
        address => address,
    }
}

/// All nodes, and who waits to become one.
async fn all(connection: &mut Connection) -> Result<(Vec<Node>, Vec<WaitingNode>), Refusal> {
    let (mut nodes, mut waiting) = (Vec::new(), Vec::new());
    let mut request = ListRequest::default();
    loop {
        let page = connection
            .ask("nodes", async |mut c| c.list_nodes(request.clone()).await)
            .await?;
        nodes.extend(page.nodes);
        waiting.extend(page.waiting);
        if page.next.is_empty() {
            return Ok((nodes, waiting));
        }
        request.after = page.next;
    }
}

/// The one node that a selector names.
pub(crate) async fn one(connection: &mut Connection, selector: &str) -> Result<Node, Refusal> {
    connection::one!(connection, "node", list_nodes, nodes, selector)
}

/// When the newest certificate ends. An older one may end later, where they are made to last shorter.
fn not_after(node: &Node) -> i64 {
    node.keys.last().map_or(0, |key| key.not_after)
}

/// When the newest certificate was issued; it starts a little before.
fn issued_at(node: &Node) -> i64 {
    let backdate = i64::try_from(limits::CERTIFICATE_BACKDATE.as_millis()).unwrap_or(0);
    node.keys
        .last()
        .map_or(0, |key| key.not_before.saturating_add(backdate))
}

fn state(node: &Node) -> &'static str {
    match node.status() {
        NodeStatus::Unspecified | NodeStatus::Unknown => "unknown",
        NodeStatus::Ready => "ready",
        NodeStatus::Down => "down",
    }
}

fn availability_word(node: &Node) -> &'static str {
    match node.availability() {
        _ if node.quarantined_at != 0 => "quarantine",
        Availability::Unspecified | Availability::Active => "active",
        Availability::Pause => "pause",
        Availability::Drain => "drain",
    }
}

/// A node in a few words, for events.
pub(crate) fn summary(node: &Node) -> String {
    let clone = match node.clone_seen {
        Some(_) => " with a clone",
        None => "",
    };
    format!(
        "{} {} {}{clone}",
        text::role(node.role()),
        state(node),
        availability_word(node)
    )
}

/// A node as scripts read it.
pub(crate) fn json(node: &Node, status: &ClusterStatus) -> Value {
    let manager = node.role() == Role::Manager;
    let member = status.members.iter().find(|m| manager && m.node_id == node.id);
    let about = node.description.as_ref();
    json!({
        "id": text::id(&node.id),
        "name": node.name,
        "role": text::role(node.role()),
        "address": node.address,
        "state": state(node),
        "state_reason": node.status_reason,
        "state_since": text::time(node.status_since),
        "availability": availability_word(node),
        "leader": member.is_some_and(|m| m.leader),
        "wanted_role": match node.wanted_role() {
            Role::Unspecified => text::role(node.role()),
            wanted => text::role(wanted),
        },
        "voter": member.is_some_and(|m| m.voter),
        "member_id": node.member_id,
        "labels": text::labels(&node.labels),
        "clock_ahead_ms": (node.clock_measured_at != 0).then_some(node.clock_ahead_ms),
        "clock_measured_at": text::time(node.clock_measured_at),
        "certificate_not_after": text::time(not_after(node)),
        "certificate_issued_at": text::time(issued_at(node)),
        "keys": node.keys.iter().map(|key| json!({
            "key_id": hex(&key.key_id),
            "not_before": text::time(key.not_before),
            "not_after": text::time(key.not_after),
        })).collect::<Vec<_>>(),
        "clone_seen": node.clone_seen.as_ref().map(|clone| json!({
            "at": text::time(clone.at),
            "address": clone.address,
            "key_id": hex(&clone.key_id),
        })),
        "description": about.map(|about| json!({
            "hostname": about.hostname,
            "architecture": about.architecture,
            "operating_system": about.operating_system,
            "kernel": about.kernel,
            "cpu_millis": about.cpu_millis,
            "memory_bytes": about.memory_bytes,
            "program_version": about.program_version,
            "features": about.features.iter()
                .map(|f| (f.name.clone(), Value::String(f.state.clone()))).collect::<serde_json::Map<_, _>>(),
        })),
        "created_at": text::time(node.meta.as_ref().map_or(0, |m| m.created_at)),
    })
}

/// How a node's clock goes, as its manager measured it last.
fn clock(node: &Node) -> String {
    let apart = Duration::from_millis(node.clock_ahead_ms.unsigned_abs());
    match node.clock_measured_at {
        0 => "-".into(),
        _ if apart < limits::CLOCK_MOVED => "ok".into(),
        _ => {
            let sign = if node.clock_ahead_ms < 0 { '-' } else { '+' };
            let note = if apart > limits::CLOCK_SKEW { "!" } else { "" };
            format!("{sign}{}{note}", text::rough(apart))
        }
    }
}

/// Bytes as hex, for digests and key ids.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
