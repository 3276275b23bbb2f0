//! `audit --verify`: follows the chain from its first kept record, and compares its hashes with what each manager says and
//! with a head that was kept from before. All of it is computed here: no manager is asked whether the log is right.

use bulkhead_proto::audit::Head;
use bulkhead_proto::wire::{AuditRecord, ListAuditRequest};
use serde_json::{Value, json};

use crate::app::App;
use crate::connection::{Answered, Connection};
use crate::output::{Format, document};
use crate::refusal::{Code, Exit, Refusal};
use crate::wait::POLL;

/// The log goes on while it is read: it is read again so often before the command gives up.
const ROUNDS: usize = 5;
/// A file that holds a head is not longer.
const HEAD_BYTES: u64 = 4 << 10;

/// What is kept of the log.
#[derive(Debug, Default)]
pub(super) struct Log {
    /// What came before the first record that is kept.
    anchor: Head,
    pub(super) records: Vec<AuditRecord>,
}

/// A head that was kept from before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Earlier(Head);

/// Reads `--head`: the head itself, or a file that holds it.
pub(super) fn earlier(given: &str) -> Result<Earlier, String> {
    if let Ok(head) = given.parse() {
        return Ok(Earlier(head));
    }
    let say = |why: &dyn std::fmt::Display| {
        format!("it is no head like 42:3f9c…, and no file that holds one: {why}")
    };
    let size = std::fs::metadata(given).map_err(|error| say(&error))?.len();
    if size > HEAD_BYTES {
        return Err(say(&"the file is too long"));
    }
    let text = std::fs::read_to_string(given).map_err(|error| say(&error))?;
    text.trim()
        .parse()
        .map(Earlier)
        .map_err(|error: bulkhead_proto::audit::ParseHeadError| say(&error))
}

/// Reads the whole log.
pub(super) async fn fetch(connection: &mut Connection) -> Result<Log, Refusal> {
    for _ in 0..ROUNDS {
        if let Some(log) = read(connection).await? {
            return Ok(log);
        }
    }
    Err(Refusal::new(
        Code::Busy,
        "audit log",
        "its oldest records went faster than they could be read",
        "try again",
    ))
}

/// Nothing where the oldest records went while it was read.
async fn read(connection: &mut Connection) -> Result<Option<Log>, Refusal> {
    let mut log = Log::default();
    loop {
        let first = log.records.is_empty();
        let after = log.records.last().map_or(0, |it| it.sequence);
        let answer = connection
            .ask("audit log", async |mut c| {
                c.list_audit(ListAuditRequest { after }).await
            })
            .await?;
        let head = answer.head.as_ref().and_then(Head::from_wire);
        let anchor = answer.anchor.as_ref().and_then(Head::from_wire);
        let (Some(head), Some(anchor)) = (head, anchor) else {
            return Err(broken("the manager's answer names no head", ""));
        };
        if first {
            log.anchor = anchor;
        } else if anchor.sequence > after {
            return Ok(None);
        }
        if answer.records.is_empty() || answer.records.last().map(|it| it.sequence) >= Some(head.sequence) {
            log.records.extend(answer.records);
            return Ok(Some(log));
        }
        // Only forward: a manager that answers the same again and again must not hold this command for ever.
        if answer.records.first().map(|it| it.sequence) <= Some(after) {
            return Err(broken("the manager sent records that were not asked for", ""));
        }
        log.records.extend(answer.records);
    }
}

/// What a manager says of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Said {
    who: String,
    /// Or why it said nothing.
    head: Result<Head, String>,
}

/// How a manager stands to the log that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stand {
    /// Its head is a record of this log, or the one before it.
    Agrees(u64),
    /// It is ahead of what was read: the log must be read again.
    Ahead,
    /// Its head is older than what is kept.
    Behind(u64),
    Silent(String),
}

/// What was proved.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    anchor: Head,
    head: Head,
    managers: Vec<(String, Stand)>,
    earlier: Option<Head>,
}

impl Verdict {
    fn is_to_be_repeated(&self) -> bool {
        self.managers.iter().any(|(_, stand)| *stand == Stand::Ahead)
    }
}

pub(super) async fn run(
    connection: &mut Connection,
    earlier: Option<Earlier>,
    app: &mut App<'_>,
) -> Result<Exit, Refusal> {
    let earlier = earlier.map(|Earlier(head)| head);
    let mut round = 0;
    let verdict = loop {
        // Heads before the log: so the log that is read after them holds them, whoever sends it.
        let said: Vec<Said> = connection.each_status().await?.into_iter().map(said).collect();
        let log = fetch(connection).await?;
        let verdict = judge(&log, &said, earlier)?;
        round += 1;
        if !verdict.is_to_be_repeated() || round == ROUNDS {
            break verdict;
        }
        tokio::time::sleep(POLL).await;
    };
    let text = match (app.global.quiet, app.global.format.unwrap_or(Format::Table)) {
        (true, _) => format!("{}\n", verdict.head),
        (false, Format::Table) => people(&verdict),
        (false, format) => document(&json(&verdict), format),
    };
    app.print(&text)?;
    Ok(Exit::Done)
}

