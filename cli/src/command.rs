//! The tree of verbs.

use std::io::Write;

use bulkhead_proto::limits;
use clap::{CommandFactory, Parser, Subcommand};

use crate::app::{App, Global};
use crate::environment::Environment;
use crate::field::environment_entry;
use crate::output::{Format, document};
use crate::refusal::{Code, Exit, Refusal};
use crate::{
    audit, cluster, context_verb, dev, events, health, image, node, operator, secret, service, task,
};

/// The `bulkhead` command line.
#[derive(Debug, Parser)]
#[command(
    name = "bulkhead",
    version,
    about = "Commands a Bulkhead cluster",
    after_help = "'bulkhead help COMMAND' says more; 'bulkhead help exit-codes' and 'help errors' list those.",
    disable_help_subcommand = true
)]
pub struct CommandLine {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Makes, joins, leaves and shows the cluster
    #[command(subcommand)]
    Cluster(cluster::ClusterVerb),
    /// Lists and changes the nodes
    #[command(subcommand)]
    Node(node::NodeVerb),
    /// Creates, changes and watches services
    #[command(subcommand)]
    Service(service::ServiceVerb),
    /// Lists and explains the tasks of services
    #[command(subcommand)]
    Task(task::TaskVerb),
    /// Stores secrets
    #[command(subcommand)]
    Secret(secret::SecretVerb),
    /// Makes, checks and stores images
    #[command(subcommand)]
    Image(image::ImageVerb),
    /// Lets others command the cluster
    #[command(subcommand)]
    Operator(operator::OperatorVerb),
    /// Chooses the cluster that is meant
    #[command(subcommand)]
    Context(context_verb::ContextVerb),
    /// Runs a whole cluster on this machine
    Dev(dev::Dev),
    /// Prints what changes in the cluster
    Events(events::Events),
    /// Prints who did what to identities, secrets and keys, and proves that nobody rewrote it
    Audit(audit::Audit),
    /// Says whether the program behind --socket is ready
    #[command(hide = true)]
    Health(health::Health),
    /// Prints the version
    Version,
    /// Prints a completion script
    Completion {
        /// The shell that it is for
        shell: clap_complete::Shell,
    },
    /// Prints the manual page of a command
    Man {
        /// The command, like: image pack
        command: Vec<String>,
    },
    /// Prints the help of a command or a topic (exit-codes, errors)
    Help {
        /// The command or topic
        topic: Vec<String>,
    },
}

/// Does what the line says: results go to `out`, progress to `err`.
pub fn run(
    line: CommandLine,
    environment: Environment,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<Exit, Refusal> {
    let mut app = App {
        global: line.global,
        environment,
        out,
        err,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| {
            Refusal::new(
                Code::Internal,
                "runtime",
                e.to_string(),
                "are there too many open files?",
            )
        })?;
    runtime.block_on(Box::pin(dispatch(line.verb, &mut app)))
}

async fn dispatch(verb: Verb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let text = match verb {
        Verb::Cluster(verb) => return cluster::run(verb, app).await,
        Verb::Node(verb) => return node::run(verb, app).await,
        Verb::Service(verb) => return service::run(verb, app).await,
        Verb::Task(verb) => return task::run(verb, app).await,
        Verb::Secret(verb) => return secret::run(verb, app).await,
        Verb::Image(verb) => return image::run(verb, app).await,
        Verb::Operator(verb) => return operator::run(verb, app).await,
        Verb::Context(verb) => return context_verb::run(verb, app),
        Verb::Dev(options) => return dev::run(options, app).await,
        Verb::Events(options) => return events::run(options, app).await,
        Verb::Audit(options) => return audit::run(options, app).await,
        Verb::Health(options) => return health::run(options, app).await,
        Verb::Version => version(app.global.format.unwrap_or(Format::Table)),
        Verb::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut CommandLine::command(), "bulkhead", &mut script);
            String::from_utf8_lossy(&script).into_owned()
        }
        Verb::Man { command } => manual(&command)?,
        Verb::Help { topic } => help(&topic)?,
    };
    app.print(&text)?;
    Ok(Exit::Done)
}

fn version(format: Format) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match format {
        Format::Table => format!("bulkhead {version}\n"),
        Format::Json | Format::Jsonl => document(&serde_json::json!({ "version": version }), format),
    }
}

