//! What a worker knows of one task: a state that only rises, and what was seen of it.
//!
//! Only the worker that owns a task writes this; what is wanted of the task is the managers' to say. The two
//! meet in [`crate::agent::plan`].

use bulkhead_launcher::message::{ExitCause, ExitRecord};
use bulkhead_proto::wire;
use serde::{Deserialize, Serialize};

/// Where a task stands on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum State {
    /// It was given to this node.
    Assigned,
    /// Its image is being fetched and unpacked.
    Preparing,
    /// The launcher was asked to start it. From here on it may have run, so this id is never started again.
    Starting,
    /// Its program was executed.
    Running,
    /// It ended by itself with exit code 0.
    Complete,
    /// It ended because that was asked.
    Shutdown,
    /// It ended otherwise.
    Failed,
    /// This node could not start it.
    Rejected,
}

/// Something that happened to a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Work on its image began.
    Preparing,
    /// The launcher is about to be asked.
    Starting,
    /// The launcher reports it running.
    Running {
        /// Its process on the host.
        pid: u32,
    },
    /// The launcher reports its end.
    Exited {
        /// How.
        exit: ExitRecord,
        /// Whether a stop had been asked, so that any exit code is the expected one.
        asked: bool,
    },
    /// It cannot be started here.
    Refused {
        /// What, why, and what to do.
        reason: String,
    },
    /// It is no longer wanted and never ran.
    Unwanted,
    /// It was running and the launcher no longer knows it.
    Vanished,
}

impl State {
    /// Whether nothing more can happen to the task.
    pub fn is_final(self) -> bool {
        match self {
            State::Assigned | State::Preparing | State::Starting | State::Running => false,
            State::Complete | State::Shutdown | State::Failed | State::Rejected => true,
        }
    }

    /// The state after `event`; `None` when the event is late or tells nothing new.
    pub fn next(self, event: &Event) -> Option<State> {
        if self.is_final() {
            return None;
        }
        let after = match event {
            Event::Preparing => State::Preparing,
            Event::Starting => State::Starting,
            Event::Running { .. } => State::Running,
            Event::Exited { exit, asked } => outcome(exit, *asked),
            Event::Refused { .. } => State::Rejected,
            Event::Unwanted => State::Shutdown,
            Event::Vanished => State::Failed,
        };
        (after > self).then_some(after)
    }

    /// The same word on the wire.
    pub fn to_wire(self) -> wire::TaskState {
        match self {
            State::Assigned => wire::TaskState::Assigned,
            State::Preparing => wire::TaskState::Preparing,
            State::Starting => wire::TaskState::Starting,
            State::Running => wire::TaskState::Running,
            State::Complete => wire::TaskState::Complete,
            State::Shutdown => wire::TaskState::Shutdown,
            State::Failed => wire::TaskState::Failed,
            State::Rejected => wire::TaskState::Rejected,
        }
    }
}

/// What an exit means. A task that was asked to stop is never *failed*: most programs end by the signal, and a
/// restart policy would otherwise bring back what an operator has just stopped.
fn outcome(exit: &ExitRecord, asked: bool) -> State {
    match exit.cause {
        _ if asked => State::Shutdown,
        ExitCause::NeverRan => State::Rejected,
        ExitCause::Code(0) if !exit.out_of_memory => State::Complete,
        ExitCause::Code(_) | ExitCause::Signal(_) | ExitCause::Lost => State::Failed,
    }
}

/// A task's state with what was seen of it: what is reported, and what is remembered across a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Where it stands.
    pub state: State,
    /// When this state was seen, in milliseconds since 1970.
    pub at_ms: i64,
    /// Why, or what is wrong with it, for people.
    pub message: String,
    /// The exit code, when it exited by itself.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether it ran out of memory.
    pub out_of_memory: bool,
    /// Its process on the host; 0 before it ran.
    pub pid: u32,
    /// Its sandbox as the kernel reports it, as JSON; empty before it ran.
    #[serde(default)]
    pub profile: String,
}

impl Observed {
    /// A task that was just given to this node.
    pub fn assigned(now_ms: i64) -> Self {
        Observed {
            state: State::Assigned,
            at_ms: now_ms,
            message: String::new(),
            exit_code: None,
            signal: None,
            out_of_memory: false,
            pid: 0,
            profile: String::new(),
        }
    }

