//! What has to be taken back, written down before it is done: a driver that dies leaves nothing broken for ever.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use bulkhead_lab::namespace::Namespace;
use bulkhead_lab::{clock, descriptors, remove_claims, remove_groups, send, system};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use super::links::TABLE;

/// Where journals are, unless another folder is named: gone with a restart of the machine, as are the faults.
pub const FOLDER: &str = "/run/bulkhead-chaos";

/// How the folder of a cluster begins; no other one is ever removed.
pub(super) const PREFIX: &str = "bulkhead-chaos.";

/// How something is taken back. Each can be done more than once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "undo")]
pub(super) enum Undo {
    /// Ends every program of the cluster in this folder, and removes it.
    Remove { folder: PathBuf },
    /// Removes everything of a docker-compose project.
    ComposeDown { file: PathBuf, project: String },
    /// Starts a container that was killed or stopped.
    Start { container: String },
    /// Lets a container go on.
    Unpause { container: String },
    /// Connects a container to a network again.
    Connect {
        container: String,
        network: String,
        alias: String,
    },
    /// Takes our rules out of a container's network.
    Rules { container: String },
    /// Starts a node of a cluster of `bulkhead dev`.
    StartNode {
        program: PathBuf,
        folder: PathBuf,
        node: String,
    },
    /// Has a worker take tasks again, by the words of a command.
    Activate { words: Vec<String> },
    /// Lets processes go on; those of this name alone, since numbers come again.
    Continue { pids: Vec<u32>, started: Vec<u64> },
    /// Lets processes open as many files again as before.
    Descriptors {
        pids: Vec<u32>,
        started: Vec<u64>,
        limits: Vec<u64>,
    },
    /// Sets the wall clocks of processes right.
    Clock { pids: Vec<u32>, started: Vec<u64> },
}

impl Undo {
    /// Takes it back.
    pub(super) fn perform(&self) -> anyhow::Result<()> {
        let same = |pids: &[u32], started: &[u64]| -> Vec<u32> {
            let both = pids.iter().zip(started);
            both.filter(|(pid, since)| system::started(**pid) == Some(**since))
                .map(|(pid, _)| *pid)
                .collect()
        };
        match self {
            Self::Remove { folder } => remove(folder),
            Self::ComposeDown { file, project } => run(Command::new("docker-compose")
                .arg("-f")
                .arg(file)
                .args(["-p", project, "down", "-v", "--remove-orphans", "-t", "2"])),
            Self::Start { container } => docker(&["start", container]),
            Self::Unpause { container } => match docker(&["unpause", container]) {
                // It may go on already, or have ended.
                Err(error) if error.to_string().contains("is not") => Ok(()),
                done => done,
            },
            Self::Connect {
                container,
                network,
                alias,
            } => match docker(&["network", "connect", "--alias", alias, network, container]) {
                Err(error) if error.to_string().contains("already exists") => Ok(()),
                done => done,
            },
            Self::Rules { container } => {
                let pid = super::compose::pid(container)?;
                if pid == 0 {
                    return Ok(()); // its network went with it
                }
                let script = format!("table inet {TABLE} {{}}\ndelete table inet {TABLE}\n");
                Namespace::of(pid)?.tool(&["nft", "-f", "-"], &script)
            }
            Self::StartNode {
                program,
                folder,
                node,
            } => run(Command::new(program)
                .env("BULKHEAD_DEV_DIR", folder)
                .args(["dev", "start", node])),
            Self::Activate { words } => {
                let (program, rest) = words.split_first().context("a command without words")?;
                run(Command::new(program).args(rest))
            }
            Self::Continue { pids, started } => {
                for pid in same(pids, started) {
                    send(pid, Signal::SIGCONT);
                }
                Ok(())
            }
            Self::Descriptors {
                pids,
                started,
                limits,
            } => {
                let same = same(pids, started);
                for (pid, limit) in pids.iter().zip(limits).filter(|(pid, _)| same.contains(pid)) {
                    descriptors::limit(*pid, *limit)?;
                }
                Ok(())
            }
            Self::Clock { pids, started } => {
                for pid in same(pids, started) {
                    clock::set(pid, 0)?;
                }
                Ok(())
            }
        }
    }
}

/// Ends whatever runs for a folder, or holds it, and removes it.
fn remove(folder: &Path) -> anyhow::Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    anyhow::ensure!(
        name.starts_with(PREFIX),
        "{} was not made by this program",
        folder.display()
    );
    let of_it = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0)
            .any(|word| std::str::from_utf8(word).is_ok_and(|word| Path::new(word).starts_with(folder)))
    };
    let mut pids: Vec<u32> = system::processes()
        .into_iter()
        .filter(of_it)
        .flat_map(system::tree)
        .collect();
    pids.extend(
        bulkhead_lab::supervisors(folder)
            .into_iter()
            .flat_map(system::tree),
    );
    for pid in pids {
        send(pid, Signal::SIGKILL);
    }
    // Clusters lie below it, and their nodes' folders below them.
    for cluster in fs::read_dir(folder)?.flatten() {
        for node in fs::read_dir(cluster.path()).into_iter().flatten().flatten() {
            remove_groups(&node.path());
        }
    }
    remove_claims(folder);
    fs::remove_dir_all(folder).with_context(|| format!("could not remove {}", folder.display()))
}

