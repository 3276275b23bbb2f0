//! Unpacked layers, and the processes that work on them.
//!
//! A layer is used only once its tree was compared with its record since this launcher started.
//! One process works on one layer at a time; a few work side by side.

use crate::clock;
use crate::connection::Connection;
use crate::id_range::IMAGE_RANGE;
use crate::message::{Compression, DiffId, LayerRecord, Refusal, RefusalCode};
use crate::sandbox::mounts::Owner;
use crate::sandbox::sys::{self, Process};
use crate::unpack::{Job, Outcome};
use rustix::process::{Signal, pidfd_send_signal};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Jobs at once: decompression fills a processor each, and the node has tasks to run.
const MAX_WORKERS: usize = 2;
/// Jobs waiting; a worker asks for the layers of a few images at a time.
const MAX_WAITING: usize = 512;
/// After this a job is stuck: the limits on bytes and processor time end it far earlier.
const JOB_TIMEOUT: Duration = Duration::from_secs(900);

/// Who wants to know how a job ended: a request of one of the workers that were, one after the other, connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asker {
    /// Which worker: answers to an earlier one are dropped.
    pub worker: u64,
    /// Its number for the request.
    pub request: u64,
}

/// A job's end.
#[derive(Debug)]
pub(crate) struct Finished {
    /// On which layer.
    pub diff_id: DiffId,
    /// What was asked.
    pub job: Job,
    /// Whose requests it answers.
    pub askers: Vec<Asker>,
    /// The layer's record, or `None` after a removal.
    pub result: Result<Option<LayerRecord>, Refusal>,
}

#[derive(Debug)]
struct Work {
    diff_id: DiffId,
    job: Job,
    blob: Option<OwnedFd>,
    askers: Vec<Asker>,
}

#[derive(Debug)]
struct Worker {
    work: Work,
    channel: Connection,
    process: Process,
    deadline: Duration,
}

#[derive(Debug, Clone)]
struct Layer {
    record: LayerRecord,
    verified: bool,
}

/// All layers of this launcher.
#[derive(Debug)]
pub(crate) struct Layers {
    folder: PathBuf,
    known: BTreeMap<DiffId, Layer>,
    waiting: VecDeque<Work>,
    workers: Vec<Worker>,
}

