//! The operator's key file: key, certificate, roots and the managers' addresses.

use std::path::Path;
use std::sync::Arc;

use bulkhead_identity::join::{self, Attempts, Enrolment};
use bulkhead_identity::seam::SystemClock;
use bulkhead_identity::store::KeyFile;
use bulkhead_identity::ticket::Ticket;
use bulkhead_identity::{Bundle, Certificate, Credentials, Identity, Key};
use bulkhead_proto::wire::{EnrolResponse, ManagerAddress};
use bulkhead_proto::{ClusterId, Role};
use tokio::sync::mpsc;

use crate::cluster::Checklist;
use crate::output::{Progress, text};
use crate::refusal::{Code, Refusal};

/// Steps of joining that may wait to be shown.
const STEPS: usize = 64;

/// Who the operator is; refused where the certificate's time is over.
pub(crate) fn load(path: &Path) -> Result<Identity, Refusal> {
    let file = read(path)?;
    let ends = file.credentials.certificate.not_after_ms();
    if ends <= text::now_ms() {
        let reason = format!("your certificate ended {}", text::distance(ends, text::now_ms()));
        let help = "have another operator issue a new one ('bulkhead operator issue'), or join with an operator \
                    ticket; on a manager's machine --socket works without a certificate";
        return Err(Refusal::new(
            Code::CertificateTime,
            path.display().to_string(),
            reason,
            help,
        ));
    }
    Identity::new(file.credentials).map_err(|e| damaged(path, &e.to_string()))
}

/// The cluster, and when the certificate ends.
pub(crate) fn subject(path: &Path) -> Result<(ClusterId, i64), Refusal> {
    let file = read(path)?;
    Ok((
        file.subject().cluster,
        file.credentials.certificate.not_after_ms(),
    ))
}

/// Writes a key with the certificate that the cluster gave for it; answers the managers' addresses.
pub(crate) fn save(path: &Path, key: Key, answer: &EnrolResponse) -> Result<Vec<String>, Refusal> {
    let refuse = |reason: String| {
        let help = "the manager's log says more; check that program and manager are of one version";
        Refusal::new(Code::WrongPeer, "certificate", reason, help)
    };
    let certificate = Certificate::from_der(&answer.certificate).map_err(|e| refuse(e.to_string()))?;
    let bundle = Bundle::from_ders(answer.roots.clone()).map_err(|e| refuse(e.to_string()))?;
    let credentials = Credentials {
        key,
        certificate,
        chain: answer.chain.clone(),
        bundle,
    };
    write(
        path,
        Arc::new(credentials),
        answer.name.clone(),
        answer.managers.clone(),
    )
}

/// Puts other credentials of the same operator into the file.
pub(crate) fn replace(path: &Path, credentials: Credentials) -> Result<Arc<Credentials>, Refusal> {
    let file = read(path)?;
    let credentials = Arc::new(credentials);
    let fits = Identity::new(credentials.clone()).map_err(|e| damaged(path, &e.to_string()))?;
    if fits.subject() != file.subject() {
        return Err(damaged(path, "the new certificate is another operator's"));
    }
    write(path, credentials.clone(), file.name, file.managers)?;
    Ok(credentials)
}

/// Copies another operator's key file; answers the managers' addresses.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<Vec<String>, Refusal> {
    let file = read(from)?;
    if file.subject().role != Role::Operator {
        let reason = format!("it is the key of a {}", file.subject().role);
        let help = "import a file that 'bulkhead operator issue -o' wrote";
        return Err(Refusal::new(
            Code::BadField,
            from.display().to_string(),
            reason,
            help,
        ));
    }
    write(to, file.credentials, file.name, file.managers)
}

/// Becomes an operator with a ticket; answers the managers' addresses.
pub(crate) async fn enrol(
    path: &Path,
    ticket: &str,
    addresses: Vec<String>,
    name: String,
    progress: &mut Progress<'_>,
) -> Result<Vec<String>, Refusal> {
    let ticket: Ticket = ticket
        .parse()
        .map_err(|e: bulkhead_identity::ticket::TicketError| {
            Refusal::new(Code::BadTicket, "ticket", e.to_string(), "copy the whole ticket")
        })?;
    let enrolment = Enrolment {
        ticket,
        addresses: addresses.clone(),
        role: Role::Operator,
        description: Default::default(),
        listen: String::new(),
        advertise: String::new(),
        name,
    };
    let (sender, mut steps) = mpsc::channel(STEPS);
    let mut checklist = Checklist::default();
    let shown = async {
        while let Some(step) = steps.recv().await {
            checklist.take(&step, &mut |step: &str, line: &str| progress.set(step, line));
        }
    };
    let clock = SystemClock::start();
    let attempts = Attempts::default();
    let joined = Box::pin(join::enrol(enrolment, &attempts, &clock, sender));
    let (joined, ()) = tokio::join!(joined, shown);
    let joined = joined.map_err(|e| Refusal::new(e.code(), "operator join", e.to_string(), e.hint()))?;
    let mut managers = write(path, Arc::new(joined.credentials), joined.name, joined.managers)?;
    if managers.is_empty() {
        managers = addresses;
    }
    Ok(managers)
}

fn read(path: &Path) -> Result<KeyFile, Refusal> {
    KeyFile::load(path).map_err(|e| damaged(path, &e.to_string()))
}

fn write(
    path: &Path,
    credentials: Arc<Credentials>,
    name: String,
    managers: Vec<ManagerAddress>,
) -> Result<Vec<String>, Refusal> {
    let addresses = managers
        .iter()
        .map(|m| m.address.clone())
        .filter(|a| !a.is_empty())
        .collect();
    let file = KeyFile {
        credentials,
        name,
        managers,
        manager: None,
        lock: None,
        standby: None,
    };
    file.save(path).map_err(|e| {
        let place = path.display().to_string();
        Refusal::new(
            Code::Unwritable,
            place,
            e.to_string(),
            "check the folder's owner and mode",
        )
    })?;
    Ok(addresses)
}

fn damaged(path: &Path, reason: &str) -> Refusal {
    let help = "make the context again: 'bulkhead context rm', then 'operator join' or 'context import'";
    Refusal::new(Code::Unreadable, path.display().to_string(), reason, help)
}