fn docker(words: &[&str]) -> anyhow::Result<()> {
    run(Command::new("docker").args(words))
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} could not be run", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}",
            command.get_program().to_string_lossy(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    /// Who writes this journal: a process, and when it started.
    Driver { pid: u32, started: u64 },
    /// Something is about to be done.
    Before { number: usize, undo: Undo },
    /// It was taken back.
    Undone { number: usize },
}

/// The journal of one run. It is removed when everything in it was taken back.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: fs::File,
    open: Vec<Option<Undo>>,
}

impl Journal {
    /// A new one in this folder.
    pub(super) fn begin(folder: &Path) -> anyhow::Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("no journal can be kept in {}", folder.display()))?;
        must_be_own(folder)?;
        let pid = std::process::id();
        let started = system::started(pid).context("this program is not in /proc")?;
        // A number comes again, and what another driver left stays.
        let path = folder.join(format!("{pid}-{started}.jsonl"));
        let file = fs::File::options()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("could not make {}", path.display()))?;
        let mut journal = Self {
            path,
            file,
            open: Vec::new(),
        };
        journal.write(&Line::Driver { pid, started })?;
        Ok(journal)
    }

    fn write(&mut self, line: &Line) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.file
            .write_all(&text)
            .and_then(|()| self.file.sync_data())
            .with_context(|| format!("could not write {}", self.path.display()))
    }

    /// Says what is about to be done, by how it is taken back; its number.
    pub(super) fn before(&mut self, undo: Undo) -> anyhow::Result<usize> {
        let number = self.open.len();
        self.write(&Line::Before {
            number,
            undo: undo.clone(),
        })?;
        self.open.push(Some(undo));
        Ok(number)
    }

    /// Takes it back.
    fn undo(&mut self, number: usize) -> anyhow::Result<()> {
        let undo = self.open.get_mut(number).and_then(Option::take);
        if let Some(undo) = undo {
            undo.perform()?;
            self.write(&Line::Undone { number })?;
        }
        Ok(())
    }

    /// It was taken back otherwise.
    pub(super) fn undone(&mut self, number: usize) -> anyhow::Result<()> {
        if self.open.get_mut(number).and_then(Option::take).is_some() {
            self.write(&Line::Undone { number })?;
        }
        Ok(())
    }

    /// Takes back all that is left, the newest first, and forgets it. What cannot be taken back stays in the journal, and
    /// keeps nothing else from being tried.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        let mut first = Ok(());
        for number in (0..self.open.len()).rev() {
            first = first.and(self.undo(number));
        }
        first?;
        fs::remove_file(&self.path).with_context(|| format!("could not remove {}", self.path.display()))
    }
}

/// What is written in it is done as root: nobody else may write there.
fn must_be_own(folder: &Path) -> anyhow::Result<()> {
    let found =
        fs::symlink_metadata(folder).with_context(|| format!("could not read {}", folder.display()))?;
    anyhow::ensure!(
        found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0,
        "{} is not a folder that this program's user alone can write: name another one with --state",
        folder.display()
    );
    Ok(())
}

/// Takes back what drivers that are gone left, and says what: one line for each.
///
/// # Errors
/// Where the folder or a journal cannot be read, or something cannot be taken back: then its journal stays.
pub fn clean_up(folder: &Path, out: &mut impl io::Write) -> anyhow::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            writeln!(out, "nothing to clean up: {} is not there", folder.display())?;
            return Ok(());
        }
        Err(error) => return Err(error).with_context(|| format!("could not read {}", folder.display())),
    };
    must_be_own(folder)?;
    let (mut failed, mut cleaned) = (0, 0);
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.extension().is_none_or(|it| it != "jsonl") {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))?;
        let (driver, undos) = left(&text);
        if let Some((pid, started)) = driver
            && system::started(pid) == Some(started)
        {
            writeln!(
                out,
                "{}: process {pid} still runs, and takes back what it does itself",
                path.display()
            )?;
            continue;
        }
        let mut all = true;
        for undo in undos.iter().rev() {
            match undo.perform() {
                Ok(()) => writeln!(out, "taken back: {}", serde_json::to_string(undo)?)?,
                Err(error) => {
                    all = false;
                    writeln!(out, "not taken back: {}: {error:#}", serde_json::to_string(undo)?)?;
                }
            }
        }
        if all {
            fs::remove_file(&path).with_context(|| format!("could not remove {}", path.display()))?;
            cleaned += 1;
        } else {
            failed += 1;
        }
    }
    writeln!(out, "{cleaned} journals done")?;
    anyhow::ensure!(
        failed == 0,
        "{failed} journals have something left: mend it by hand, and run this again"
    );
    Ok(())
}

