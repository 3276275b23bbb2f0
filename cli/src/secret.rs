//! `secret`: values that only the nodes of the tasks that need them ever see.

use std::io::Read;
use std::path::PathBuf;

use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    CreateSecretRequest, ExposedSecret, GetExposureRequest, Label, ListRequest, Secret,
};
use clap::Subcommand;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::app::App;
use crate::connection::{Connection, one, pages, removal};
use crate::field;
use crate::output::{Filters, Listing, Row, text};
use crate::refusal::{Code, Exit, Refusal};

/// What can be done with secrets.
#[derive(Debug, Subcommand)]
pub(crate) enum SecretVerb {
    /// Stores a secret; its value never stands on a command line
    Create {
        /// Its name, and that of its file under /run/secrets
        #[arg(value_parser = name)]
        name: String,
        /// The file with the value; '-' reads it from stdin
        file: PathBuf,
        /// A label, key=value
        #[arg(short, long, value_name = "KEY=VALUE", value_parser = field::label_value)]
        label: Vec<Label>,
    },
    /// Lists the secrets, without their values
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        filters: Filters,
    },
    /// Shows secrets, without their values
    Inspect {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "SECRET")]
        secrets: Vec<String>,
    },
    /// Shows which nodes hold a secret, since when and by which rule, and which did
    Trace {
        /// Name, id or unique prefix of an id
        secret: String,
        #[command(flatten)]
        filters: Filters,
    },
    /// Removes secrets that no service uses
    #[command(visible_alias = "remove")]
    Rm {
        /// Names, ids or unique prefixes of ids
        #[arg(required = true, value_name = "SECRET")]
        secrets: Vec<String>,
    },
}

pub(crate) fn name(text: &str) -> Result<String, String> {
    field::object_name(text).map_err(|e| e.one_line())
}

/// Which nodes hold which secrets.
pub(crate) async fn exposure(
    connection: &mut Connection,
    place: &str,
    request: GetExposureRequest,
) -> Result<Vec<ExposedSecret>, Refusal> {
    let answer = connection
        .ask(place, async |mut c| c.get_exposure(request.clone()).await)
        .await?;
    Ok(answer.secrets)
}

fn rule(it: &ExposedSecret) -> String {
    format!(
        "service {name} uses it, and task {name}.{} was assigned there",
        it.slot,
        name = it.service_name
    )
}

/// One node's hold of one secret, as scripts read it.
pub(crate) fn exposed_json(it: &ExposedSecret) -> Value {
    json!({
        "secret": it.secret_name, "secret_id": text::id(&it.secret_id),
        "node": it.node_name, "node_id": text::id(&it.node_id),
        "service": it.service_name, "task_id": text::id(&it.task_id),
        "since": text::time(it.since), "until": (it.until != 0).then(|| text::time(it.until)),
        "now": it.until == 0, "rule": rule(it),
    })
}

