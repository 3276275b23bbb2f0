//! A manager's own certificate: renewed long before it ends, by whichever manager answers.

use std::time::Duration;

use bulkhead_identity::tls::{self, Expect};
use bulkhead_identity::{Bundle, Certificate, Credentials, Key, renewal};
use bulkhead_proto::limits;
use bulkhead_proto::wire::{RenewRequest, RenewResponse, Role, dispatcher_client::DispatcherClient};
use bulkhead_raft::Member as RaftMember;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::member::Member;

/// The clock may jump: it is looked at this often at least.
const LOOK: Duration = Duration::from_secs(60);
/// After a failed try.
const RETRY: Duration = Duration::from_secs(10);
/// One call.
const CALL: Duration = Duration::from_secs(15);

/// Renews until stopped.
pub(super) async fn renew(member: &Member, stop: &CancellationToken) {
    loop {
        let current = member.identity.current();
        let jitter = jitter(member);
        let due = renewal::due_at(
            current.certificate.not_before_ms(),
            current.certificate.not_after_ms(),
            jitter,
        );
        while member.machine.now_ms() < due {
            let left = u64::try_from(due - member.machine.now_ms()).unwrap_or(0);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = sleep(LOOK.min(Duration::from_millis(left))) => {}
            }
        }
        while !once(member).await {
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = sleep(RETRY) => {}
            }
        }
    }
}

pub(super) async fn once(member: &Member) -> bool {
    let _turn = member.turn().await;
    for client in managers(member) {
        match timeout(CALL, ask(member, client)).await {
            Ok(Ok(())) => {
                tracing::info!(target: "audit", node = %member.node(), "certificate renewed");
                return true;
            }
            Ok(Err(error)) => tracing::warn!(error = format!("{error:#}"), "the certificate was not renewed"),
            Err(_) => tracing::warn!("the certificate was not renewed: a manager takes too long"),
        }
    }
    false
}

async fn ask(member: &Member, mut client: DispatcherClient<Channel>) -> anyhow::Result<()> {
    let key = Key::generate()?;
    let mut request_id = vec![0; 16];
    member.machine.entropy.fill(&mut request_id)?;
    let request = RenewRequest {
        csr: key.csr()?,
        request_id,
        role: Role::Unspecified.into(),
    };
    let response = client.renew(request).await?.into_inner();
    let current = member.identity.current();
    let credentials = Credentials {
        key,
        certificate: Certificate::from_der(&response.certificate)?,
        chain: response.chain,
        bundle: Bundle::from_ders(response.roots)?.with_former(current.bundle.former())?,
    };
    Ok(member.renewed(credentials)?)
}

/// The answer of the first manager that gives one.
pub(super) async fn ask_managers(member: &Member, request: RenewRequest) -> anyhow::Result<RenewResponse> {
    let mut last = anyhow::anyhow!("no manager answers");
    for mut client in managers(member) {
        match timeout(CALL, client.renew(request.clone())).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) => last = status.into(),
            Err(_) => {}
        }
    }
    Err(last)
}

/// This manager first: it needs no other's network.
fn managers(member: &Member) -> Vec<DispatcherClient<Channel>> {
    let own = RaftMember {
        node: member.node(),
        address: member.advertise.clone(),
    };
    let members = member.replica.members();
    let others = members.nodes.values().filter(|other| other.node != own.node);
    [&own]
        .into_iter()
        .chain(others)
        .filter_map(|manager| {
            tls::channel(&member.identity, &manager.address, Expect::Manager(manager.node)).ok()
        })
        .map(|channel| DispatcherClient::new(channel).max_decoding_message_size(limits::MESSAGE_BYTES))
        .collect()
}

fn jitter(member: &Member) -> u64 {
    let mut bytes = [0; 8];
    // Without random bytes it renews at the earliest time.
    member
        .machine
        .entropy
        .fill(&mut bytes)
        .map_or(0, |()| u64::from_le_bytes(bytes))
}
