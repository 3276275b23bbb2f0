//! `operator`: who may command the cluster. A key never crosses the wire: each is made where it is used, or by the
//! operator who hands it on.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{IssueOperatorRequest, ListRequest, Node};
use clap::Subcommand;
use serde_json::json;

use crate::app::App;
use crate::cluster::{self, new_key, read_ticket};
use crate::connection::{one, pages, removal};
use crate::context;
use crate::key;
use crate::new_file::{claim, give_up};
use crate::output::{Filters, Listing, Row, text};
use crate::quantity;
use crate::refusal::{Code, Exit, Refusal};

/// What can be done with operators.
#[derive(Debug, Subcommand)]
pub(crate) enum OperatorVerb {
    /// Makes a key and certificate for another operator
    Issue {
        /// The operator's name
        name: String,
        /// Writes a key file to hand on, instead of a context of that name
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// How long the certificate is valid
        #[arg(long, value_name = "DURATION", default_value = "30d", value_parser = validity)]
        ttl: Duration,
    },
    /// Becomes an operator with a ticket, and makes a context of it
    Join {
        /// The file with the ticket; '-' reads it from stdin. (--ticket TICKET works, with a warning: others can read it there)
        #[arg(long, value_name = "FILE")]
        ticket_file: PathBuf,
        /// Managers of the cluster, HOST:PORT
        #[arg(required = true, value_name = "ADDRESS", value_parser = cluster::advertise)]
        addresses: Vec<String>,
        /// Your name in the cluster [default: the user's]
        #[arg(long)]
        name: Option<String>,
    },
    /// Lists the operators
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        filters: Filters,
    },
    /// Takes operators their right, for ever
    #[command(visible_alias = "rm")]
    Revoke {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "OPERATOR")]
        operators: Vec<String>,
    },
}

fn validity(text: &str) -> Result<Duration, String> {
    let ttl = quantity::duration(text).map_err(|e| e.one_line())?;
    if ttl < Duration::from_secs(60) || ttl > limits::NODE_CERTIFICATE_VALIDITY {
        return Err(format!(
            "from 1m to {}",
            text::rough(limits::NODE_CERTIFICATE_VALIDITY)
        ));
    }
    Ok(ttl)
}

pub(crate) async fn run(verb: OperatorVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        OperatorVerb::Issue { name, output, ttl } => issue(app, name, output, ttl).await?,
        OperatorVerb::Join {
            ticket_file,
            addresses,
            name,
        } => {
            let ticket = read_ticket(&ticket_file)?;
            let context_name = app
                .global
                .context
                .clone()
                .unwrap_or_else(|| context::DEFAULT.into());
            let contexts = app.contexts();
            let context = contexts.create(&context_name)?;
            let name = name.unwrap_or_else(|| app.environment.user.clone());
            let joined = context.enrol(&ticket, addresses, name, &mut app.progress()).await;
            if let Err(refusal) = joined {
                // The folder was made for this key alone.
                let _ = contexts.remove(&context_name);
                return Err(refusal);
            }
            contexts.select(&context_name)?;
            app.print(&format!("{context_name}\n"))?;
        }
        OperatorVerb::Ls { filters } => ls(app, &filters).await?,
        OperatorVerb::Revoke { operators } => {
            app.confirm(&format!("Revoke {}?", operators.join(", ")))?;
            let mut connection = app.connect()?;
            for selector in operators {
                let place = format!("operator {selector}");
                let operator: Node = one!(connection, "operator", list_operators, nodes, &selector)?;
                let request = removal(&operator.id);
                let answer = connection
                    .change(&place, async |mut c| c.revoke_operator(request.clone()).await)
                    .await?;
                app.print(&format!("{}\n", text::id(&answer.id)))?;
            }
        }
    }
    Ok(Exit::Done)
}

async fn issue(
    app: &mut App<'_>,
    name: String,
    output: Option<PathBuf>,
    ttl: Duration,
) -> Result<(), Refusal> {
    let (new, csr) = new_key()?;
    let contexts = app.contexts();
    let mut connection = app.connect()?;
    // What is to be written is made sure of first: an operator whose key is lost would stay listed.
    let target = match &output {
        Some(path) => {
            claim(path)?;
            None
        }
        None => {
            let valid = context::name(&name)
                .map_err(|reason| Refusal::new(Code::BadField, "name", reason, "or write a file with -o"))?;
            Some(contexts.create(&valid)?)
        }
    };
    let place = format!("operator {name}");
    let request = IssueOperatorRequest {
        request_id: text::new_id().to_vec(),
        node_id: text::new_id().to_vec(),
        name: name.clone(),
        csr,
        validity_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
    };
    let answer = connection
        .change_signed(&place, async |mut c| c.issue_operator(request.clone()).await)
        .await;
    let answer = match (answer, &target) {
        (Ok(answer), _) => answer,
        (Err(refusal), target) => {
            // Folder and file were made for this key alone.
            if let Some(made) = target {
                let _ = contexts.remove(&made.name);
            }
            if let Some(path) = &output {
                give_up(path);
            }
            return Err(refusal);
        }
    };
    match (&target, &output) {
        (Some(context), _) => {
            context.keep(new, &answer)?;
            app.say(&format!("the key is in the context '{}'", context.name));
        }
        (None, Some(path)) => {
            key::save(path, new, &answer)?;
            app.say(&format!(
                "hand the file over on a safe way; its owner runs: bulkhead context import NAME {}",
                path.display()
            ));
        }
        (None, None) => {}
    }
    app.print(&format!("{}\n", text::id(&answer.node_id)))
}

async fn ls(app: &mut App<'_>, filters: &Filters) -> Result<(), Refusal> {
    let mut connection = app.connect()?;
    let operators = pages!(
        connection,
        "operators",
        list_operators,
        ListRequest::default(),
        nodes
    );
    let now = text::now_ms();
    let row = |node: &Node| {
        let id = text::id(&node.id);
        let ends = node.keys.last().map_or(0, |key| key.not_after);
        Row {
            cells: vec![app.id_cell(&id), node.name.clone(), text::distance(ends, now)],
            json: json!({
                "id": id, "name": node.name, "certificate_not_after": text::time(ends),
                "created_at": text::time(node.meta.as_ref().map_or(0, |m| m.created_at)),
            }),
            id,
        }
    };
    let listing = Listing {
        headers: &["ID", "NAME", "CERTIFICATE ENDS"],
        keys: &["id", "name"],
        rows: operators.iter().map(row).collect(),
    };
    app.list(listing, filters)
}