    /// What is known after `event`; `None` when it changes nothing.
    pub fn after(&self, event: &Event, now_ms: i64) -> Option<Observed> {
        let state = self.state.next(event)?;
        let mut seen = Observed {
            state,
            at_ms: now_ms.max(self.at_ms), // a clock set back must not reorder what was seen
            message: String::new(),
            ..self.clone()
        };
        match event {
            Event::Preparing | Event::Starting => {}
            Event::Running { pid } => seen.pid = *pid,
            Event::Exited { exit, .. } => seen.exited(exit),
            Event::Refused { reason } => seen.message.clone_from(reason),
            Event::Unwanted => seen.message = "stopped before it ran".into(),
            Event::Vanished => {
                seen.message =
                    "its supervisor is gone: the host was restarted, or the task was ended from outside"
                        .into();
            }
        }
        Some(seen)
    }

    fn exited(&mut self, exit: &ExitRecord) {
        self.at_ms = i64::try_from(exit.ended_at_ms).unwrap_or(self.at_ms);
        self.out_of_memory = exit.out_of_memory;
        let text = match exit.cause {
            ExitCause::Code(code) => {
                self.exit_code = Some(code);
                format!("exited with code {code}")
            }
            ExitCause::Signal(signal) => {
                self.signal = Some(signal);
                format!("ended by signal {signal}")
            }
            ExitCause::NeverRan => "could not be started".into(),
            ExitCause::Lost => "ended while nobody watched".into(),
        };
        self.message = if exit.message.is_empty() {
            text
        } else {
            exit.message.clone()
        };
    }

    /// As it is reported.
    pub fn to_wire(&self) -> wire::TaskStatus {
        wire::TaskStatus {
            state: self.state.to_wire().into(),
            at: self.at_ms,
            message: self.message.clone(),
            exit_code: self.exit_code,
            signal: self.signal,
            out_of_memory: self.out_of_memory,
            pid: self.pid,
            profile: self.profile.clone().into_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exit(cause: ExitCause, out_of_memory: bool) -> ExitRecord {
        ExitRecord {
            cause,
            out_of_memory,
            ended_at_ms: 7,
            message: String::new(),
        }
    }

    #[test]
    fn an_exit_means() {
        let cases = [
            (ExitCause::Code(0), false, false, State::Complete),
            (ExitCause::Code(0), true, false, State::Failed),
            (ExitCause::Code(1), false, false, State::Failed),
            (ExitCause::Signal(9), true, false, State::Failed),
            (ExitCause::Signal(15), false, true, State::Shutdown),
            (ExitCause::Code(143), false, true, State::Shutdown),
            (ExitCause::NeverRan, false, false, State::Rejected),
            (ExitCause::Lost, false, false, State::Failed),
        ];
        for (cause, out_of_memory, asked, expected) in cases {
            let event = Event::Exited {
                exit: exit(cause.clone(), out_of_memory),
                asked,
            };
            assert_eq!(
                State::Running.next(&event),
                Some(expected),
                "{cause:?} asked={asked}"
            );
        }
    }

    #[test]
    fn the_end_keeps_how_it_came() {
        let running = Observed::assigned(1)
            .after(&Event::Running { pid: 42 }, 2)
            .expect("runs");
        let event = Event::Exited {
            exit: exit(ExitCause::Signal(9), true),
            asked: false,
        };
        let ended = running.after(&event, 9).expect("ends");
        assert_eq!(
            (ended.signal, ended.out_of_memory, ended.pid, ended.at_ms),
            (Some(9), true, 42, 7)
        );
        assert_eq!(ended.message, "ended by signal 9");
        assert_eq!(ended.after(&Event::Vanished, 10), None, "an end is final");
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Preparing),
            Just(Event::Starting),
            Just(Event::Running { pid: 1 }),
            (-2..3i32, any::<bool>()).prop_map(|(code, asked)| Event::Exited {
                exit: exit(ExitCause::Code(code), false),
                asked
            }),
            Just(Event::Refused { reason: "no".into() }),
            Just(Event::Unwanted),
            Just(Event::Vanished),
        ]
    }

    proptest! {
        #[test]
        fn a_state_only_rises_and_an_end_stays(events in proptest::collection::vec(any_event(), 0..12)) {
            let mut seen = Observed::assigned(0);
            for event in events {
                if let Some(next) = seen.after(&event, 5) {
                    prop_assert!(!seen.state.is_final());
                    prop_assert!((next.state.to_wire() as i32) > (seen.state.to_wire() as i32));
                    seen = next;
                }
            }
        }
    }
}
