//! Every bound and default of the product, once: code, command line and documents read this table.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Bytes of one gRPC message, encoded.
pub const MESSAGE_BYTES: usize = 4 << 20;
/// Bytes of one transaction, encoded. A quarter of a message: an append of one entry always fits.
pub const TRANSACTION_BYTES: usize = 1 << 20;
/// Bytes of a secret.
pub const SECRET_BYTES: usize = 500 << 10;
/// Bytes of a certificate request; a P-256 one has about 300.
pub const CSR_BYTES: usize = 8 << 10;
/// Bytes of a ticket's text.
pub const TICKET_BYTES: usize = 256;
/// Bytes of an unlock key's text.
pub const UNLOCK_KEY_TEXT_BYTES: usize = 128;
/// Characters of an object's name: a DNS label (RFC 1035 §2.3.4).
pub const NAME_CHARS: usize = 63;
/// Characters of an image reference, repository and tag together.
pub const IMAGE_REFERENCE_CHARS: usize = 255;
/// Labels of one object.
pub const LABELS: usize = 64;
/// Characters of a label's key or value.
pub const LABEL_CHARS: usize = 255;
/// Environment variables of a service.
pub const ENVIRONMENT_ENTRIES: usize = 512;
/// Bytes of one environment variable, name and value.
pub const ENVIRONMENT_ENTRY_BYTES: usize = 32 << 10;
/// Arguments of a command.
pub const ARGUMENTS: usize = 512;
/// Bytes of one argument.
pub const ARGUMENT_BYTES: usize = 32 << 10;
/// The port that a manager listens on unless told otherwise.
pub const MANAGER_PORT: u16 = 7443;
/// Replicas of one service.
pub const REPLICAS: u32 = 10_000;
/// Secrets, published ports, constraints and tmpfs paths of one service, each.
pub const SPEC_LIST_ENTRIES: usize = 64;
/// Bytes of one service's spec, encoded.
pub const SPEC_BYTES: usize = 64 << 10;
/// Specs of one service that tasks may point to at once. With [`SPEC_BYTES`], a service fits a transaction.
pub const SPEC_VERSIONS: usize = 8;
/// Bytes of an image manifest or config (the distribution specification's 4 MiB is its upper bound).
pub const MANIFEST_BYTES: usize = 1 << 20;
/// Layers of an image.
pub const IMAGE_LAYERS: usize = 128;
/// Bytes of one blob.
pub const BLOB_BYTES: u64 = 4 << 30;
/// Bytes of one chunk of a blob or a log in a stream.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Objects that one list answers; a longer list is asked for page by page.
pub const LIST_ENTRIES: usize = 1_000;
/// Preconditions of one transaction.
pub const PRECONDITIONS: usize = 4_096;
/// Changes of one transaction.
pub const CHANGES: usize = 4_096;
/// Records of the audit log that managers keep; the oldest go first. About 4 MB on each manager and in each snapshot.
pub const AUDIT_RECORDS: usize = 10_000;
/// Characters of one text in an audit record; the rest is cut.
pub const AUDIT_TEXT_CHARS: usize = 255;
/// A node that tasks with a secret are placed on again and again makes one record of it in this time: doubling it halves
/// what a service that fails for ever writes into the log, and hides as much.
pub const AUDIT_ACCESS: Duration = Duration::from_secs(3_600);
/// Accesses of one transaction that are named one by one in the audit log, and secrets that are named with a number of
/// nodes beyond that: doubling it lets half as many large placements push everything else out of the log.
pub const AUDIT_ACCESSES: usize = 256;

/// Validity of a node's certificate.
pub const NODE_CERTIFICATE_VALIDITY: Duration = Duration::from_secs(90 * 86_400);
/// Validity of an operator's certificate.
pub const OPERATOR_CERTIFICATE_VALIDITY: Duration = Duration::from_secs(30 * 86_400);
/// Validity of the root.
pub const ROOT_VALIDITY: Duration = Duration::from_secs(3_653 * 86_400);
/// Certificates start this long before their issue, for clocks that lag.
pub const CERTIFICATE_BACKDATE: Duration = Duration::from_secs(60);
/// A node certificate is valid for this long at least, and at most.
pub const CERTIFICATE_VALIDITIES: RangeInclusive<Duration> =
    Duration::from_secs(5 * 60)..=Duration::from_secs(365 * 86_400);
