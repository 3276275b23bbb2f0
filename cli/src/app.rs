//! What every verb is given: the choices on the line, the surroundings, and where to write.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use crate::connection::Connection;
use crate::context::{Contexts, name as context_name};
use crate::environment::Environment;
use crate::output::{self, Filters, Format, Listing, Progress, ProgressKind, Style};
use crate::refusal::{Code, Refusal};

/// Flags that every verb takes, anywhere on the line.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// The cluster that is meant, one of 'bulkhead context ls'
    #[arg(long, global = true, value_name = "NAME", env = "BULKHEAD_CONTEXT", value_parser = context_name)]
    pub(crate) context: Option<String>,
    /// The local socket of a manager or worker program, instead of a context
    #[arg(long, global = true, value_name = "PATH", env = "BULKHEAD_SOCKET")]
    pub(crate) socket: Option<PathBuf>,
    /// How results are printed; lists are tables, inspected objects JSON unless on a terminal
    #[arg(long, global = true, value_enum)]
    pub(crate) format: Option<Format>,
    /// Prints ids alone
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Answers yes to a question
    #[arg(short, long, global = true)]
    pub(crate) yes: bool,
    /// How progress is shown on stderr
    #[arg(long, global = true, value_enum, default_value_t)]
    pub(crate) progress: ProgressKind,
    /// Shows ids whole (nothing else is ever cut)
    #[arg(long, global = true)]
    pub(crate) no_trunc: bool,
    /// Shows ids instead of names
    #[arg(long, global = true)]
    pub(crate) no_resolve: bool,
    /// Shows inspected objects for people
    #[arg(long, global = true)]
    pub(crate) pretty: bool,
}

/// One run of the command.
pub(crate) struct App<'a> {
    /// The choices on the line.
    pub(crate) global: Global,
    /// The surroundings.
    pub(crate) environment: Environment,
    /// Results.
    pub(crate) out: &'a mut dyn Write,
    /// Progress and refusals.
    pub(crate) err: &'a mut dyn Write,
}

impl std::fmt::Debug for App<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App")
            .field("global", &self.global)
            .finish_non_exhaustive()
    }
}

impl App<'_> {
    /// The operator's contexts.
    pub(crate) fn contexts(&self) -> Contexts {
        Contexts::under(&self.environment.config)
    }

    /// A conversation with the cluster that is meant.
    pub(crate) fn connect(&self) -> Result<Connection, Refusal> {
        match &self.global.socket {
            Some(path) => Connection::to_socket(path),
            None => Connection::through(self.contexts().find(self.global.context.as_deref())?),
        }
    }

    /// A conversation with the program behind `--socket`.
    pub(crate) fn program(&self) -> Result<Connection, Refusal> {
        let path = self.global.socket.as_ref().ok_or_else(|| {
            let help = "name the socket of a program on this machine: --socket DIR/manager.sock, \
                        or DIR/worker/worker.sock of a worker";
            Refusal::new(
                Code::BadField,
                "--socket",
                "this command talks to one program",
                help,
            )
        })?;
        Connection::to_socket(path)
    }

    /// Progress to stderr.
    pub(crate) fn progress(&mut self) -> Progress<'_> {
        Progress::new(
            self.global.progress,
            self.environment.stderr_terminal,
            &mut *self.err,
        )
    }

    /// Prints a result as it stands.
    pub(crate) fn print(&mut self, text: &str) -> Result<(), Refusal> {
        output::write(self.out, text)
    }

    /// Says something beside the result.
    pub(crate) fn say(&mut self, text: &str) {
        if self.global.progress != ProgressKind::None {
            // What cannot be said beside the result is no reason to fail.
            let _ = writeln!(self.err, "{text}");
        }
    }

    /// Prints a list.
    pub(crate) fn list(&mut self, listing: Listing, filters: &Filters) -> Result<(), Refusal> {
        let text = output::listing(listing, filters, self.style())?;
        self.print(&text)
    }

    /// Prints inspected objects.
    pub(crate) fn inspect(&mut self, values: &[Value]) -> Result<(), Refusal> {
        let text = output::documents(values, self.style());
        self.print(&text)
    }

    /// An id as a table shows it.
    pub(crate) fn id_cell(&self, id: &str) -> String {
        if self.global.no_trunc {
            id.to_owned()
        } else {
            output::text::short(id)
        }
    }

    /// Asks before something is destroyed; without a terminal only `--yes` is a yes.
    pub(crate) fn confirm(&mut self, question: &str) -> Result<(), Refusal> {
        if self.global.yes {
            return Ok(());
        }
        let refuse = |reason: &str| Err(Refusal::new(Code::NotConfirmed, question, reason, "say --yes"));
        if !self.environment.stdin_terminal {
            return refuse("nobody can be asked here");
        }
        let _ = write!(self.err, "{question} [y/N] ").and_then(|()| self.err.flush());
        let mut answer = String::new();
        match std::io::stdin().read_line(&mut answer) {
            Ok(_) if matches!(answer.trim(), "y" | "yes") => Ok(()),
            _ => refuse("the answer was not yes"),
        }
    }

    fn style(&self) -> Style {
        Style {
            format: self.global.format,
            quiet: self.global.quiet,
            pretty: self.global.pretty,
            terminal: self.environment.stdout_terminal,
        }
    }
}
