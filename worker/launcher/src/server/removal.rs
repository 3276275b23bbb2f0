//! Forgetting ended tasks.

use super::*;

impl Server {
    pub(super) fn remove(&mut self, asker: Asker, id: &TaskId) -> Option<Result<Reply, Refusal>> {
        let Some(task) = self.tasks.get_mut(id) else {
            return Some(Ok(Reply::Done));
        };
        if !matches!(task.state, TaskState::Exited(_)) {
            return Some(Err(Refusal::new(
                RefusalCode::WrongState,
                format!("task {id} runs; stop it first"),
            )));
        }
        task.removers.push(asker);
        None
    }

    /// Forgets tasks that were asked to be, once neither a process nor a group of them is left: only then can
    /// another task have their ids.
    pub(super) fn clean_up(&mut self) {
        let asked: Vec<TaskId> = self
            .tasks
            .iter()
            .filter(|(_, task)| !task.removers.is_empty())
            .map(|(id, _)| id.clone())
            .collect();
        for id in asked {
            let record = &self.tasks[&id].record;
            let supervised =
                record.boot_id == self.boot_id && record.supervisor.is_some_and(ProcessId::is_alive);
            let gone = record.groups.kill().and_then(|_| record.groups.remove());
            let removed = match gone {
                Ok(true) if !supervised => self.folders.remove(&id),
                Ok(_) => continue,
                Err(error) => Err(error),
            };
            let Some(task) = self.tasks.remove(&id) else {
                continue;
            };
            let result = match removed {
                Ok(()) => {
                    self.ids.release(task.record.range);
                    Ok(Reply::Done)
                }
                Err(error) => Err(Refusal::new(
                    RefusalCode::Internal,
                    format!("could not remove the task: {error}"),
                )),
            };
            for asker in &task.removers {
                self.answer(*asker, result.clone(), Vec::new());
            }
            if result.is_err() {
                self.tasks.insert(
                    id,
                    Task {
                        removers: Vec::new(),
                        ..task
                    },
                );
            }
        }
    }
}
