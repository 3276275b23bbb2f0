//! Tasks under their supervisors: what these tell, and what the worker asks of them.

use super::*;

impl Server {
    pub(super) fn hear_supervisors(&mut self) {
        let connected: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|(_, task)| task.control.is_some())
            .map(|(id, _)| id.clone())
            .collect();
        for id in connected {
            while let Some(news) = self.news_of(&id) {
                self.supervisor_said(&id, news);
            }
        }
    }

    /// What a supervisor said next; the loss of its connection is an end.
    fn news_of(&self, id: &TaskId) -> Option<(FromSupervisor, Vec<OwnedFd>)> {
        let control = self.tasks.get(id)?.control.as_ref()?;
        match control.receive() {
            Ok(Some(news)) => Some(news),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Ok(None) | Err(_) => Some((FromSupervisor::Exited(self.recorded_end(id)), Vec::new())),
        }
    }

    pub(crate) fn recorded_end(&self, id: &TaskId) -> ExitRecord {
        self.folders.exit(id).unwrap_or_else(|| {
            let end = lost("its supervisor ended without a record");
            if let Err(error) = self.folders.save_exit(id, &end) {
                tracing::warn!(task.id = %id, %error, "could not write down an end");
            }
            end
        })
    }

    fn supervisor_said(&mut self, id: &TaskId, (news, descriptors): (FromSupervisor, Vec<OwnedFd>)) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        match news {
            FromSupervisor::Started { pid } => {
                task.record.pid = Some(pid);
                task.state = TaskState::Running;
                let status = task.status();
                let asker = task.start_asker.take();
                if let Err(error) = self.folders.save(&task.record) {
                    tracing::warn!(task.id = %id, %error, "could not write down a start");
                }
                tracing::info!(task.id = %id, pid, "task runs");
                asker
                    .into_iter()
                    .for_each(|asker| self.answer(asker, Ok(Reply::Started(status.clone())), Vec::new()));
            }
            FromSupervisor::Failed(refusal) => self.start_failed(id, refusal),
            FromSupervisor::Sockets => {
                if let Some(asker) = task.socket_askers.pop_front() {
                    self.answer(asker, Ok(Reply::Sockets), descriptors);
                }
            }
            FromSupervisor::NoSockets(refusal) => {
                if let Some(asker) = task.socket_askers.pop_front() {
                    self.answer(asker, Err(refusal), Vec::new());
                }
            }
            FromSupervisor::Exited(end) if task.state == TaskState::Starting => {
                self.start_failed(id, Refusal::new(RefusalCode::StartFailed, end.message));
            }
            FromSupervisor::Exited(end) => self.ended(id, end),
        }
    }

    pub(crate) fn ended(&mut self, id: &TaskId, exit: ExitRecord) {
        let Some(task) = self.tasks.get_mut(id) else {
            return;
        };
        tracing::info!(task.id = %id, cause = ?exit.cause, out_of_memory = exit.out_of_memory, "task ended");
        task.control = None;
        task.state = TaskState::Exited(exit.clone());
        let epoch = task.record.epoch;
        let askers = std::mem::take(&mut task.socket_askers);
        if let Err(error) = task
            .record
            .groups
            .kill()
            .and_then(|_| task.record.groups.remove())
        {
            tracing::warn!(task.id = %id, %error, "could not remove control groups");
        }
        for asker in askers {
            self.answer(asker, Err(not_running(id)), Vec::new());
        }
        self.send(
            FromLauncher::Event(Event::Exited {
                task: id.clone(),
                epoch,
                exit,
            }),
            Vec::new(),
        );
    }

    pub(super) fn signal(&self, id: &TaskId, signal: TaskSignal) -> Result<Reply, Refusal> {
        let control = self.running(id)?;
        let message = match signal {
            TaskSignal::Term => ToSupervisor::Stop,
            TaskSignal::Kill => ToSupervisor::Kill,
        };
        control
            .send(&message, &[])
            .map(|()| Reply::Done)
            .map_err(|_| busy())
    }

    pub(super) fn ask_sockets(&mut self, asker: Asker, id: &TaskId, count: u32) -> Result<(), Refusal> {
        if !(1..=MAX_SOCKETS).contains(&count) {
            return Err(invalid("ask for 1 to 32 sockets"));
        }
        self.running(id)?
            .send(&ToSupervisor::Sockets { count }, &[])
            .map_err(|_| busy())?;
        if let Some(task) = self.tasks.get_mut(id) {
            task.socket_askers.push_back(asker);
        }
        Ok(())
    }

    fn running(&self, id: &TaskId) -> Result<&Connection, Refusal> {
        let task = self.tasks.get(id).ok_or_else(|| unknown_task(id))?;
        task.control
            .as_ref()
            .filter(|_| task.state == TaskState::Running)
            .ok_or_else(|| not_running(id))
    }

    pub(super) fn logs(&self, id: &TaskId) -> Result<Vec<OwnedFd>, Refusal> {
        if !self.tasks.contains_key(id) {
            return Err(unknown_task(id));
        }
        self.folders
            .logs(id)
            .map_err(|error| Refusal::new(RefusalCode::Internal, format!("could not open the log: {error}")))
    }

    pub(super) fn inspect(&self, id: &TaskId) -> Result<Reply, Refusal> {
        self.running(id)?;
        let record = &self.tasks[id].record;
        let pid = record.pid.ok_or_else(|| not_running(id))?;
        let profile = crate::profile::read(pid, &record.groups, &record.layers);
        profile
            .map(|profile| Reply::Profile(Box::new(profile)))
            .map_err(|_| not_running(id))
    }
}
