//! How this manager becomes a standby, where an operator wants that: it takes a standby's certificate while it is still
//! heard, leaves the quorum as any manager does, and ends as a manager once the cluster calls it a standby.
//!
//! The standby's key file lies beside the manager's from the first step on, so that a crash at any point is gone on from.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_identity::store::{KeyFile, StandbyPart, StoreError};
use bulkhead_identity::{Bundle, Certificate, Credentials, Identity, Key};
use bulkhead_proto::wire::{
    AttendRequest, Availability, ManagerAddress, Node, RenewRequest, Role as WireRole,
};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::member::Member;
use super::{leaving, renewal, standby};
use crate::{ca, view};

/// How often it is looked whether there is something to do.
const LOOK: Duration = Duration::from_secs(1);
/// One call.
const CALL: Duration = Duration::from_secs(5);

/// Follows the operators' will until stopped, or until this is no manager any more.
pub(super) async fn follow(member: &Member, stop: &CancellationToken) {
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut question = None;
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let done = match next(member) {
            Step::Nothing => Ok(()),
            Step::Prepare => prepare(member, &mut question).await,
            Step::Leave => leave(member).await,
            Step::Ask => ask(member).await,
            Step::Forget => std::fs::remove_file(member.machine.next_keys()).map_err(anyhow::Error::from),
        };
        if let Err(error) = done {
            tracing::warn!(
                error = format!("{error:#}"),
                "this manager is to become a standby, and cannot yet"
            );
        }
    }
}

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Take a standby's certificate.
    Prepare,
    /// Leave the quorum.
    Leave,
    /// Ask the others what this node is: it cannot tell by itself any more.
    Ask,
    /// Nobody wants it any more: the standby's key file goes.
    Forget,
}

fn next(member: &Member) -> Step {
    let prepared = member.machine.next_keys().exists();
    let state = member.replica.state();
    let record = view::node(&state, member.node()).filter(|_| member.fresh.is_fresh());
    decide(record, prepared)
}

/// `record` is what is known for sure: none where this replica is not fresh.
fn decide(record: Option<&Node>, prepared: bool) -> Step {
    let wanted = record.map(|node| node.wanted_role() == WireRole::Standby);
    match (wanted, prepared) {
        (Some(true), false) => Step::Prepare,
        (Some(true), true) if record.is_some_and(|it| it.availability() != Availability::Drain) => {
            Step::Leave
        }
        (Some(true) | None, true) => Step::Ask,
        (Some(false), true) => Step::Forget,
        (Some(false) | None, false) => Step::Nothing,
    }
}

/// The question for a standby's certificate. It stays the same until the answer is on disk, so that each one that is lost
/// leaves no further key in this node's record.
struct Question {
    key: Key,
    request_id: Vec<u8>,
}

impl Question {
    fn new(member: &Member) -> anyhow::Result<Self> {
        let mut request_id = vec![0; 16];
        member.machine.entropy.fill(&mut request_id)?;
        Ok(Self {
            key: Key::generate()?,
            request_id,
        })
    }
}

async fn prepare(member: &Member, question: &mut Option<Question>) -> anyhow::Result<()> {
    let asked = match question {
        Some(asked) => asked,
        None => question.insert(Question::new(member)?),
    };
    let request = RenewRequest {
        csr: asked.key.csr()?,
        request_id: asked.request_id.clone(),
        role: WireRole::Standby.into(),
    };
    let key = asked.key.clone();
    let answer = match renewal::ask_managers(member, request).await {
        Ok(answer) => answer,
        Err(error) => {
            // The key may be the reason: the next question is for another.
            let status = error.downcast_ref::<Status>();
            if status.is_some_and(|it| it.code() == tonic::Code::PermissionDenied) {
                *question = None;
            }
            return Err(error);
        }
    };
    let credentials = Credentials {
        certificate: Certificate::from_der(&answer.certificate)?,
        chain: answer.chain,
        bundle: Bundle::from_ders(answer.roots)?,
        key,
    };
    let keys = KeyFile {
        credentials: Arc::new(credentials),
        name: member.keys(|keys| keys.name.clone()),
        managers: others(member),
        manager: None,
        lock: None,
        standby: Some(StandbyPart {
            listen: member.keys(|keys| {
                keys.manager
                    .as_ref()
                    .map_or_else(String::new, |it| it.listen.clone())
            }),
            advertise: member.advertise.clone(),
        }),
    };
    keys.save(&member.machine.next_keys())?;
    *question = None;
    tracing::info!(target: "audit", node = %member.node(), "this manager has a standby's certificate, and leaves the quorum");
    Ok(())
}

/// The leader lets it go, or says why not.
async fn leave(member: &Member) -> anyhow::Result<()> {
    Ok(leaving::ask(member).await?)
}

/// Asks as the standby that it is to be.
async fn ask(member: &Member) -> anyhow::Result<()> {
    let keys = match KeyFile::load(&member.machine.next_keys()) {
        Ok(keys) => keys,
        Err(error @ StoreError::Damaged { .. }) => {
            // It is asked for again while the cluster wants it.
            std::fs::remove_file(member.machine.next_keys())?;
            return Err(error.into());
        }
        Err(error) => return Err(error.into()),
    };
    let identity = Identity::new(keys.credentials.clone())?;
    for mut client in standby::clients(&identity, &keys.managers) {
        let request = AttendRequest { trusts: Vec::new() };
        if let Ok(Ok(answer)) = timeout(CALL, client.attend(request)).await {
            if answer.get_ref().role() == WireRole::Standby {
                tracing::info!(target: "audit", node = %member.node(), "this manager is a standby now");
                member.demoted.cancel();
            }
            return Ok(());
        }
    }
    Ok(()) // nobody answers, as it is while it restarts alone
}

fn others(member: &Member) -> Vec<ManagerAddress> {
    let own = member.node().to_wire();
    let mut all = ca::manager_addresses(&member.replica.state());
    all.retain(|it| it.node_id != own);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(wanted: WireRole, availability: Availability) -> Node {
        Node {
            wanted_role: wanted.into(),
            availability: availability.into(),
            ..Default::default()
        }
    }

    #[test]
    fn each_crash_is_gone_on_from() {
        let wanted = record(WireRole::Standby, Availability::Active);
        let leaving = record(WireRole::Standby, Availability::Drain);
        let own = record(WireRole::Unspecified, Availability::Active);
        for (record, prepared, step, what) in [
            (None, false, Step::Nothing, "a manager that hears nobody"),
            (Some(&own), false, Step::Nothing, "a manager"),
            (Some(&wanted), false, Step::Prepare, "first the certificate"),
            (Some(&wanted), true, Step::Leave, "then out of the quorum"),
            (Some(&leaving), true, Step::Ask, "until the record says standby"),
            (None, true, Step::Ask, "or nobody takes it for a manager any more"),
            (Some(&leaving), false, Step::Prepare, "a key file that was lost"),
            (Some(&own), true, Step::Forget, "an operator thought better of it"),
        ] {
            assert_eq!(decide(record, prepared), step, "{what}");
        }
    }
}
