//! What clients do meanwhile: write, write conditionally, read; and note what each was told.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use bulkhead_proto::wire::{
    Change, Kind, Object, Outcome, Precondition, Secret, Transaction, VersionIs, change::Change as Step,
    object::Object as Any, precondition::Precondition as Condition,
};
use bulkhead_raft::state::{Key, State};
use bulkhead_raft::{ProposeError, Replica};
use bytes::Bytes;
use prost::Message as _;
use tokio::time::{sleep, timeout};

use super::cluster::Live;
use super::dice::Dice;
use super::record::{Answer, Id, Record};
use crate::check::{Action, Told};
use crate::rules::Rule;

/// A client waits so long for a program that does not go on.
const PATIENCE: Duration = Duration::from_millis(500);
/// The objects that conditional writes contend for.
const REGISTERS: u64 = 2;

pub(super) fn id(client: u64, number: u64) -> Id {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&client.to_be_bytes());
    id[8..].copy_from_slice(&number.to_be_bytes());
    id
}

fn register(number: u64) -> Id {
    id(u64::MAX, number)
}

pub(super) fn secret(id: Id, size: u32) -> Secret {
    Secret {
        id: id.to_vec(),
        name: id.iter().map(|byte| format!("{byte:02x}")).collect(),
        size,
        ..Default::default()
    }
}

pub(super) fn object(secret: Secret) -> Object {
    Object {
        object: Some(Any::Secret(secret)),
    }
}

pub(super) fn transaction(request: Id, preconditions: Vec<Precondition>, step: Step) -> Bytes {
    let transaction = Transaction {
        level: 1,
        request_id: request.to_vec(),
        preconditions,
        changes: vec![Change { change: Some(step) }],
        ..Default::default()
    };
    transaction.encode_to_vec().into()
}

/// The version of a register, and its value.
pub(super) fn register_of(state: &State, id: Id) -> Option<(u64, u64)> {
    match state.get(Key::new(Kind::Secret, id))?.object.as_ref()? {
        Any::Secret(secret) => Some((secret.meta.as_ref()?.version, secret.size.into())),
        _ => None,
    }
}

/// As `Replica::wait_applied`, at fixed times: several that wait on one watch wake in no fixed order.
async fn applied(replica: &Replica, index: u64) {
    while !replica.has_applied(index) {
        sleep(Duration::from_millis(1)).await;
    }
}

/// Asks a program that may be stopped. A client does not wait for one that is: whatever became of its question is
/// unknown then.
async fn ask<T>(live: &Live, replica: &Replica, question: impl Future<Output = T>) -> Option<T> {
    let gate = live.gate(replica.member());
    let mut asked = pin!(gate.clone().hold(question));
    loop {
        match timeout(PATIENCE, &mut asked).await {
            Ok(answer) => return Some(answer),
            Err(_) if gate.is_closed() => return None,
            Err(_) => {}
        }
    }
}

/// One client. It goes on until its task is aborted.
pub(super) struct Client {
    pub(super) number: u64,
    pub(super) dice: Dice,
    pub(super) live: Live,
    pub(super) record: Record,
    pub(super) written: u64,
}

impl Client {
    pub(super) async fn run(mut self) {
        loop {
            sleep(self.dice.micros(2_000, 60_000)).await;
            let Some((member, replica)) = self.somebody() else {
                continue;
            };
            match self.dice.below(10) {
                0 => self.read(member, &replica).await,
                1 | 2 => self.swap(&replica).await,
                _ => drop(self.write(&replica).await),
            }
        }
    }

    /// Mostly the leader; sometimes anybody, as after a change of leaders.
    fn somebody(&self) -> Option<(u64, Replica)> {
        let leader = self.live.leader();
        if leader.is_some() && !self.dice.percent(10) {
            return leader;
        }
        self.anybody()
    }

    fn anybody(&self) -> Option<(u64, Replica)> {
        let member = self.dice.pick(&self.live.members())?;
        Some((member, self.live.get(member)?))
    }

    async fn propose(&self, replica: &Replica, bytes: Bytes) -> Result<Outcome, ProposeError> {
        ask(&self.live, replica, replica.propose(bytes))
            .await
            .unwrap_or(Err(ProposeError::Unknown))
    }