/// Who wrote a journal, and what is left of it. A last line that was cut off says nothing: what it was about was not done.
fn left(text: &str) -> (Option<(u32, u64)>, Vec<Undo>) {
    let (mut driver, mut open) = (None, std::collections::BTreeMap::new());
    for line in text.lines().filter_map(|line| serde_json::from_str(line).ok()) {
        match line {
            Line::Driver { pid, started } => driver = Some((pid, started)),
            Line::Before { number, undo } => drop(open.insert(number, undo)),
            Line::Undone { number } => drop(open.remove(&number)),
        }
    }
    (driver, open.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let cluster = folder.path().join("bulkhead-chaos.x");
        fs::create_dir_all(cluster.join("worker-1")).expect("made");
        (folder, cluster)
    }

    #[test]
    fn what_a_dead_driver_left_is_taken_back_once() {
        let (folder, cluster) = place();
        let state = folder.path().join("state");
        let mut journal = Journal::begin(&state).expect("a journal");
        let done = journal
            .before(Undo::Remove {
                folder: folder.path().join("never"),
            })
            .expect("written");
        journal.undone(done).expect("written");
        journal
            .before(Undo::Remove {
                folder: cluster.clone(),
            })
            .expect("written");
        // As a driver that was killed: another one has its number now.
        let text = fs::read_to_string(&journal.path).expect("there");
        let own = format!(
            "\"started\":{}",
            system::started(std::process::id()).expect("runs")
        );
        assert!(text.contains(&own), "{text}");
        let mut out = Vec::new();
        clean_up(&state, &mut out).expect("skipped");
        assert!(String::from_utf8_lossy(&out).contains("still runs") && cluster.is_dir());
        fs::write(
            &journal.path,
            text.replace(&own, "\"started\":1") + "{\"before\":{\"num",
        )
        .expect("written");
        clean_up(&state, &mut out).expect("cleaned");
        assert!(!cluster.exists() && !journal.path.exists());
        let out = String::from_utf8_lossy(&out).into_owned();
        assert_eq!(out.matches("taken back").count(), 1, "{out}");
    }

    #[test]
    fn a_driver_that_ends_takes_back_everything_itself() {
        let (folder, cluster) = place();
        let mut journal = Journal::begin(&folder.path().join("state")).expect("a journal");
        journal
            .before(Undo::Remove {
                folder: cluster.clone(),
            })
            .expect("written");
        let path = journal.path.clone();
        journal.end().expect("ended");
        assert!(!cluster.exists() && !path.exists());
    }

    #[test]
    fn what_cannot_be_taken_back_stays_and_keeps_nothing_else_from_it() {
        let (folder, cluster) = place();
        let others = folder.path().join("others");
        fs::create_dir(&others).expect("made");
        let mut journal = Journal::begin(&folder.path().join("state")).expect("a journal");
        for folder in [&cluster, &others] {
            journal
                .before(Undo::Remove {
                    folder: folder.clone(),
                })
                .expect("written");
        }
        let path = journal.path.clone();
        let error = journal.end().expect_err("one of them is not ours");
        assert!(
            error.to_string().contains("was not made by this program"),
            "{error}"
        );
        assert!(!cluster.exists() && others.is_dir());
        let (_, open) = left(&fs::read_to_string(path).expect("kept"));
        assert_eq!(open, [Undo::Remove { folder: others }]);
    }

    #[test]
    fn a_folder_that_others_can_write_keeps_no_journal_and_is_not_believed() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().join("state");
        fs::create_dir(&state).expect("made");
        fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("ours");
        assert!(Journal::begin(&state).is_err());
        assert!(clean_up(&state, &mut Vec::new()).is_err());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/", &link).expect("made");
        assert!(clean_up(&link, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_process_that_stands_goes_on() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("a process");
        let pid = child.id();
        send(pid, Signal::SIGSTOP);
        let state = || fs::read_to_string(format!("/proc/{pid}/stat")).expect("runs");
        while !state().contains(") T ") {}
        let started = system::started(pid).expect("runs");
        Undo::Continue {
            pids: vec![pid],
            started: vec![started + 1],
        }
        .perform()
        .expect("another one");
        assert!(state().contains(") T "));
        Undo::Continue {
            pids: vec![pid],
            started: vec![started],
        }
        .perform()
        .expect("it");
        while state().contains(") T ") {}
        child.kill().expect("ended");
        child.wait().expect("ended");
    }
}
