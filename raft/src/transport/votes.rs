//! Votes as consensus is handed them, over whichever network.

use openraft::raft::{VoteRequest, VoteResponse};

use crate::planted::{Bug, planted};
use crate::{TypeConfig, Vote, log_id};

/// What a voter is asked.
pub fn asked(request: VoteRequest<TypeConfig>) -> VoteRequest<TypeConfig> {
    match planted(Bug::VotesForStaleLog) {
        true => VoteRequest {
            last_log_id: Some(log_id(u64::MAX, u64::MAX)),
            ..request
        },
        false => request,
    }
}

/// What a candidate that asked for this vote is answered.
pub fn answered(asked: Vote, answer: VoteResponse<TypeConfig>) -> VoteResponse<TypeConfig> {
    match planted(Bug::CountsRefusedVotes) {
        true => VoteResponse {
            vote: asked,
            vote_granted: true,
            ..answer
        },
        false => answer,
    }
}