/// How long after its certificate ended, or its root was rotated away, a node may come back by its committed key.
pub const RETURN_GRACE: Duration = Duration::from_secs(30 * 86_400);
/// Rotations of the root that a node may miss and still come back by its committed key. Each adds its cross-certificate, of
/// about 500 bytes, to what managers show those who come back; a chain may have six certificates in all.
pub const FORMER_ROOTS: usize = 4;
/// Superseded keys that a node's record remembers. With the default validity two of them can still open anything.
pub const SUPERSEDED_KEYS: usize = 8;
/// A connection that was opened with a superseded key this long after its successor was first seen is a clone's. Dialling
/// takes 15 s at most, and the clocks of two managers that serve are 60 s apart at most: halving it could call a node its own
/// clone, doubling it lets a clone in for longer.
pub const SUPERSEDED_GRACE: Duration = Duration::from_secs(90);
/// How long after a restore or a recovery a listed worker may come back with a key that the state does not know.
pub const RECOVERY_GRACE: Duration = Duration::from_secs(86_400);
/// Bytes of a backup: more than any state that a manager can hold.
pub const BACKUP_BYTES: u64 = 2 << 30;
/// Bytes of one chunk of a backup, in the clear: objects up to [`CHUNK_BYTES`], and the one that goes past it.
pub const BACKUP_CHUNK_BYTES: usize = CHUNK_BYTES + TRANSACTION_BYTES + (64 << 10);
/// Bytes of a backup's header.
pub const BACKUP_HEADER_BYTES: usize = 4 << 10;
/// Nodes and operators that one restore or recovery may be told to forget.
pub const FORGET_ENTRIES: usize = 256;
/// How long a root rotation waits for nodes, unless told otherwise.
pub const ROTATION_DEADLINE: Duration = Duration::from_secs(3_600);
/// What it may be told.
pub const ROTATION_DEADLINES: RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(30 * 86_400);
/// The key ring's newest epoch is replaced at this age, unless told otherwise.
pub const KEY_ROTATION: Duration = Duration::from_secs(90 * 86_400);
/// What it may be told.
pub const KEY_ROTATIONS: RangeInclusive<Duration> =
    Duration::from_secs(3_600)..=Duration::from_secs(3_653 * 86_400);
/// A given root is valid for this long at least: longer than any certificate that it signs.
pub const GIVEN_ROOT_LEFT: Duration = Duration::from_secs(366 * 86_400);
/// Characters of the address of an external signer.
pub const SIGNER_URL_CHARS: usize = 512;
/// Bytes of the certificate, DER, under which an external signer proves itself.
pub const SIGNER_CA_BYTES: usize = 8 << 10;
/// Bytes of an external signer's answer, headers apart; one has about 1 KiB.
pub const SIGNER_ANSWER_BYTES: usize = 64 << 10;
/// An external signer has answered within this time, from the name's lookup to the last byte. A node that renews waits 10 s.
pub const SIGNER_EXCHANGE: Duration = Duration::from_secs(5);
/// Exchanges of one manager with external signers at once; the others wait within their own time.
pub const SIGNER_EXCHANGES: usize = 16;
/// Each manager asks an external signer for a certificate that nobody gets this often, so that people hear that it fails
/// before nodes need it.
pub const SIGNER_CHECK: Duration = Duration::from_secs(300);
/// The same while it fails, so that what waits for it goes on.
pub const SIGNER_RETRY: Duration = Duration::from_secs(10);
/// Bytes of a file with one certificate or key in PEM, and whatever text stands around it.
pub const PEM_BYTES: usize = 64 << 10;
/// Lifetime of a ticket.
pub const TICKET_VALIDITY: Duration = Duration::from_secs(3_600);
/// Longest lifetime of a ticket.
pub const TICKET_VALIDITY_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Joins that one ticket admits.
pub const TICKET_USES: u32 = 1;
/// Most joins that one ticket may admit.
pub const TICKET_USES_MAX: u32 = 1_000;
/// Nodes that wait for approval with one ticket, and rejected keys that it remembers. Each is about 1 KiB of the ticket.
pub const TICKET_WAITING: usize = 64;