    /// Creates an object of its own; gives its index where it was acknowledged.
    pub(super) async fn write(&mut self, replica: &Replica) -> Option<u64> {
        self.written += 1;
        let id = id(self.number, self.written);
        let bytes = transaction(id, Vec::new(), Step::Create(object(secret(id, 0))));
        let mut asked = self.propose(replica, bytes.clone()).await;
        // As a client whose answer was lost: the same request again, which must not count twice.
        let again = self.dice.percent(5);
        if again && (asked.is_ok() || asked == Err(ProposeError::Unknown)) {
            sleep(self.dice.micros(1_000, 50_000)).await;
            self.record.count(|counts| counts.repeats += 1);
            asked = match (asked, self.propose(replica, bytes).await) {
                // The first answer stands where the second does not say more.
                (first, Err(_)) => first,
                (_, second) => second,
            };
        }
        let told = (self.number, self.written);
        match asked {
            Ok(Outcome {
                index,
                rejection: None,
            }) => {
                self.record.note(format_args!("write {told:?} is at {index}"));
                self.record.accepted(id, index);
                return Some(index);
            }
            // Nobody else creates it.
            Ok(outcome) => self
                .record
                .violation(Rule::OneSuccessor, format_args!("write {told:?} got {outcome:?}")),
            Err(ProposeError::Unknown | ProposeError::Stopped) => {
                self.record.count(|counts| counts.unknown += 1);
            }
            Err(_) => self.record.refused(id),
        }
        None
    }

    /// Replaces a register on the condition that nobody did since.
    async fn swap(&mut self, replica: &Replica) {
        let register = register(self.dice.below(2) as u64 % REGISTERS);
        self.written += 1;
        let request = id(self.number, self.written);
        let value = self.value();
        let seen = register_of(&replica.state(), register);
        let bytes = match seen {
            None => transaction(request, Vec::new(), Step::Create(object(secret(register, value)))),
            Some((version, _)) => {
                let is = VersionIs {
                    object: Some(Key::new(Kind::Secret, register).to_wire()),
                    version,
                };
                let unchanged = Precondition {
                    precondition: Some(Condition::VersionIs(is)),
                };
                transaction(
                    request,
                    vec![unchanged],
                    Step::Replace(object(secret(register, value))),
                )
            }
        };
        let action = Action::Swap {
            from: seen.map(|(_, value)| value),
            to: value.into(),
        };
        let number = self.record.called(register, action);
        let answer = match self.propose(replica, bytes).await {
            Ok(Outcome { index, rejection }) => {
                let done = rejection.is_none();
                if let (true, Some((version, _))) = (done, seen) {
                    self.record.swapped(register, version);
                }
                Answer::Told(if done { Told::Done } else { Told::Stale }, Some(index))
            }
            Err(ProposeError::Unknown | ProposeError::Stopped) => Answer::Told(Told::Unknown, None),
            Err(_) => Answer::Never,
        };
        self.record.returned(register, number, answer);
    }

    /// A value that no other write has.
    fn value(&self) -> u32 {
        u32::try_from(self.number * 1_000_000 + self.written).unwrap_or(u32::MAX)
    }

    async fn read(&self, member: u64, replica: &Replica) {
        let newest = self.record.newest();
        let called = self.record.now_us();
        let Some(Ok(index)) = ask(&self.live, replica, replica.read_index()).await else {
            return;
        };
        // A manager that does not lead asks the one that does, and answers from a state of its own that is as new.
        let (member, replica) = match self.anybody() {
            Some(other) if self.dice.percent(50) => other,
            _ => (member, replica.clone()),
        };
        let question = async {
            let applied = timeout(Duration::from_secs(2), applied(&replica, index)).await;
            applied.is_ok().then(|| replica.state())
        };
        if let Some(Some(state)) = ask(&self.live, &replica, question).await {
            self.record.read(member, newest, index, &state);
            for number in 0..REGISTERS {
                let register = register(number);
                let value = register_of(&state, register).map(|(_, value)| value);
                self.record.looked(register, called, value, state.index());
            }
        }
    }
}
