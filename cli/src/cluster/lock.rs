//! `cluster unlock` and `cluster unlock-key`: the key that managers wait for where autolock is on.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_identity::UnlockKey;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{
    ConfirmUnlockKeyRequest, GetUnlockKeyRequest, GetUnlockKeyResponse, RotateUnlockKeyRequest,
    UnlockRequest, UnlockResponse,
};
use clap::{Args, Subcommand};
use nix::sys::termios::{self, LocalFlags, SetArg};
use tokio::time::{Instant, sleep};
use zeroize::Zeroizing;

use crate::app::App;
use crate::connection::Connection;
use crate::health;
use crate::output::text;
use crate::refusal::{Code, Exit, Refusal, from_status};
use crate::wait;

/// A manager that is unlocked reads its log before it answers.
const START: Duration = Duration::from_secs(60);
/// A manager that runs takes up a new key within seconds; one that does not is down.
const TAKEN_UP: Duration = Duration::from_secs(10);

/// Flags of `cluster unlock`.
#[derive(Debug, Args)]
pub(crate) struct Unlock {
    /// The file with the unlock key; '-' reads it from stdin [default: asks for it]
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
}

/// What can be done with the unlock key.
#[derive(Debug, Subcommand)]
pub(crate) enum UnlockKeyVerb {
    /// Prints the unlock key; one that was made and not seen yet is used from then on
    Show {
        /// One of before, which a manager that was down since then still waits for [default: the newest]
        #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
        generation: Option<u32>,
    },
    /// Makes a new unlock key and prints it; managers that run take it up by themselves
    Rotate,
}

pub(super) async fn run(verb: UnlockKeyVerb, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let mut connection = app.connect()?;
    match verb {
        UnlockKeyVerb::Show { generation } => {
            let key = show(&mut connection, generation.unwrap_or_default()).await?;
            app.print(&format!("{}\n", key.unlock_key))?;
            match connection.status().await?.unlock_pending {
                pending if pending == key.generation => confirm(&mut connection, &key, app).await,
                _ => Ok(Exit::Done),
            }
        }
        UnlockKeyVerb::Rotate => {
            let request = RotateUnlockKeyRequest {
                request_id: text::new_id().to_vec(),
            };
            connection
                .change("cluster unlock-key rotate", async |mut c| {
                    c.rotate_unlock_key(request.clone()).await
                })
                .await?;
            show_new(&mut connection, app).await
        }
    }
}

async fn show(connection: &mut Connection, generation: u32) -> Result<GetUnlockKeyResponse, Refusal> {
    connection
        .ask("unlock key", async |mut c| {
            c.get_unlock_key(GetUnlockKeyRequest { generation }).await
        })
        .await
}

/// Prints the newest key, then waits until the managers that run are locked with it.
pub(super) async fn show_new(connection: &mut Connection, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let key = show(connection, 0).await?;
    app.print(&format!("{}\n", key.unlock_key))?;
    confirm(connection, &key, app).await
}

/// Has the managers use a key, now that it was printed.
async fn confirm(
    connection: &mut Connection,
    key: &GetUnlockKeyResponse,
    app: &mut App<'_>,
) -> Result<Exit, Refusal> {
    app.say("keep this unlock key where no manager is: without it a manager that starts again is of no use");
    let request = ConfirmUnlockKeyRequest {
        request_id: text::new_id().to_vec(),
        generation: key.generation,
    };
    connection
        .change("unlock key", async |mut c| {
            c.confirm_unlock_key(request.clone()).await
        })
        .await?;
    taken_up(connection, key.generation, app).await
}

/// Waits a while for every manager to seal its keys so, and says which did not.
pub(super) async fn taken_up(
    connection: &mut Connection,
    generation: u32,
    app: &mut App<'_>,
) -> Result<Exit, Refusal> {
    let until = Instant::now() + TAKEN_UP;
    loop {
        let status = connection.status().await?;
        if status.unlock_generation != generation {
            let reason = "autolock was changed meanwhile";
            let help = "'bulkhead cluster status' shows it as it is";
            return Err(Refusal::new(Code::Conflict, "autolock", reason, help));
        }
        let late: Vec<_> = status
            .members
            .iter()
            .filter(|m| m.locked_with != generation)
            .collect();
        if late.is_empty() {
            app.say(&match generation {
                0 => "no manager is locked any more".to_owned(),
                key => format!("every manager is locked with unlock key {key}"),
            });
            return Ok(Exit::Done);
        }
        if Instant::now() >= until {
            for member in late {
                app.say(&match member.locked_with {
                    0 => format!("{} is not locked yet: is it down?", member.name),
                    key => format!(
                        "{} is down; it still waits for unlock key {key}, and catches up by itself after that",
                        member.name
                    ),
                });
            }
            return Ok(Exit::Done);
        }
        sleep(wait::POLL).await;
    }
}

