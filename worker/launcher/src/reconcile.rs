//! After a restart: what is written down against what there is.
//!
//! A task whose supervisor lives is adopted; one whose supervisor is gone has ended; what
//! nobody wrote down is killed and removed, before anything new is started.

use crate::connection::Connection;
use crate::message::TaskState;
use crate::server::{Server, Task, lost};
use crate::tasks::{ProcessId, TaskRecord};
use std::collections::BTreeSet;
use std::io;

/// What to do about a task that was written down.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// Its end is recorded.
    Ended,
    /// Its supervisor answered: it runs.
    Adopt,
    /// Everything of it went with an earlier boot.
    GoneWithBoot,
    /// Its supervisor is gone without a record.
    Abandoned,
}

fn judge(record: &TaskRecord, boot_id: &str, ended: bool, answered_by: Option<ProcessId>) -> Verdict {
    let is_its_supervisor =
        |answered: ProcessId| record.supervisor.is_none_or(|supervisor| supervisor == answered);
    if ended {
        Verdict::Ended
    } else if record.boot_id != boot_id {
        Verdict::GoneWithBoot
    } else if answered_by.is_some_and(is_its_supervisor) {
        Verdict::Adopt
    } else {
        Verdict::Abandoned
    }
}

/// Fills the server with the tasks that there are.
pub(crate) fn reconcile(server: &mut Server, records: Vec<TaskRecord>) -> io::Result<()> {
    let mut known = BTreeSet::new();
    for mut record in records {
        let id = record.task.clone();
        known.insert(id.as_str().to_owned());
        let answer = server.folders.connect(&id).ok();
        let answered_by = answer.as_ref().and_then(|(_, pid)| ProcessId::of(*pid).ok());
        let ended = server.folders.exit(&id);
        match judge(&record, &server.boot_id, ended.is_some(), answered_by) {
            Verdict::Adopt => {
                tracing::info!(task.id = %id, "task adopted");
                record.supervisor = answered_by;
                let control = answer
                    .map(|(socket, _)| Connection::from_descriptor(socket))
                    .transpose()?;
                server
                    .tasks
                    .insert(id, Task::new(record, TaskState::Running, control));
            }
            verdict => {
                let end = match verdict {
                    Verdict::GoneWithBoot => lost("the machine was restarted"),
                    _ => ended.unwrap_or_else(|| lost("its supervisor ended without a record")),
                };
                record.groups.kill()?;
                server.folders.save_exit(&id, &end)?;
                server
                    .tasks
                    .insert(id.clone(), Task::new(record, TaskState::Running, None));
                server.ended(&id, end);
            }
        }
    }
    for stray in server
        .cgroups
        .existing()?
        .into_iter()
        .filter(|name| !known.contains(name))
    {
        tracing::warn!(group = %stray, "removing a group that belongs to no task");
        let groups = server.cgroups.of_task(&stray);
        groups.kill()?;
        groups.remove()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id_range::IMAGE_RANGE;
    use crate::message::TaskId;
    use crate::sandbox::cgroup::Cgroups;

    #[test]
    fn only_the_same_process_of_the_same_boot_is_adopted() {
        let supervisor = ProcessId {
            pid: 10,
            started: 100,
        };
        let record = TaskRecord {
            task: TaskId::try_from("t".to_owned()).expect("id"),
            epoch: 1,
            layers: Vec::new(),
            range: IMAGE_RANGE,
            groups: Cgroups::prepare(&[], "x").expect("none").of_task("t"),
            boot_id: "b1".into(),
            started_at_ms: 0,
            supervisor: Some(supervisor),
            pid: None,
        };
        let reused = ProcessId {
            pid: 10,
            started: 200,
        };
        assert_eq!(judge(&record, "b1", false, Some(supervisor)), Verdict::Adopt);
        assert_eq!(judge(&record, "b1", false, Some(reused)), Verdict::Abandoned);
        assert_eq!(judge(&record, "b1", false, None), Verdict::Abandoned);
        assert_eq!(
            judge(&record, "b2", false, Some(supervisor)),
            Verdict::GoneWithBoot
        );
        assert_eq!(judge(&record, "b1", true, None), Verdict::Ended);
        // The launcher died between starting a supervisor and writing down which: the socket in the
        // root-only folder tells.
        let unwritten = TaskRecord {
            supervisor: None,
            ..record
        };
        assert_eq!(judge(&unwritten, "b1", false, Some(supervisor)), Verdict::Adopt);
    }
}