pub(crate) async fn run(verb: SecretVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    match verb {
        SecretVerb::Create { name, file, label } => {
            let value = if file.as_os_str() == "-" {
                value(&mut std::io::stdin().lock(), "stdin")?
            } else {
                let place = file.display().to_string();
                let mut open = std::fs::File::open(&file)
                    .map_err(|e| Refusal::new(Code::Unreadable, &place, e.to_string(), "check the path"))?;
                value(&mut open, &place)?
            };
            let place = format!("secret {name}");
            let (request_id, secret_id) = (text::new_id().to_vec(), text::new_id().to_vec());
            let answer = app
                .connect()?
                .change(&place, async |mut c| {
                    c.create_secret(CreateSecretRequest {
                        request_id: request_id.clone(),
                        secret_id: secret_id.clone(),
                        name: name.clone(),
                        value: value.to_vec(),
                        labels: label.clone(),
                    })
                    .await
                })
                .await?;
            app.print(&format!("{}\n", text::id(&answer.id)))?;
        }
        SecretVerb::Ls { filters } => {
            let mut connection = app.connect()?;
            let secrets = pages!(
                connection,
                "secrets",
                list_secrets,
                ListRequest::default(),
                secrets
            );
            let now = text::now_ms();
            let row = |secret: &Secret| {
                let id = text::id(&secret.id);
                let created = secret.meta.as_ref().map_or(0, |m| m.created_at);
                Row {
                    cells: vec![
                        app.id_cell(&id),
                        secret.name.clone(),
                        text::bytes(secret.size.into()),
                        text::distance(created, now),
                    ],
                    id,
                    json: json(secret),
                }
            };
            let listing = Listing {
                headers: &["ID", "NAME", "SIZE", "CREATED"],
                keys: &["id", "name"],
                rows: secrets.iter().map(row).collect(),
            };
            app.list(listing, &filters)?;
        }
        SecretVerb::Trace { secret, filters } => {
            let request = GetExposureRequest {
                secret: secret.clone(),
                ..Default::default()
            };
            let exposed = exposure(&mut app.connect()?, &format!("secret {secret}"), request).await?;
            let now = text::now_ms();
            let row = |it: &ExposedSecret| Row {
                cells: vec![
                    it.node_name.clone(),
                    text::distance(it.since, now),
                    match it.until {
                        0 => "holds it now".into(),
                        until => format!("until {}", text::distance(until, now)),
                    },
                    rule(it),
                ],
                id: text::id(&it.node_id),
                json: exposed_json(it),
            };
            let listing = Listing {
                headers: &["NODE", "SINCE", "NOW", "RULE"],
                keys: &["node", "service", "now"],
                rows: exposed.iter().map(row).collect(),
            };
            app.list(listing, &filters)?;
            app.say("managers hold every secret, sealed; older tasks than a service's history are not known");
        }
        SecretVerb::Inspect { secrets } => {
            let mut connection = app.connect()?;
            let mut found = Vec::new();
            for selector in secrets {
                found.push(json(&one!(
                    connection,
                    "secret",
                    list_secrets,
                    secrets,
                    &selector
                )?));
            }
            app.inspect(&found)?;
        }
        SecretVerb::Rm { secrets } => {
            let mut connection = app.connect()?;
            for selector in secrets {
                let place = format!("secret {selector}");
                let secret: Secret = one!(connection, "secret", list_secrets, secrets, &selector)?;
                let request = removal(&secret.id);
                let answer = connection
                    .change(&place, async |mut c| c.remove_secret(request.clone()).await)
                    .await?;
                app.print(&format!("{}\n", text::id(&answer.id)))?;
            }
        }
    }
    Ok(Exit::Done)
}

/// Reads a secret's value, taken as it stands.
fn value(from: &mut dyn Read, place: &str) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    // Room for all of it at once: a buffer that grows leaves copies behind that nobody wipes.
    let mut bytes = Zeroizing::new(Vec::with_capacity(limits::SECRET_BYTES + 1));
    from.take(limits::SECRET_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Refusal::new(Code::Unreadable, place, e.to_string(), "check the path"))?;
    if bytes.is_empty() {
        let help = "pipe the value in, like: bulkhead secret create NAME - < FILE";
        return Err(Refusal::new(Code::BadField, place, "it is empty", help));
    }
    if bytes.len() > limits::SECRET_BYTES {
        let reason = format!("a secret has at most {} bytes", limits::SECRET_BYTES);
        return Err(Refusal::new(
            Code::OverLimit,
            place,
            reason,
            "put large data into the image",
        ));
    }
    Ok(bytes)
}

fn json(secret: &Secret) -> Value {
    let meta = secret.meta.clone().unwrap_or_default();
    json!({
        "id": text::id(&secret.id),
        "name": secret.name,
        "size": secret.size,
        "labels": text::labels(&secret.labels),
        "created_at": text::time(meta.created_at),
        "updated_by": meta.last_actor,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_taken_whole_and_within_its_limit() {
        assert_eq!(
            value(&mut &b"s3cret\n"[..], "x").expect("short").as_slice(),
            b"s3cret\n"
        );
        let longest = vec![b'x'; limits::SECRET_BYTES];
        assert!(value(&mut longest.as_slice(), "x").is_ok());
        let longer = vec![b'x'; limits::SECRET_BYTES + 1];
        let code = |bytes: &[u8]| value(&mut &*bytes, "x").map(|_| ()).map_err(|e| e.code());
        assert_eq!(code(&longer), Err(Code::OverLimit));
        assert_eq!(code(b""), Err(Code::BadField));
    }
}
