//! `context`: which cluster is meant.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use crate::app::App;
use crate::context::{self, Context};
use crate::output::{Filters, Listing, Row, text};
use crate::refusal::{Exit, Refusal};

/// What can be done with contexts.
#[derive(Debug, Subcommand)]
pub(crate) enum ContextVerb {
    /// Lists the contexts
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        filters: Filters,
    },
    /// Chooses the context that is meant where none is named
    Use {
        /// The context
        #[arg(value_parser = context::name)]
        name: String,
    },
    /// Makes a context of an operator's key file
    Import {
        /// The context
        #[arg(value_parser = context::name)]
        name: String,
        /// The file that 'bulkhead operator issue -o' wrote
        file: PathBuf,
    },
    /// Removes contexts, their keys with them
    #[command(visible_alias = "remove")]
    Rm {
        /// The contexts
        #[arg(required = true, value_name = "NAME", value_parser = context::name)]
        names: Vec<String>,
    },
}

pub(crate) fn run(verb: ContextVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let contexts = app.contexts();
    match verb {
        ContextVerb::Ls { filters } => {
            let current = contexts.current();
            let now = text::now_ms();
            let mut rows = Vec::new();
            for name in contexts.names()? {
                let context = contexts.find(Some(&name))?;
                rows.push(row(&context, current.as_deref() == Some(&name), now));
            }
            let listing = Listing {
                headers: &["NAME", "CURRENT", "CLUSTER", "MANAGERS", "CERTIFICATE ENDS"],
                keys: &["id", "name", "current", "cluster_id"],
                rows,
            };
            app.list(listing, &filters)?;
        }
        ContextVerb::Use { name } => {
            contexts.select(&name)?;
            app.print(&format!("{name}\n"))?;
        }
        ContextVerb::Import { name, file } => {
            let context = contexts.create(&name)?;
            if let Err(refusal) = context.import(&file) {
                // The folder was made for this key alone.
                let _ = contexts.remove(&name);
                return Err(refusal);
            }
            app.print(&format!("{name}\n"))?;
        }
        ContextVerb::Rm { names } => {
            app.confirm(&format!("Remove {}, with the key?", names.join(", ")))?;
            for name in names {
                contexts.remove(&name)?;
                app.print(&format!("{name}\n"))?;
            }
        }
    }
    Ok(Exit::Done)
}

/// A context whose key cannot be read is listed all the same: it is the one to remove.
fn row(context: &Context, current: bool, now: i64) -> Row {
    let managers = context.managers().unwrap_or_default();
    let subject = context.subject();
    let (cluster, ends) = match &subject {
        Ok((cluster, ends)) => (cluster.to_string(), *ends),
        Err(_) => (String::new(), 0),
    };
    Row {
        id: context.name.clone(),
        cells: vec![
            context.name.clone(),
            if current { "*" } else { "" }.into(),
            text::short(&cluster),
            managers.join(" "),
            text::distance(ends, now),
        ],
        json: json!({
            "id": context.name, "name": context.name, "current": current, "cluster_id": cluster,
            "managers": managers, "certificate_not_after": text::time(ends),
        }),
    }
}