fn manual(path: &[String]) -> Result<String, Refusal> {
    let refuse = |e: std::io::Error| Refusal::new(Code::Unwritable, "manual", e.to_string(), "try again");
    let mut page = Vec::new();
    clap_mangen::Man::new(find(path)?)
        .render(&mut page)
        .map_err(refuse)?;
    Ok(String::from_utf8_lossy(&page).into_owned())
}

fn help(topic: &[String]) -> Result<String, Refusal> {
    match topic {
        [one] if one == "exit-codes" => {
            let row = |exit: &Exit| format!("{:>4}  {}\n", *exit as u8, exit.meaning());
            Ok(Exit::ALL.iter().map(row).collect())
        }
        [one] if one == "errors" => {
            let row = |code: &Code| {
                format!(
                    "{}  exit {}  {}\n",
                    code.as_str(),
                    code.exit() as u8,
                    code.title()
                )
            };
            Ok(Code::ALL.iter().map(row).collect())
        }
        path => Ok(find(path)?.render_long_help().to_string()),
    }
}

/// The command at this path, named whole, for its help and manual page.
fn find(path: &[String]) -> Result<clap::Command, Refusal> {
    let mut command = CommandLine::command();
    command.build();
    for word in path {
        command = command.find_subcommand(word).cloned().ok_or_else(|| {
            let reason = format!("there is no '{}'", path.join(" "));
            Refusal::new(
                Code::UnknownTopic,
                "help",
                reason,
                "'bulkhead help' lists the commands",
            )
        })?;
    }
    Ok(command)
}

pub(crate) fn variable(text: &str) -> Result<String, String> {
    environment_entry(text).map_err(|e| e.one_line())
}

pub(crate) fn image_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/:".contains(c);
    let starts = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && text.len() <= limits::IMAGE_REFERENCE_CHARS && text.chars().all(plain) {
        return Ok(text.to_owned());
    }
    Err("write NAME:TAG of letters, digits, '.', '_', '-' and '/', at most 255".into())
}

pub(crate) fn numeric_user(text: &str) -> Result<String, String> {
    // Only ids that the task's own range of 65,536 can hold.
    let id = |part: &str| part.bytes().all(|b| b.is_ascii_digit()) && part.parse::<u16>().is_ok();
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    if id(user) && id(group) {
        return Ok(text.to_owned());
    }
    Err("write uid or uid:gid, numbers from 0 to 65535".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(words: &[&str]) -> Result<String, Exit> {
        let mut out = Vec::new();
        let line = CommandLine::try_parse_from(words).map_err(|_| Exit::Usage)?;
        let environment = Environment {
            config: "/nonexistent".into(),
            user: String::new(),
            stdout_terminal: false,
            stderr_terminal: false,
            stdin_terminal: false,
        };
        run(line, environment, &mut out, &mut Vec::new()).map_err(|e| e.exit())?;
        Ok(String::from_utf8(out).expect("text"))
    }

    #[test]
    fn the_tree_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn help_topics_and_their_refusals() {
        let topic = output(&["bulkhead", "help", "exit-codes"]).expect("a topic");
        assert!(topic.contains("   7  cannot be placed"), "{topic}");
        assert!(
            output(&["bulkhead", "help", "image", "pack"])
                .expect("a verb")
                .contains("--entrypoint")
        );
        assert_eq!(output(&["bulkhead", "help", "nonsense"]), Err(Exit::NotFound));
        assert_eq!(output(&["bulkhead", "imgae"]), Err(Exit::Usage));
    }

    #[test]
    fn every_shell_gets_a_script_and_every_verb_a_page() {
        for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
            assert!(
                output(&["bulkhead", "completion", shell])
                    .expect(shell)
                    .contains("bulkhead")
            );
        }
        assert!(
            output(&["bulkhead", "man", "image", "pack"])
                .expect("a page")
                .contains(".TH")
        );
    }

    #[test]
    fn users_are_numbers_of_the_range() {
        for good in ["0", "65535", "1000:1000"] {
            assert!(numeric_user(good).is_ok(), "{good}");
        }
        for bad in ["", "root", "65536", "4294967296", "1:", ":1", "+1", "1:2:3"] {
            assert!(numeric_user(bad).is_err(), "{bad}");
        }
    }
}