impl Layers {
    /// Opens the folder, removing what an unpacker left unfinished.
    pub(crate) fn open(folder: PathBuf) -> io::Result<Layers> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        let mut layers = Layers {
            folder,
            known: BTreeMap::new(),
            waiting: VecDeque::new(),
            workers: Vec::new(),
        };
        for entry in fs::read_dir(&layers.folder)? {
            let path = entry?.path();
            let read = fs::read(path.join("record"))
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok());
            match read {
                Some(record) => layers.remember(record, false),
                None => layers.discard_folder(&path),
            }
        }
        Ok(layers)
    }

    /// The record of a layer that may be used.
    pub(crate) fn verified(&self, diff_id: &DiffId) -> Option<&LayerRecord> {
        self.known
            .get(diff_id)
            .filter(|layer| layer.verified)
            .map(|layer| &layer.record)
    }

    /// Whether there is such a layer, verified or not.
    pub(crate) fn contains(&self, diff_id: &DiffId) -> bool {
        self.known.contains_key(diff_id)
    }

    /// A page of records after one.
    pub(crate) fn page(&self, after: Option<&DiffId>, count: usize) -> (Vec<LayerRecord>, bool) {
        let mut rest = self
            .known
            .iter()
            .filter(|(id, _)| after.is_none_or(|after| *id > after));
        let page = rest
            .by_ref()
            .take(count)
            .map(|(_, layer)| layer.record.clone())
            .collect();
        (page, rest.next().is_some())
    }

    /// The folders of verified layers for a root, topmost first, relative to the launcher's folder.
    pub(crate) fn lower(&self, base_first: &[DiffId]) -> Option<Vec<String>> {
        let mut folders = Vec::new();
        for diff_id in base_first.iter().rev() {
            let record = self.verified(diff_id)?;
            folders.push(format!("layers/{}/root", diff_id.hex()));
            if record.masks {
                folders.push(format!("layers/{}/mask", diff_id.hex()));
            }
        }
        Some(folders)
    }

    /// Asks for a layer to be unpacked from a blob.
    pub(crate) fn unpack(
        &mut self,
        diff_id: DiffId,
        compression: Compression,
        blob: OwnedFd,
        asker: Asker,
    ) -> Result<(), Refusal> {
        let job = Job::Unpack {
            diff_id: diff_id.clone(),
            compression,
        };
        self.enqueue(Work {
            diff_id,
            job,
            blob: Some(blob),
            askers: vec![asker],
        })
    }

    /// Asks for a comparison with the record.
    pub(crate) fn verify(&mut self, diff_id: DiffId, asker: Option<Asker>) -> Result<(), Refusal> {
        self.enqueue(Work {
            diff_id,
            job: Job::Verify,
            blob: None,
            askers: asker.into_iter().collect(),
        })
    }

    /// Asks for a removal. From now on the layer is not there.
    pub(crate) fn remove(&mut self, diff_id: DiffId, asker: Asker) -> Result<(), Refusal> {
        self.known.remove(&diff_id);
        self.enqueue(Work {
            diff_id,
            job: Job::Remove,
            blob: None,
            askers: vec![asker],
        })
    }

    fn enqueue(&mut self, work: Work) -> Result<(), Refusal> {
        let same = |other: &Work| other.diff_id == work.diff_id && other.job == work.job;
        let all = self
            .workers
            .iter_mut()
            .map(|worker| &mut worker.work)
            .chain(&mut self.waiting);
        if let Some(other) = all.into_iter().find(|other| same(other)) {
            other.askers.extend(work.askers);
            return Ok(());
        }
        if self.waiting.len() >= MAX_WAITING {
            return Err(Refusal::new(
                RefusalCode::Busy,
                "too many layers at once, try again",
            ));
        }
        self.waiting.push_back(work);
        Ok(())
    }

    /// What to wait for: each worker's answer.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.workers.iter().map(|worker| worker.channel.as_fd())
    }

    /// When to look again at the latest.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.workers.iter().map(|worker| worker.deadline).min()
    }

    /// Starts waiting jobs and collects finished ones.
    pub(crate) fn turn(&mut self, program: BorrowedFd<'_>, filters: BorrowedFd<'_>) -> Vec<Finished> {
        let mut finished = Vec::new();
        let now = clock::monotonic();
        for index in (0..self.workers.len()).rev() {
            let worker = &self.workers[index];
            let outcome = match worker.channel.receive::<Outcome>() {
                Ok(Some((outcome, _))) => outcome,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && now < worker.deadline => continue,
                _ => {
                    let _ = pidfd_send_signal(&worker.process.handle, Signal::KILL); // or it is gone
                    Err(Refusal::new(
                        RefusalCode::HostileLayer,
                        "the unpacker stopped: the layer is over its limits",
                    ))
                }
            };
            let work = self.workers.swap_remove(index).work;
            finished.push(self.conclude(work, outcome));
        }
        while self.workers.len() < MAX_WORKERS {
            let busy = |id: &DiffId| self.workers.iter().any(|worker| worker.work.diff_id == *id);
            let Some(at) = self.waiting.iter().position(|work| !busy(&work.diff_id)) else {
                break;
            };
            let Some(mut work) = self.waiting.remove(at) else {
                break;
            };
            // Two asked for one layer, the second after the first had done it.
            if let (Job::Unpack { .. }, Some(layer)) = (&work.job, self.known.get(&work.diff_id))
                && layer.verified
            {
                let result = Ok(Some(layer.record.clone()));
                finished.push(Finished {
                    diff_id: work.diff_id,
                    job: work.job,
                    askers: work.askers,
                    result,
                });
                continue;
            }
            match self.begin(&mut work, program, filters) {
                Ok((channel, process)) => {
                    let deadline = now + JOB_TIMEOUT;
                    self.workers.push(Worker {
                        work,
                        channel,
                        process,
                        deadline,
                    });
                }
                Err(error) => {
                    let refusal = Refusal::new(
                        RefusalCode::Internal,
                        format!("could not work on a layer: {error}"),
                    );
                    finished.push(self.conclude(work, Err(refusal)));
                }
            }
        }
        finished
    }

    fn begin(
        &self,
        work: &mut Work,
        program: BorrowedFd<'_>,
        filters: BorrowedFd<'_>,
    ) -> io::Result<(Connection, Process)> {
        let path = match work.job {
            Job::Unpack { .. } => {
                let path = self.partial(&work.diff_id);
                self.discard_folder(&path);
                make_layer_folder(&path)?;
                path
            }
            Job::Verify | Job::Remove => self.path(&work.diff_id),
        };
        let folder = File::open(&path)?;
        let (ours, theirs) = Connection::pair()?;
        let process = sys::spawn(
            program,
            theirs.as_fd(),
            &[CString::from(c"bulkhead-unpacker")],
            &[],
        )?;
        let blob = work.blob.take();
        let descriptors = [folder.as_fd(), filters];
        let descriptors: Vec<_> = descriptors
            .into_iter()
            .chain(blob.as_ref().map(AsFd::as_fd))
            .collect();
        ours.send(&work.job, &descriptors)?;
        Ok((ours, process))
    }

    /// Moves a layer to its place, or out of it, according to what came of a job.
    fn conclude(&mut self, work: Work, outcome: Outcome) -> Finished {
        let Work {
            diff_id, job, askers, ..
        } = work;
        let result = match (&job, outcome) {
            (Job::Unpack { .. }, Ok(totals)) => {
                let record = LayerRecord {
                    diff_id: diff_id.clone(),
                    tree_digest: totals.tree_digest,
                    entries: totals.entries,
                    bytes: totals.bytes,
                    masks: totals.masks,
                };
                self.publish(&record).map(|()| {
                    self.remember(record.clone(), true);
                    Some(record)
                })
            }
            (Job::Verify, Ok(totals)) => match self.known.get_mut(&diff_id) {
                Some(layer) if layer.record.tree_digest == totals.tree_digest => {
                    layer.verified = true;
                    Ok(Some(layer.record.clone()))
                }
                Some(layer) => {
                    layer.verified = false;
                    let message = format!(
                        "the unpacked layer {diff_id} was changed on disk; remove and unpack it again"
                    );
                    Err(Refusal::new(RefusalCode::DigestMismatch, message))
                }
                None => Err(Refusal::new(
                    RefusalCode::UnknownLayer,
                    format!("there is no layer {diff_id}"),
                )),
            },
            (Job::Remove, Ok(_)) => remove_layer_folder(&self.path(&diff_id))
                .map(|()| None)
                .map_err(|error| internal(&error)),
            (Job::Unpack { .. }, Err(refusal)) => {
                self.discard(&diff_id);
                Err(refusal)
            }
            (Job::Verify | Job::Remove, Err(refusal)) => Err(refusal),
        };
        Finished {
            diff_id,
            job,
            askers,
            result,
        }
    }

    fn publish(&self, record: &LayerRecord) -> Result<(), Refusal> {
        let (partial, path) = (self.partial(&record.diff_id), self.path(&record.diff_id));
        let publish = || {
            // Passable for whoever verifies or removes it later; the folder above is closed to all but root.
            fs::set_permissions(&partial, fs::Permissions::from_mode(0o711))?;
            fs::write(partial.join("record"), serde_json::to_vec(record)?)?;
            fs::rename(&partial, &path)
        };
        publish().map_err(|error| internal(&error))
    }

    fn remember(&mut self, record: LayerRecord, verified: bool) {
        self.known
            .insert(record.diff_id.clone(), Layer { record, verified });
    }

    /// Removes an unfinished layer, which the unpacker has emptied unless it was stopped.
    fn discard(&self, diff_id: &DiffId) {
        self.discard_folder(&self.partial(diff_id));
    }

    fn discard_folder(&self, path: &Path) {
        if let Err(error) = fs::remove_dir_all(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "could not remove an unfinished layer");
        }
    }

    fn path(&self, diff_id: &DiffId) -> PathBuf {
        self.folder.join(diff_id.hex())
    }

    fn partial(&self, diff_id: &DiffId) -> PathBuf {
        self.folder.join(format!("{}.partial", diff_id.hex()))
    }
}

/// Makes a layer's two folders, owned by the image range.
fn make_layer_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).create(path)?;
    // Open to the image range while it makes the two; the folder above is closed to everyone.
    fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
    let folder = File::open(path)?;
    let owner = Owner::become_id(IMAGE_RANGE.base());
    for name in ["root", "mask"] {
        rustix::fs::mkdirat(&folder, name, rustix::fs::Mode::from_raw_mode(0o755))?;
    }
    drop(owner);
    Ok(())
}

fn remove_layer_folder(path: &Path) -> io::Result<()> {
    for name in ["root", "mask"] {
        fs::remove_dir(path.join(name))?;
    }
    fs::remove_file(path.join("record"))?;
    fs::remove_dir(path)
}

fn internal(error: &io::Error) -> Refusal {
    Refusal::new(RefusalCode::Internal, format!("could not store a layer: {error}"))
}
