//! A ticket on the command line: taken, with a warning, and off the line before anything else is done.
//!
//! What stands on a command line every user of the machine can read, as long as the program runs. A program cannot
//! change its own line without unsafe code, so it starts itself again in the same process, with the ticket on stdin and
//! a line without it. What the shell's history keeps, and who looked in the moment before, no program can mend: so says
//! the warning.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use bulkhead_proto::limits;

/// How a ticket's text begins.
const TICKET: &[u8] = b"BULKHEAD-";
/// The flag that it is given with; without one, it is known by how it begins.
const FLAG: &str = "--ticket";

/// What is said to whoever does it.
const WARNING: &str = "warning: a ticket on the command line can be read by every user of this machine and stays in the \
                       shell's history; use --ticket-file FILE, or '-' and a pipe. It is off the line now.";

/// Starts this program again without the ticket, where one is on its line; else returns.
///
/// # Errors
/// Where it cannot be started again: then the ticket stands on the line, and nothing else must be done with it.
pub fn ticket(line: impl Iterator<Item = OsString>) -> io::Result<()> {
    let line: Vec<OsString> = line.collect();
    let Some(scrubbed) = without_ticket(&line) else {
        return Ok(());
    };
    // What cannot be said is no reason to leave the ticket where it stands.
    let _ = writeln!(io::stderr(), "{WARNING}");
    // A pipe holds far more than a ticket, so this write waits for nobody.
    let (reader, mut writer) = io::pipe()?;
    let ticket = scrubbed.ticket.as_bytes();
    writer.write_all(&ticket[..ticket.len().min(limits::TICKET_BYTES + 1)])?;
    drop(writer);
    let mut again = Command::new(std::env::current_exe()?);
    again.args(scrubbed.rest).stdin(Stdio::from(reader));
    if let Some(name) = line.first() {
        again.arg0(name);
    }
    Err(again.exec())
}

#[derive(Debug, PartialEq)]
struct Scrubbed<'a> {
    ticket: &'a OsStr,
    rest: Vec<OsString>,
}

/// The line of a join without its ticket, if one is on it.
fn without_ticket(line: &[OsString]) -> Option<Scrubbed<'_>> {
    let own = line.iter().position(|word| word == "--").unwrap_or(line.len());
    let noun = line[..own]
        .iter()
        .position(|word| word == "cluster" || word == "operator")?;
    line[noun..own].iter().find(|word| *word == "join")?;
    let (at, words, ticket) = (1..own).find_map(|at| {
        let word = line[at].as_os_str();
        if word == FLAG || (word == "--ticket-file" && line.get(at + 1).is_some_and(|next| is_ticket(next))) {
            return Some((at, 2, line.get(at + 1)?.as_os_str()));
        }
        if let Some(ticket) = word.as_bytes().strip_prefix(b"--ticket=") {
            return Some((at, 1, OsStr::from_bytes(ticket)));
        }
        is_ticket(word).then_some((at, 1, word))
    })?;
    let mut rest: Vec<OsString> = line[1..at].to_vec();
    rest.extend(["--ticket-file".into(), "-".into()]);
    rest.extend_from_slice(&line[at + words..]);
    Some(Scrubbed { ticket, rest })
}

fn is_ticket(word: &OsStr) -> bool {
    word.as_bytes().starts_with(TICKET)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, want: Option<(&str, &str)>) {
        let words = |text: &str| text.split_whitespace().map(OsString::from).collect::<Vec<_>>();
        let line = words(line);
        let want = want.map(|(ticket, rest)| (OsString::from(ticket), words(rest)));
        let got = without_ticket(&line).map(|it| (it.ticket.to_owned(), it.rest));
        assert_eq!(got, want);
    }

    #[test]
    fn a_ticket_is_taken_off_the_line_of_a_join() {
        const BARE: &str = "cluster join --ticket-file - m:1";
        check("b cluster join --ticket T m:1", Some(("T", BARE)));
        check("b cluster join --ticket=T m:1", Some(("T", BARE)));
        check(
            "b cluster join BULKHEAD-1-a-b m:1",
            Some(("BULKHEAD-1-a-b", BARE)),
        );
        check(
            "b cluster join --ticket-file BULKHEAD-1-a-b m:1",
            Some(("BULKHEAD-1-a-b", BARE)),
        );
        check(
            "b --context x operator -q join --ticket BULKHEAD-9 m:1 --name n",
            Some((
                "BULKHEAD-9",
                "--context x operator -q join --ticket-file - m:1 --name n",
            )),
        );
    }

    #[test]
    fn every_other_line_stays_as_it_is() {
        for line in [
            "b",
            "b cluster join --ticket-file ticket m:1",
            "b cluster join --ticket",
            "b service create --name s image -- cluster join --ticket T",
            "b secret create BULKHEAD-1-a-b -",
        ] {
            check(line, None);
        }
    }
}