fn said(answered: Answered) -> Said {
    let head = answered.status.and_then(|status| {
        let head = status.audit.as_ref().and_then(Head::from_wire);
        head.ok_or_else(|| "it names no head: it is of an older version".to_owned())
    });
    Said {
        who: answered.who,
        head,
    }
}

/// Follows the chain and holds every head that somebody named against it.
fn judge(log: &Log, said: &[Said], earlier: Option<Head>) -> Result<Verdict, Refusal> {
    let mut head = log.anchor;
    for record in &log.records {
        head.follow(record)
            .map_err(|error| broken(&error.to_string(), ""))?;
    }
    let hash_at = |sequence: u64| -> Option<[u8; 32]> {
        if sequence == log.anchor.sequence {
            return Some(log.anchor.hash);
        }
        let place = usize::try_from(sequence.checked_sub(log.anchor.sequence + 1)?).ok()?;
        log.records.get(place)?.hash.as_slice().try_into().ok()
    };
    let mut managers = Vec::new();
    for said in said {
        let stand = match &said.head {
            Err(why) => Stand::Silent(why.clone()),
            Ok(its) if its.sequence > head.sequence => Stand::Ahead,
            Ok(its) if its.sequence < log.anchor.sequence => Stand::Behind(its.sequence),
            Ok(its) if hash_at(its.sequence) == Some(its.hash) => Stand::Agrees(its.sequence),
            Ok(its) => {
                let why = format!(
                    "{} has another record {} than the manager that was read",
                    said.who, its.sequence
                );
                return Err(broken(&why, &said.who));
            }
        };
        managers.push((said.who.clone(), stand));
    }
    if let Some(earlier) = earlier {
        before(&log.anchor, &head, earlier, hash_at(earlier.sequence))?;
    }
    Ok(Verdict {
        anchor: log.anchor,
        head,
        managers,
        earlier,
    })
}

/// A head that was kept must be a part of this log.
fn before(anchor: &Head, head: &Head, earlier: Head, hash: Option<[u8; 32]>) -> Result<(), Refusal> {
    if earlier.sequence < anchor.sequence {
        return Err(Refusal::new(
            Code::Compacted,
            "--head",
            format!(
                "the head is of record {}, and managers keep the records from {} on",
                earlier.sequence,
                anchor.sequence + 1
            ),
            "verify against a newer head; print one more often than the log turns over, with 'bulkhead audit --verify -q'",
        ));
    }
    if earlier.sequence > head.sequence {
        let why = format!(
            "it ends at record {}, before the head's {}",
            head.sequence, earlier.sequence
        );
        return Err(broken(&why, "--head"));
    }
    if hash != Some(earlier.hash) {
        let why = format!(
            "record {}, or one before it, is not what it was",
            earlier.sequence
        );
        return Err(broken(&why, "--head"));
    }
    Ok(())
}

fn broken(why: &str, place: &str) -> Refusal {
    let place = if place.is_empty() { "audit log" } else { place };
    Refusal::new(
        Code::AuditBroken,
        place,
        why,
        "keep what the managers hold as it is, and compare: 'bulkhead --context NAME audit --format jsonl' of each; \
         docs/reference/audit.md says what it means",
    )
}

fn people(verdict: &Verdict) -> String {
    let (first, last) = (verdict.anchor.sequence + 1, verdict.head.sequence);
    let mut out = match last + 1 - first {
        0 => "verified      no record is kept\n".to_owned(),
        count => {
            format!("verified      {count} records, {first} to {last}; each follows from the one before\n")
        }
    };
    for (who, stand) in &verdict.managers {
        let stand = match stand {
            Stand::Agrees(sequence) => format!("has the same, up to {sequence}"),
            Stand::Ahead => "is further than what was read; not compared".to_owned(),
            Stand::Behind(sequence) => format!("is at {sequence}, before what is kept; not compared"),
            Stand::Silent(why) => format!("not compared: {why}"),
        };
        out.push_str(&format!(
            "manager       {} {stand}\n",
            crate::refusal::printable(who)
        ));
    }
    if let Some(earlier) = verdict.earlier {
        out.push_str(&format!(
            "since then    nothing up to record {} was rewritten\n",
            earlier.sequence
        ));
    }
    out.push_str(&format!("head          {}\n", verdict.head));
    out
}

