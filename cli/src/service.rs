//! `service`: what should run, and how many of it.

mod convergence;
mod logs;
mod spec;

use bulkhead_proto::wire::{
    CreateServiceRequest, ListRequest, ListTasksRequest, ServiceSpec, ServiceSummary, UpdateServiceRequest,
    UpdateState,
};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::app::App;
use crate::connection::{self, Connection, pages, removal};
use crate::explain;
use crate::output::{Filters, Listing, Row, text};
use crate::refusal::{Code, Exit, Refusal};
use crate::task;
use crate::wait::{self, Patience};

pub(crate) use spec::json as spec_json;

/// Times that an update is made again on top of what the cluster itself changed meanwhile.
const REBASES: usize = 5;

/// What can be done with services.
#[derive(Debug, Subcommand)]
pub(crate) enum ServiceVerb {
    /// Creates a service and waits until it runs
    Create(Box<spec::Create>),
    /// Changes a service, one replica after the other; without a change a paused update goes on
    Update(Box<Update>),
    /// Sets how many replicas services have
    Scale {
        /// SERVICE=REPLICAS
        #[arg(required = true, value_name = "SERVICE=REPLICAS", value_parser = spec::scale)]
        targets: Vec<(String, u32)>,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Lists the services
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        filters: Filters,
    },
    /// Lists the tasks of services, ended ones too
    Ps {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
        #[command(flatten)]
        filters: Filters,
    },
    /// Shows services whole
    Inspect {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
    },
    /// Prints what the tasks of a service wrote
    Logs(logs::Logs),
    /// Removes services and their tasks
    #[command(visible_alias = "remove")]
    Rm {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "SERVICE")]
        services: Vec<String>,
    },
    /// Says for each node why it can take a replica, or not
    Explain {
        /// Name, id or unique prefix of an id
        service: String,
    },
}

/// Whether and how long a command waits.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Waiting {
    /// Does not wait until all replicas run
    #[arg(short, long)]
    detach: bool,
    #[command(flatten)]
    patience: Patience,
}

/// Flags of `service update`.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Name, id or unique prefix of an id
    service: String,
    #[command(flatten)]
    changes: spec::Changes,
    #[command(flatten)]
    waiting: Waiting,
}

pub(crate) async fn run(verb: ServiceVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        ServiceVerb::Create(create) => return self::create(*create, app).await,
        ServiceVerb::Update(update) => {
            let mut connection = app.connect()?;
            let name = apply(&mut connection, &update.service, &|spec| {
                update.changes.apply(spec)
            })
            .await?;
            return settle(app, &mut connection, &[name], update.waiting).await;
        }
        ServiceVerb::Scale { targets, waiting } => {
            let mut connection = app.connect()?;
            let mut names = Vec::new();
            for (selector, replicas) in &targets {
                let scale = |spec: &mut ServiceSpec| {
                    spec.replicas = *replicas;
                    Ok(())
                };
                names.push(apply(&mut connection, selector, &scale).await?);
            }
            return settle(app, &mut connection, &names, waiting).await;
        }
        ServiceVerb::Ls { filters } => ls(app, &filters).await?,
        ServiceVerb::Ps { services, filters } => {
            let mut connection = app.connect()?;
            let mut tasks = Vec::new();
            for service in services {
                let place = format!("service {service}");
                let request = ListTasksRequest {
                    service,
                    all: true,
                    ..Default::default()
                };
                tasks.extend(pages!(connection, &place, list_tasks, request, tasks));
            }
            let listing = task::listing(app, &tasks);
            app.list(listing, &filters)?;
        }
        ServiceVerb::Inspect { services } => {
            let mut connection = app.connect()?;
            let mut found = Vec::new();
            for selector in &services {
                found.push(json(&one(&mut connection, selector).await?));
            }
            app.inspect(&found)?;
        }
        ServiceVerb::Logs(logs) => return logs::run(logs, app).await,
        ServiceVerb::Rm { services } => rm(app, services).await?,
        ServiceVerb::Explain { service } => explain::run(app, service, String::new()).await?,
    }
    Ok(Exit::Done)
}

async fn create(create: spec::Create, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let waiting = create.waiting;
    let spec = create.spec()?;
    let place = format!("service {}", spec.name);
    let request = CreateServiceRequest {
        request_id: text::new_id().to_vec(),
        service_id: text::new_id().to_vec(),
        spec: Some(spec.clone()),
    };
    let mut connection = app.connect()?;
    let answer = connection
        .change(&place, async |mut c| c.create_service(request.clone()).await)
        .await?;
    // Before the wait: who stops waiting has the id.
    app.print(&format!("{}\n", text::id(&answer.id)))?;
    wait_for(app, &mut connection, &[spec.name], waiting).await
}

/// Prints what was changed, and waits for it.
async fn settle(
    app: &mut App<'_>,
    connection: &mut Connection,
    names: &[String],
    waiting: Waiting,
) -> Result<Exit, Refusal> {
    for name in names {
        app.print(&format!("{name}\n"))?;
    }
    wait_for(app, connection, names, waiting).await
}