/// A follower calls an election after a random time in this range, in milliseconds, once it is as long as the range's end that a
/// leader gave a sign: before that it votes for nobody else. So an election begins 350 to 450 ms after the last sign, which
/// is seven signs that did not come. Halving it takes a manager that stalls on its disk or processor for lost; doubling it
/// doubles how long nobody leads after a crash.
pub const ELECTION_MS: std::ops::Range<u64> = 125..225;
/// A leader's sign of life. Halving it doubles idle traffic; doubling it leaves an election two lost packets away.
pub const HEARTBEAT: Duration = Duration::from_millis(50);
/// Every manager asks the leader for a read index this often.
pub const FRESHNESS_PERIOD: Duration = Duration::from_millis(150);
/// A replica is fresh this long after the question was sent.
pub const FRESHNESS: Duration = Duration::from_millis(500);
/// A stream closes this long after freshness ended.
pub const STREAM_GRACE: Duration = Duration::from_secs(1);
/// A worker without a sign of life for this long is down.
pub const WORKER_LIVENESS: Duration = Duration::from_millis(2_500);
/// A worker's sign of life on its stream.
pub const WORKER_HEARTBEAT: Duration = Duration::from_millis(500);
/// A session in which one end hears nothing of the other for this long is over: three beats, or three signs of life. More, and a
/// worker would count as down before it is back at another manager; less, and one late beat would end a good session.
pub const SESSION_SILENCE: Duration = Duration::from_millis(1_500);
/// What losing a reporter or a new leader adds to the liveness of a worker.
pub const LIVENESS_EXTENSION: Duration = Duration::from_secs(2);
/// How long a worker may take to be back with a manager where none could serve it for a while. It tries each in turn and
/// waits at most [`WORKER_RETRY`] between two rounds; a manager that is not there costs one try up to 5 s. One whose
/// certificate ended, or is of a former root, asks to be taken back after 5 s, again 5 s later where no manager could decide,
/// and 20 s later where one refused.
pub const WORKER_RETURN: Duration = Duration::from_secs(30);
/// The longest wait of a worker between two rounds of trying every manager.
pub const WORKER_RETRY: Duration = Duration::from_secs(5);
/// A manager whose clock is further from the median does not lead.
pub const CLOCK_SKEW: Duration = Duration::from_secs(30);
/// A node's record says anew how its clock goes when it moved by so much. Halving it doubles what a clock that drifts writes.
pub const CLOCK_MOVED: Duration = Duration::from_secs(1);
/// A TLS handshake ends within this time.
pub const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes under way at once, on one listener.
pub const HANDSHAKES: usize = 256;

/// Memory of a task, in bytes.
pub const TASK_MEMORY_BYTES: u64 = 256 << 20;
/// Processes of a task.
pub const TASK_PIDS: u32 = 512;
/// Size of a task's `/tmp`, in bytes.
pub const TASK_TMP_BYTES: u64 = 64 << 20;
/// A stopped task is started again after this delay.
pub const RESTART_DELAY: Duration = Duration::from_secs(5);
/// A task that is asked to stop is killed after this time.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
/// A replica must stay up this long for an update to go on.
pub const UPDATE_MONITOR: Duration = Duration::from_secs(5);
/// Replicas that an update replaces at once.
pub const UPDATE_PARALLELISM: u32 = 1;
/// Ended tasks that are kept for each slot.
pub const TASK_HISTORY: usize = 5;
/// `service create` gives up after this long when no node could ever fit.
pub const UNPLACEABLE_WAIT: Duration = Duration::from_secs(10);
/// An image's blob that nothing refers to goes after this time.
pub const BLOB_GRACE: Duration = Duration::from_secs(3_600);
/// Bytes of a task's log that a worker keeps, in two files of half of it.
pub const TASK_LOG_BYTES: u64 = 16 << 20;
/// Below this much free disk a manager refuses proposals.
pub const DISK_RESERVE_BYTES: u64 = 64 << 20;
