//! Starting tasks: checked, held until the layers are verified, written down, handed to a supervisor.

use super::*;

/// A start that waits for its layers to be verified.
#[derive(Debug)]
pub(super) struct WaitingStart {
    pub(super) asker: Asker,
    pub(super) spec: TaskSpec,
    secrets: Option<OwnedFd>,
}

impl Server {
    pub(super) fn ask_start(
        &mut self,
        asker: Asker,
        spec: TaskSpec,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        spec::validate(&spec)?;
        let waiting = self.waiting.iter().any(|start| start.spec.task == spec.task);
        if waiting || self.tasks.contains_key(&spec.task) {
            return Err(Refusal::new(
                RefusalCode::TaskExists,
                format!("there is a task {}", spec.task),
            ));
        }
        if self.tasks.len() + self.waiting.len() >= MAX_TASKS {
            return Err(Refusal::new(
                RefusalCode::Busy,
                "this node has as many tasks as it can hold",
            ));
        }
        let secrets = descriptors.into_iter().next();
        if secrets.is_none() && !spec.secrets.is_empty() {
            return Err(invalid("no stream came with the secrets' names"));
        }
        for diff_id in &spec.layers {
            if !self.layers.contains(diff_id) {
                return Err(unknown_layer(diff_id));
            }
            if self.layers.verified(diff_id).is_none() {
                self.layers.verify(diff_id.clone(), None)?;
            }
        }
        self.waiting.push(WaitingStart { asker, spec, secrets });
        Ok(())
    }

    pub(super) fn start_waiting(&mut self) {
        for start in std::mem::take(&mut self.waiting) {
            let Some(lower) = self.layers.lower(&start.spec.layers) else {
                self.waiting.push(start);
                continue;
            };
            let (asker, task) = (start.asker, start.spec.task.clone());
            if let Err(refusal) = self.start(start, lower) {
                tracing::warn!(task.id = %task, reason = %refusal, "could not start a task");
                self.answer(asker, Err(refusal), Vec::new());
            }
        }
    }

    /// Writes the task down, makes its groups, starts its supervisor. What fails is undone.
    fn start(&mut self, start: WaitingStart, lower: Vec<String>) -> Result<(), Refusal> {
        let range = self.ids.allocate()?;
        let record = TaskRecord {
            task: start.spec.task.clone(),
            epoch: start.spec.epoch,
            layers: start.spec.layers.clone(),
            range,
            groups: self.cgroups.of_task(start.spec.task.as_str()),
            boot_id: self.boot_id.clone(),
            started_at_ms: clock::wall_ms(),
            supervisor: None,
            pid: None,
        };
        let mut task = Task::new(record, TaskState::Starting, None);
        task.start_asker = Some(start.asker);
        let begun = self.begin(&mut task, start, lower);
        if let Err(error) = begun {
            self.undo(&task.record);
            let step = format!("could not prepare the task: {error}");
            return Err(Refusal::new(RefusalCode::StartFailed, step));
        }
        self.tasks.insert(task.record.task.clone(), task);
        Ok(())
    }

    fn begin(&self, task: &mut Task, start: WaitingStart, lower: Vec<String>) -> io::Result<()> {
        let record = &mut task.record;
        self.folders.save(record)?;
        record.groups.create(&start.spec.limits)?;
        let folder = self.folders.descriptor(&record.task)?;
        let assignment = Assignment {
            spec: start.spec,
            layers: lower,
            range: record.range,
            groups: record.groups.clone(),
        };
        let (ours, theirs) = Connection::pair()?;
        let mut descriptors = vec![
            self.programs.state.as_fd(),
            folder.as_fd(),
            self.programs.task_filters.as_fd(),
            self.programs.supervisor_filters.as_fd(),
        ];
        descriptors.extend(start.secrets.as_ref().map(AsFd::as_fd));
        ours.send(&ToSupervisor::Start(Box::new(assignment)), &descriptors)?;
        let name = CString::new(format!("{}", record.task)).unwrap_or_default();
        let argv = [CString::from(c"bulkhead-supervisor"), name];
        let process = sys::spawn(self.programs.program.as_fd(), theirs.as_fd(), &argv, &[])?;
        record.supervisor = ProcessId::of(process.pid).ok();
        task.control = Some(ours);
        Ok(())
    }

    /// Removes what a start has left. Nothing ran, or it was killed.
    fn undo(&mut self, record: &TaskRecord) {
        let removed = record.groups.kill().and_then(|_| record.groups.remove());
        if let Err(error) = removed.and_then(|_| self.folders.remove(&record.task)) {
            tracing::warn!(task.id = %record.task, %error, "could not clean up after a failed start");
        }
        self.ids.release(record.range);
    }

    pub(super) fn start_failed(&mut self, id: &TaskId, refusal: Refusal) {
        tracing::warn!(task.id = %id, reason = %refusal, "could not start a task");
        if let Some(mut task) = self.tasks.remove(id) {
            self.undo(&task.record);
            if let Some(asker) = task.start_asker.take() {
                self.answer(asker, Err(refusal), Vec::new());
            }
        }
    }
}
