//! `cluster join`: each hop of joining as a line of a checklist.

use std::io::Read;
use std::path::{Path, PathBuf};

use bulkhead_identity::ticket::Ticket;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{JoinProgress, JoinRequest, Role, StepState};
use clap::Args;
use zeroize::Zeroizing;

use crate::app::App;
use crate::connection::Connection;
use crate::health;
use crate::output::text;
use crate::refusal::{Code, Exit, Refusal, from_status};

/// How the line of a hop that failed begins.
pub(crate) const FAILED: &str = "FAILED";

/// Flags of `cluster join`.
#[derive(Debug, Args)]
pub(crate) struct Join {
    /// The file with the ticket; '-' reads it from stdin. (--ticket TICKET works, with a warning: others can read it there)
    #[arg(long, value_name = "FILE")]
    ticket_file: PathBuf,
    /// Managers of the cluster, HOST:PORT
    #[arg(required = true, value_name = "ADDRESS", value_parser = super::advertise)]
    addresses: Vec<String>,
    /// IP:PORT that a joining manager listens on [default: 0.0.0.0:7443]
    #[arg(long, value_name = "ADDRESS", value_parser = super::listen)]
    listen: Option<String>,
    /// HOST:PORT at which the others reach a joining manager
    #[arg(long, value_name = "ADDRESS", value_parser = super::advertise)]
    advertise: Option<String>,
    /// The name that this node wishes [default: the host's]
    #[arg(long)]
    name: Option<String>,
}

pub(super) async fn run(options: Join, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let ticket = read_ticket(&options.ticket_file)?;
    let program = app.program()?;
    let before = health::status(&mut program.local()).await?;
    let (listen, advertise) = match before.role() {
        Role::Manager | Role::Standby => super::addresses(options.listen, options.advertise)?,
        Role::Worker | Role::Operator | Role::Unspecified => (String::new(), String::new()),
    };
    let request = JoinRequest {
        ticket: ticket.to_string(),
        addresses: options.addresses,
        listen,
        advertise,
        name: options.name.unwrap_or_default(),
    };
    let mut progress = app.progress();
    let node = follow(&program, request, |step, line| progress.set(step, line)).await?;
    app.print(&format!("{node}\n"))?;
    Ok(Exit::Done)
}

/// Has a program join, shows each hop, and answers the id of the node that it became.
pub(crate) async fn follow(
    program: &Connection,
    request: JoinRequest,
    mut show: impl FnMut(&str, &str),
) -> Result<String, Refusal> {
    let mut stream = program
        .local()
        .join(request)
        .await
        .map_err(|status| from_status(&status, "cluster join"))?
        .into_inner();
    let mut checklist = Checklist::default();
    loop {
        let step = tokio::select! {
            biased;
            _ = tokio::signal::ctrl_c() => {
                let help = "'bulkhead health --socket' shows whether the program joined";
                return Err(Refusal::new(Code::Interrupted, "cluster join", "the program goes on joining", help));
            }
            step = stream.message() => step.map_err(|status| from_status(&status, "cluster join"))?,
        };
        let Some(step) = step else { break };
        checklist.take(&step, &mut show);
    }
    checklist.joined()
}

