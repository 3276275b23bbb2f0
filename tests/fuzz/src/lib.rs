//! Every parser of bytes from outside, as a function of bytes: none may panic, hang or take memory without end, whatever it
//! gets, and what one accepts must read the same once it is written again.
//!
//! `make fuzz` drives them by coverage; `tests/twins.rs` with random and with damaged bytes, in every test run.

mod encoded;
mod text;

use bulkhead_raft::log_store::{frame, record};
use bulkhead_raft::state::{Decoder, State, chunks};

/// Something that reads bytes from outside.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Reads them; a panic is a finding.
    pub run: fn(&[u8]),
    /// Whether it reads text: its seeds are changed by characters then.
    pub text: bool,
    /// Bytes that it accepts, or nearly so, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

const fn target(name: &'static str, text: bool, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target {
        name,
        run,
        text,
        seeds,
    }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("ticket", true, text::ticket, text::tickets),
    target("unlock-key", true, text::unlock_key, text::unlock_keys),
    target("recovery-key", true, text::recovery_key, text::recovery_keys),
    target("ids", true, text::ids, text::all_ids),
    target("audit-head", true, text::audit_head, text::audit_heads),
    target("url", true, text::url, text::urls),
    target("constraint", true, text::constraint, text::constraints),
    target("quantity", true, text::quantity, text::quantities),
    target("scenario", true, text::scenario, text::scenarios),
    target("pem", true, text::pem, text::pems),
    target("manifest", true, text::manifest, text::manifests),
    target(
        "launcher-request",
        true,
        text::launcher_request,
        text::launcher_requests,
    ),
    target("csr", false, encoded::csr, encoded::csrs),
    target("certificate", false, encoded::certificate, encoded::certificates),
    target("bundle", false, encoded::bundle, encoded::bundles),
    target("key-file", false, encoded::key_file, encoded::key_files),
    target("backup", false, encoded::backup, encoded::backups),
    target("request", false, encoded::request, encoded::requests),
    target("spec", false, encoded::spec, encoded::specs),
    target("enrolment", false, encoded::enrolment, encoded::enrolments),
    target("reports", false, encoded::reports, encoded::all_reports),
    target("layer", false, encoded::layer, encoded::layers),
    target("task-log", false, encoded::task_log, encoded::task_logs),
    target("log-frame", false, log_frame, log_frames),
    target("log-record", false, log_record, log_records),
    target("snapshot", false, snapshot, snapshots),
    target("transaction", false, transaction, encoded::transactions),
    target("raft-message", false, raft_message, encoded::raft_messages),
];

fn log_frame(bytes: &[u8]) {
    if let Ok(frame) = frame::decode(bytes) {
        assert!(frame.bytes() <= bytes.len());
    }
}

fn log_frames() -> Vec<Vec<u8>> {
    let origin = frame::ChainHash::origin("log", &[7; 16]);
    let mut whole = vec![0; 200];
    let _too_long = frame::complete(&mut whole, 3, origin);
    vec![whole]
}

fn log_record(bytes: &[u8]) {
    // Each operation takes at least its tag, so there are no more than bytes.
    assert!(record::ops(bytes).take(bytes.len() + 2).count() <= bytes.len() + 1);
}

fn log_records() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    record::put_committed(&mut all, None);
    record::put_truncate(&mut all, None);
    record::put_checkpoint(&mut all, &record::Checkpoint::default());
    vec![all]
}

fn snapshot(bytes: &[u8]) {
    let Some((header, rest)) = bytes.split_at_checked(HEADER) else {
        assert!(Decoder::new(bytes).is_err());
        return;
    };
    let Ok(mut decoder) = Decoder::new(header) else {
        return;
    };
    if rest
        .chunks(1 << 10)
        .try_for_each(|chunk| decoder.push(chunk))
        .is_ok()
    {
        // Its digest vouches for it, so what it decodes to can be written again.
        if let Ok(state) = decoder.finish() {
            assert!(chunks(&state).count() > 0);
        }
    }
}

/// Bytes of a snapshot's first chunk.
const HEADER: usize = 8 + 8 + 8 + 32 + 8 + 32 + 8;

fn snapshots() -> Vec<Vec<u8>> {
    vec![chunks(&State::default()).flatten().collect()]
}

fn transaction(bytes: &[u8]) {
    // Two replicas that apply the same bytes come to the same state, whatever the bytes are.
    let run = || {
        let mut state = State::default();
        let applied = state
            .apply(1, 1, bytes)
            .map(drop)
            .map_err(|error| error.to_string());
        (applied, state.digest())
    };
    assert_eq!(run(), run());
}

fn raft_message(bytes: &[u8]) {
    bulkhead_raft::transport::read_every_message(bytes);
}