fn json(verdict: &Verdict) -> Value {
    let managers = verdict.managers.iter().map(|(who, stand)| {
        let (agrees, sequence, why) = match stand {
            Stand::Agrees(sequence) => (true, Some(*sequence), None),
            Stand::Ahead => (false, None, Some("further than what was read")),
            Stand::Behind(sequence) => (false, Some(*sequence), Some("before what is kept")),
            Stand::Silent(why) => (false, None, Some(why.as_str())),
        };
        json!({ "manager": who, "agrees": agrees, "sequence": sequence, "why_not": why })
    });
    json!({
        "first": verdict.anchor.sequence + 1,
        "last": verdict.head.sequence,
        "anchor": verdict.anchor.to_string(),
        "head": verdict.head.to_string(),
        "managers": managers.collect::<Vec<_>>(),
        "earlier_head": verdict.earlier.map(|head| head.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log that keeps the last of so many records, and the head after each of all.
    fn log(length: u64, kept: usize) -> (Log, Vec<Head>) {
        let (mut head, mut heads, mut records) = (Head::default(), vec![Head::default()], Vec::new());
        for n in 0..length {
            let record = AuditRecord {
                index: n,
                detail: format!("record {n}"),
                ..Default::default()
            };
            records.push(head.append(record));
            heads.push(head);
        }
        let gone = records.len() - kept;
        let log = Log {
            anchor: heads[gone],
            records: records.split_off(gone),
        };
        (log, heads)
    }

    fn manager(head: Head) -> Said {
        Said {
            who: "manager-1".into(),
            head: Ok(head),
        }
    }

    fn code(log: &Log, said: &[Said], earlier: Option<Head>) -> Result<(), Code> {
        judge(log, said, earlier)
            .map(|_| ())
            .map_err(|refusal| refusal.code())
    }

    #[test]
    fn a_sound_log_is_followed_to_its_head() {
        let (whole, heads) = log(6, 4);
        let verdict = judge(&whole, &[manager(heads[5])], Some(heads[3])).expect("sound");
        assert_eq!((verdict.anchor, verdict.head), (heads[2], heads[6]));
        assert_eq!(verdict.managers, [("manager-1".to_owned(), Stand::Agrees(5))]);
        let text = people(&verdict);
        assert!(
            text.contains("4 records, 3 to 6") && text.contains("nothing up to record 3"),
            "{text}"
        );
        let nothing = judge(&Log::default(), &[manager(Head::default())], None).expect("sound");
        assert!(people(&nothing).contains("no record is kept"));
        // What is kept begins right after this one, which still proves it.
        assert_eq!(code(&whole, &[manager(heads[2])], Some(heads[2])), Ok(()));
    }

    #[test]
    fn whatever_was_rewritten_is_found() {
        for at in 0..4 {
            let (mut log, heads) = log(6, 4);
            log.records[at].detail.push('.');
            assert_eq!(code(&log, &[], None), Err(Code::AuditBroken), "{at}");
            // With all hashes made anew, a manager or a kept head still knows better.
            let (whole, _) = self::log(6, 4);
            let mut head = whole.anchor;
            log.records = log.records.into_iter().map(|it| head.append(it)).collect();
            assert_eq!(code(&log, &[], None), Ok(()), "{at}");
            assert_eq!(
                code(&log, &[manager(heads[6])], None),
                Err(Code::AuditBroken),
                "{at}"
            );
            assert_eq!(code(&log, &[], Some(heads[6])), Err(Code::AuditBroken), "{at}");
        }
    }

    #[test]
    fn a_log_that_lost_its_end_is_found() {
        let (mut log, heads) = log(6, 6);
        log.records.truncate(4);
        assert_eq!(code(&log, &[], Some(heads[5])), Err(Code::AuditBroken));
        let verdict = judge(&log, &[manager(heads[5])], None).expect("it may only lag");
        assert!(verdict.is_to_be_repeated());
    }

    #[test]
    fn who_cannot_be_compared_is_said() {
        let (log, heads) = log(6, 2);
        let silent = Said {
            who: "manager-2".into(),
            head: Err("no answer".into()),
        };
        let verdict = judge(&log, &[manager(heads[1]), silent], None).expect("sound");
        let text = people(&verdict);
        assert!(
            text.contains("is at 1, before what is kept") && text.contains("not compared: no answer"),
            "{text}"
        );
        assert_eq!(code(&log, &[], Some(heads[3])), Err(Code::Compacted));
    }

    #[test]
    fn a_head_is_given_itself_or_in_a_file() {
        let (_, heads) = log(2, 2);
        let text = heads[2].to_string();
        assert_eq!(earlier(&text), Ok(Earlier(heads[2])));
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(&file, format!("{text}\n")).expect("its own");
        let path = file.path().to_str().expect("UTF-8");
        assert_eq!(earlier(path), Ok(Earlier(heads[2])));
        std::fs::write(&file, "nothing of the kind").expect("its own");
        assert!(earlier(path).is_err() && earlier("/nowhere").is_err());
    }
}