/// Reads a ticket from a file or stdin, and checks that it is one before anybody is asked.
pub(crate) fn read_ticket(path: &Path) -> Result<Zeroizing<String>, Refusal> {
    let stdin = path.as_os_str() == "-";
    let place = if stdin {
        "stdin".to_owned()
    } else {
        path.display().to_string()
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(limits::TICKET_BYTES + 2));
    let read = if stdin {
        std::io::stdin()
            .lock()
            .take(limits::TICKET_BYTES as u64 + 1)
            .read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(limits::TICKET_BYTES as u64 + 1).read_to_end(&mut bytes))
    };
    read.map_err(|e| Refusal::new(Code::Unreadable, &place, e.to_string(), "check the path"))?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default().trim();
    if let Err(e) = text.parse::<Ticket>() {
        let help = "copy the whole ticket, as 'bulkhead cluster ticket create' printed it";
        return Err(Refusal::new(Code::BadTicket, place, e.to_string(), help));
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// The hops of joining, as they are reported.
#[derive(Debug, Default)]
pub(crate) struct Checklist {
    failed: Option<JoinProgress>,
    waits: bool,
    node: Vec<u8>,
}

impl Checklist {
    /// Shows a step.
    pub(crate) fn take(&mut self, step: &JoinProgress, show: &mut impl FnMut(&str, &str)) {
        let detail = match step.detail.as_str() {
            "" => String::new(),
            detail => format!(" ({detail})"),
        };
        let line = match step.state() {
            StepState::Unspecified => return,
            StepState::Started => "...".to_owned(),
            StepState::Done => format!("ok{detail}"),
            StepState::Failed => format!("{FAILED}{detail}"),
            StepState::Waiting => format!("waits {}", step.detail),
        };
        show(&step.step, &line);
        self.waits = step.state() == StepState::Waiting;
        if step.state() == StepState::Failed {
            self.failed = Some(step.clone());
        }
        if !step.node_id.is_empty() {
            self.node.clone_from(&step.node_id);
            self.failed = None;
        }
    }

    /// The id of the node that joined. A hop that failed at one address and went at the next is no failure.
    pub(crate) fn joined(self) -> Result<String, Refusal> {
        if !self.node.is_empty() {
            return Ok(text::id(&self.node));
        }
        if self.waits {
            let help = "once it runs again it goes on waiting by itself; 'bulkhead health --socket' shows it";
            let reason = "the program ended while it waited for approval";
            return Err(Refusal::new(
                Code::JoinFailed,
                "cluster join, step 'approval'",
                reason,
                help,
            ));
        }
        let failed = self.failed.unwrap_or_default();
        let place = match failed.step.as_str() {
            "" => "cluster join".to_owned(),
            step => format!("cluster join, step '{step}'"),
        };
        let or = |text: String, instead: &str| match text.is_empty() {
            true => instead.to_owned(),
            false => text,
        };
        Err(Refusal::new(
            Code::parse(&failed.code).unwrap_or(Code::JoinFailed),
            place,
            or(failed.detail, "the program stopped joining"),
            or(failed.hint, "the program's log says more"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Progress, ProgressKind};

    fn step(step: &str, state: StepState, detail: &str, node: &[u8]) -> JoinProgress {
        JoinProgress {
            step: step.into(),
            state: state.into(),
            detail: detail.into(),
            hint: "make a new ticket".into(),
            node_id: node.to_vec(),
            code: match state {
                StepState::Failed => Code::TicketExpired.as_str().into(),
                _ => String::new(),
            },
        }
    }

    fn joined(steps: &[JoinProgress]) -> (String, Result<String, Code>) {
        let mut out = Vec::new();
        let mut progress = Progress::new(ProgressKind::Plain, false, &mut out);
        let mut checklist = Checklist::default();
        for step in steps {
            checklist.take(step, &mut |step: &str, line: &str| progress.set(step, line));
        }
        let end = checklist.joined().map_err(|e| e.code());
        (String::from_utf8(out).expect("text"), end)
    }

    #[test]
    fn each_hop_is_a_line() {
        use StepState::{Done, Failed, Started};
        let (text, end) = joined(&[
            step("tcp", Started, "", &[]),
            step("tcp", Done, "2 ms", &[]),
            step("ticket", Failed, "it expired", &[]),
        ]);
        assert_eq!(text, "tcp: ...\ntcp: ok (2 ms)\nticket: FAILED (it expired)\n");
        assert_eq!(end, Err(Code::TicketExpired), "the code is that of the hop");
        let (_, end) = joined(&[
            step("tcp", Failed, "refused", &[]),
            step("stream", Done, "", &[0; 16]),
        ]);
        assert_eq!(end, Ok("a".repeat(26)));
        let (text, end) = joined(&[step(
            "approval",
            StepState::Waiting,
            "for 'bulkhead node approve n'",
            &[],
        )]);
        assert_eq!(text, "approval: waits for 'bulkhead node approve n'\n");
        assert_eq!(end, Err(Code::JoinFailed));
        assert_eq!(
            joined(&[]).1,
            Err(Code::JoinFailed),
            "a stream that ends early is no success"
        );
    }

    #[test]
    fn what_is_no_ticket_is_not_sent() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("t");
        std::fs::write(&path, "BULKHEAD-1-hunter2").expect("writable");
        let refused = read_ticket(&path).expect_err("too short");
        assert_eq!(refused.code(), Code::BadTicket);
        assert!(
            !refused.to_string().contains("hunter2"),
            "a mistyped ticket is mostly a real one"
        );
        std::fs::write(&path, vec![b'x'; 4096]).expect("writable");
        assert!(read_ticket(&path).is_err());
        assert_eq!(
            read_ticket(Path::new("/nonexistent")).expect_err("absent").code(),
            Code::Unreadable
        );
    }
}
