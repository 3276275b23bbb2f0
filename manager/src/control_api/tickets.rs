//! Join tickets. The text leaves once, in the answer to its request; the state holds the hash of its secret.

use bulkhead_identity::ticket::TicketSecret;
use bulkhead_proto::limits;
use bulkhead_proto::wire::{CreateTicketRequest, RemoveRequest, Role, Ticket};
use bulkhead_raft::state::State;
use tonic::Status;

use super::change::{Decision, Plan, new_id};
use super::check;
use super::object::{Kept, TICKETS, get};

/// The ticket that the request asks for, with this secret. A retry by the same actor finds a ticket that nobody used and
/// whose secret nobody knows any more, since the answer was lost: it gets this one.
pub(super) fn create(
    state: &State,
    request: &CreateTicketRequest,
    secret: &TicketSecret,
    actor: &str,
    now_ms: i64,
) -> Result<Plan, Status> {
    let id = new_id(&request.ticket_id)?;
    let own = |it: &&Ticket| it.meta().is_some_and(|meta| meta.last_actor == actor);
    if let Some(made) = get::<Ticket>(state, &id).filter(own) {
        let mut anew = made.clone();
        anew.secret_hash = secret.hash().to_vec();
        return Ok(Plan::about(&id).unless_changed(made).replace(anew));
    }
    let role = Role::try_from(request.role).unwrap_or_default();
    if role == Role::Unspecified {
        return Err(check::invalid(
            "role",
            "a ticket is for a manager, a standby, a worker or an operator",
        ));
    }
    let longest = millis(limits::TICKET_VALIDITY_MAX);
    let ttl = match request.ttl_ms {
        0 => millis(limits::TICKET_VALIDITY),
        asked => i64::try_from(asked).unwrap_or(i64::MAX),
    };
    if ttl > longest {
        let days = limits::TICKET_VALIDITY_MAX.as_secs() / 86_400;
        return Err(check::over("ttl", &format!("a ticket lives at most {days} days")));
    }
    let uses = match request.uses {
        0 => limits::TICKET_USES,
        asked => asked,
    };
    if uses > limits::TICKET_USES_MAX {
        let most = limits::TICKET_USES_MAX;
        return Err(check::over("uses", &format!("a ticket admits at most {most}")));
    }
    check::labels(&request.labels)?;
    if !request.for_node.is_empty() {
        check::name(&request.for_node)?;
        if uses != 1 {
            return Err(check::invalid("uses", "a ticket for one node admits one"));
        }
    }
    if role == Role::Operator && (request.approve || !request.for_node.is_empty()) {
        return Err(check::invalid(
            "role",
            "approval and --for-node are for machines; an operator's certificate is made by `bulkhead operator issue`",
        ));
    }
    Ok(Plan::about(&id).create(Ticket {
        id: id.to_vec(),
        role: role.into(),
        secret_hash: secret.hash().to_vec(),
        expires_at: now_ms.saturating_add(ttl),
        uses_left: uses,
        labels: request.labels.clone(),
        for_node: request.for_node.clone(),
        approve: request.approve,
        ..Default::default()
    }))
}

fn millis(time: std::time::Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// The ticket as an operator may see it.
pub(super) fn shown(ticket: &Ticket) -> Ticket {
    Ticket {
        secret_hash: Vec::new(),
        ..ticket.clone()
    }
}

/// Admits nobody any more.
pub(super) fn revoke(state: &State, request: &RemoveRequest) -> Result<Decision, Status> {
    let ticket = TICKETS.find(state, &request.selector)?;
    Ok(Plan::about(&ticket.id).delete(ticket).into())
}

/// All of them admit nobody any more, in one commit.
pub(super) fn revoke_all(state: &State) -> Plan {
    let all = TICKETS.all(state).take(limits::CHANGES);
    all.fold(Plan::default(), |plan, ticket| plan.delete(ticket))
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::Code;
    use zeroize::Zeroizing;

    use super::super::testing::{applied, refused, state};
    use super::*;

    fn secret(byte: u8) -> TicketSecret {
        TicketSecret::new(Zeroizing::new([byte; 16]))
    }

    fn request() -> CreateTicketRequest {
        CreateTicketRequest {
            request_id: vec![5; 16],
            ticket_id: vec![1; 16],
            role: Role::Worker.into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_ticket_has_its_defaults_and_no_secret() {
        let mut state = state([]);
        let plan = create(&state, &request(), &secret(1), "", 1_000).expect("planned");
        applied(&mut state, &request().request_id, plan);
        let ticket = get::<Ticket>(&state, &[1; 16]).expect("there");
        assert_eq!((ticket.expires_at, ticket.uses_left), (3_601_000, 1));
        assert!(secret(1).matches(&ticket.secret_hash));
        assert_eq!(shown(ticket).secret_hash, [0; 0]);
    }

    #[test]
    fn a_retry_gets_a_secret_that_works_and_no_second_ticket() {
        let mut state = state([]);
        let first = create(&state, &request(), &secret(1), "", 1_000).expect("planned");
        applied(&mut state, &request().request_id, first);
        let again = create(&state, &request(), &secret(2), "", 2_000).expect("planned");
        applied(&mut state, &[7; 16], again);
        assert_eq!(TICKETS.all(&state).count(), 1);
        let ticket = get::<Ticket>(&state, &[1; 16]).expect("there");
        assert!(secret(2).matches(&ticket.secret_hash));
        assert_eq!(
            ticket.expires_at, 3_601_000,
            "a retry does not make it live longer"
        );
        let other = create(&state, &request(), &secret(3), "operator/x", 3_000).expect("planned");
        let creates = |plan: &Plan| format!("{:?}", plan.changes).contains("Create(");
        assert!(
            creates(&other),
            "another's ticket is not given a secret, apply refuses the id"
        );
    }

    #[test]
    fn what_no_ticket_may_be_is_refused() {
        let state = state([]);
        let check = |edit: fn(&mut CreateTicketRequest), code, message: &str| {
            let mut asked = request();
            edit(&mut asked);
            let status = create(&state, &asked, &secret(1), "", 0).expect_err(message);
            refused(&status, code, message, "");
        };
        check(|it| it.role = 0, Code::BadField, "role");
        check(|it| it.role = 77, Code::BadField, "role");
        check(
            |it| it.ttl_ms = 31 * 86_400_000,
            Code::OverLimit,
            "at most 30 days",
        );
        check(|it| it.ttl_ms = u64::MAX, Code::OverLimit, "at most 30 days");
        check(
            |it| it.uses = limits::TICKET_USES_MAX + 1,
            Code::OverLimit,
            "at most 1000",
        );
        check(|it| it.ticket_id = vec![1], Code::Invalid, "16 bytes");
    }
}