async fn wait_for(
    app: &mut App<'_>,
    connection: &mut Connection,
    names: &[String],
    waiting: Waiting,
) -> Result<Exit, Refusal> {
    if waiting.detach {
        return Ok(Exit::Done);
    }
    let place = format!("service {}", names.join(", "));
    let first = names.first().map_or("", String::as_str);
    let help =
        format!("the cluster goes on: 'bulkhead service ps {first}' shows how far it is, 'explain' why");
    let mut progress = app.progress();
    let all = async {
        for name in names {
            convergence::wait(connection, name, &mut progress).await?;
        }
        Ok(Exit::Done)
    };
    wait::bounded(waiting.patience, &place, &help, all).await
}

/// Changes a service's spec as it is now; answers its name. The cluster itself writes to a service while it updates,
/// so a change that lost the race is made again on top.
async fn apply(
    connection: &mut Connection,
    selector: &str,
    change: &dyn Fn(&mut ServiceSpec) -> Result<(), Refusal>,
) -> Result<String, Refusal> {
    let place = format!("service {selector}");
    let mut tries = 0;
    loop {
        let service = one(connection, selector).await?.service.unwrap_or_default();
        let mut spec = newest(&service.versions);
        change(&mut spec)?;
        let name = spec.name.clone();
        let request = UpdateServiceRequest {
            request_id: text::new_id().to_vec(),
            selector: text::id(&service.id),
            spec: Some(spec),
            version: service.meta.as_ref().map_or(0, |m| m.version),
        };
        let answer = connection
            .change(&place, async |mut c| c.update_service(request.clone()).await)
            .await;
        tries += 1;
        match answer {
            Ok(_) => return Ok(name),
            Err(refusal) if refusal.code() == Code::Conflict && tries < REBASES => {}
            Err(refusal) => return Err(refusal),
        }
    }
}

fn newest(versions: &[bulkhead_proto::wire::ServiceVersion]) -> ServiceSpec {
    versions.last().and_then(|v| v.spec.clone()).unwrap_or_default()
}

async fn rm(app: &mut App<'_>, services: Vec<String>) -> Result<(), Refusal> {
    let mut connection = app.connect()?;
    for selector in services {
        let place = format!("service {selector}");
        let summary = one(&mut connection, &selector).await?;
        let request = removal(&summary.service.unwrap_or_default().id);
        let answer = connection
            .change(&place, async |mut c| c.remove_service(request.clone()).await)
            .await?;
        app.print(&format!("{}\n", text::id(&answer.id)))?;
    }
    Ok(())
}

/// The one service that a selector names.
pub(crate) async fn one(connection: &mut Connection, selector: &str) -> Result<ServiceSummary, Refusal> {
    connection::one!(connection, "service", list_services, services, selector)
}

async fn ls(app: &mut App<'_>, filters: &Filters) -> Result<(), Refusal> {
    let mut connection = app.connect()?;
    let services = pages!(
        connection,
        "services",
        list_services,
        ListRequest::default(),
        services
    );
    let row = |summary: &ServiceSummary| {
        let service = summary.service.clone().unwrap_or_default();
        let spec = newest(&service.versions);
        let id = text::id(&service.id);
        Row {
            cells: vec![
                app.id_cell(&id),
                spec.name.clone(),
                format!("{}/{}", summary.running, summary.desired),
                spec.image_name.clone(),
                update_state(summary).into(),
                summary.urls.join(" "),
            ],
            id,
            json: json(summary),
        }
    };
    let listing = Listing {
        headers: &["ID", "NAME", "REPLICAS", "IMAGE", "UPDATE", "URLS"],
        keys: &["id", "name", "image", "update"],
        rows: services.iter().map(row).collect(),
    };
    app.list(listing, filters)
}

fn update_state(summary: &ServiceSummary) -> &'static str {
    let update = summary.service.as_ref().and_then(|s| s.update.as_ref());
    match update.map(|u| u.state()).unwrap_or_default() {
        UpdateState::Unspecified => "-",
        UpdateState::Updating => "updating",
        UpdateState::Paused => "paused",
        UpdateState::Completed => "completed",
    }
}

/// A service as scripts read it.
fn json(summary: &ServiceSummary) -> Value {
    let service = summary.service.clone().unwrap_or_default();
    let meta = service.meta.clone().unwrap_or_default();
    let spec = newest(&service.versions);
    let update = service.update.clone().unwrap_or_default();
    json!({
        "id": text::id(&service.id),
        "name": spec.name,
        "image": spec.image_name,
        "running": summary.running,
        "desired": summary.desired,
        "urls": summary.urls,
        "labels": text::labels(&spec.labels),
        "update": update_state(summary),
        "update_message": update.message,
        "update_since": text::time(update.since),
        "version": meta.version,
        "spec_version": service.versions.last().map_or(0, |v| v.number),
        "spec": spec_json(&spec),
        "created_at": text::time(meta.created_at),
        "updated_at": text::time(meta.updated_at),
        "updated_by": meta.last_actor,
    })
}