pub(super) async fn unlock(options: Unlock, app: &mut App<'_>) -> Result<Exit, Refusal> {
    let program = app.program()?;
    let status = health::status(&mut program.local()).await?;
    if status.locked_with == 0 {
        let reason = format!("the program is {}", health::phase(&status));
        return Err(Refusal::new(
            Code::Invalid,
            "cluster unlock",
            reason,
            "there is nothing to unlock",
        ));
    }
    let key = match &options.key_file {
        Some(path) => from_file(path)?,
        None => ask(app, status.locked_with)?,
    };
    let unlocked = match send(&program, &key).await {
        // The key has rotated since this manager was locked: another one still shows what it needs.
        Err(refusal) if key.generation() != status.locked_with => {
            let Some(older) = from_cluster(app, status.locked_with).await else {
                return Err(refusal);
            };
            app.say(&format!(
                "it is locked with unlock key {}, not {}: the cluster showed that one",
                older.generation(),
                key.generation()
            ));
            send(&program, &older).await?
        }
        sent => sent?,
    };
    app.print(&format!("{}\n", text::id(&unlocked.node_id)))?;
    app.say(&format!("{} is unlocked", unlocked.name));
    Ok(Exit::Done)
}

async fn send(program: &Connection, key: &UnlockKey) -> Result<UnlockResponse, Refusal> {
    let unlock_key = key.to_text().to_string();
    match tokio::time::timeout(START, program.local().unlock(UnlockRequest { unlock_key })).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(from_status(&status, "cluster unlock")),
        Err(_) => {
            let reason = format!("no answer within {} s", START.as_secs());
            let help = "read the manager's log; 'bulkhead health --socket' shows its state";
            Err(Refusal::new(Code::OutcomeUnknown, "cluster unlock", reason, help))
        }
    }
}

/// A key of before, from the cluster of the context that is selected; nothing where there is none or it does not show one.
async fn from_cluster(app: &App<'_>, generation: u32) -> Option<UnlockKey> {
    let context = app.contexts().find(app.global.context.as_deref()).ok()?;
    let mut connection = Connection::through(context).ok()?;
    let answer = show(&mut connection, generation).await.ok()?;
    Zeroizing::new(answer.unlock_key).parse().ok()
}

fn from_file(path: &Path) -> Result<UnlockKey, Refusal> {
    if path.as_os_str() == "-" {
        return read(&mut std::io::stdin().lock(), "stdin");
    }
    let place = path.display().to_string();
    let mut file = std::fs::File::open(path)
        .map_err(|e| Refusal::new(Code::Unreadable, &place, e.to_string(), "check the path"))?;
    read(&mut file, &place)
}

fn read(from: &mut dyn Read, place: &str) -> Result<UnlockKey, Refusal> {
    let mut text = Zeroizing::new(String::with_capacity(limits::UNLOCK_KEY_TEXT_BYTES + 1));
    from.take(limits::UNLOCK_KEY_TEXT_BYTES as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|e| Refusal::new(Code::Unreadable, place, e.to_string(), "check the path"))?;
    parse(&text, place)
}

fn parse(text: &str, place: &str) -> Result<UnlockKey, Refusal> {
    text.parse().map_err(|e: bulkhead_identity::UnlockKeyError| {
        let help = "copy the whole key; a manager that runs shows it: 'bulkhead cluster unlock-key show'";
        Refusal::new(Code::WrongUnlockKey, place, e.to_string(), help)
    })
}

/// Asks for the key on a terminal, where it does not show; without one it is read from stdin.
fn ask(app: &mut App<'_>, generation: u32) -> Result<UnlockKey, Refusal> {
    if !app.environment.stdin_terminal {
        return read(&mut std::io::stdin().lock(), "stdin");
    }
    app.say(&format!("unlock key {generation}:"));
    let unreadable = |e: std::io::Error| {
        let help = "give it with --key-file";
        Refusal::new(Code::Unreadable, "the terminal", e.to_string(), help)
    };
    let stdin = std::io::stdin();
    let before = termios::tcgetattr(&stdin).map_err(|e| unreadable(e.into()))?;
    let mut silent = before.clone();
    silent.local_flags.remove(LocalFlags::ECHO);
    termios::tcsetattr(&stdin, SetArg::TCSAFLUSH, &silent).map_err(|e| unreadable(e.into()))?;
    let mut text = Zeroizing::new(String::with_capacity(limits::UNLOCK_KEY_TEXT_BYTES + 1));
    let line = stdin
        .lock()
        .take(limits::UNLOCK_KEY_TEXT_BYTES as u64 + 1)
        .read_line(&mut text);
    termios::tcsetattr(&stdin, SetArg::TCSAFLUSH, &before).map_err(|e| unreadable(e.into()))?;
    line.map_err(unreadable)?;
    parse(&text, "the terminal")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_whole_or_refused_without_being_repeated() {
        let key = UnlockKey::from_bytes(2, &[5; 32]).expect("its length").to_text();
        let text = format!("{}\n", key.as_str());
        assert_eq!(
            read(&mut text.as_bytes(), "stdin").expect("a key").generation(),
            2
        );
        for wrong in [&text[..text.len() - 3], "", "BULKHEAD-1-a-b"] {
            let refusal = read(&mut wrong.as_bytes(), "stdin").expect_err("no key");
            assert_eq!(refusal.code(), Code::WrongUnlockKey);
            assert!(!format!("{refusal:?}").contains(&text[30..50]));
        }
        let long = vec![b'x'; 1 << 20];
        assert_eq!(
            read(&mut &long[..], "stdin").expect_err("too long").code(),
            Code::WrongUnlockKey
        );
    }
}
