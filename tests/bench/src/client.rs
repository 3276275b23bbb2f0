//! An operator's side of the wire: the same client stack as the command line's, held open.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_identity::Identity;
use bulkhead_identity::seam::{Entropy as _, SystemEntropy};
use bulkhead_identity::store::KeyFile;
use bulkhead_identity::tls::{self, Expect};
use bulkhead_proto::limits;
use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::{ChangeResponse, CreateSecretRequest};
use tokio::time::{Instant, sleep};
use tonic::Status;
use tonic::transport::Channel;

/// The control service of one manager, over one connection.
pub(crate) type Control = ControlClient<Channel>;

/// The operator whose key `cluster init` wrote.
#[derive(Debug, Clone)]
pub(crate) struct Operator(Identity);

impl Operator {
    /// The key in a context's folder.
    pub(crate) fn load(key: &Path) -> anyhow::Result<Self> {
        let file = KeyFile::load(key)?;
        Ok(Self(Identity::new(file.credentials)?))
    }

    /// A connection of its own to the manager at this address; it is made at the first call.
    pub(crate) fn control(&self, address: &str) -> anyhow::Result<Control> {
        let channel = tls::channel(&self.0, address, Expect::AnyManager)?;
        Ok(ControlClient::new(channel)
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES))
    }
}

/// Sixteen random bytes: a new id.
pub(crate) fn new_id() -> anyhow::Result<Vec<u8>> {
    let mut id = vec![0; 16];
    SystemEntropy
        .fill(&mut id)
        .context("the system gave no random bytes")?;
    Ok(id)
}

/// A new secret with these bytes; its ids are chosen here, so it may be sent again.
pub(crate) fn secret(value: Vec<u8>) -> anyhow::Result<CreateSecretRequest> {
    let id = new_id()?;
    let digits: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(CreateSecretRequest {
        request_id: new_id()?,
        secret_id: id,
        name: format!("b{digits}"),
        value,
        labels: Vec::new(),
    })
}

/// Sends it once.
pub(crate) async fn create(
    control: &mut Control,
    secret: CreateSecretRequest,
) -> Result<ChangeResponse, Status> {
    Ok(control.create_secret(secret).await?.into_inner())
}

/// Waits until something holds, asking again and again, and says what did not come true.
pub(crate) async fn until(
    what: &str,
    limit: Duration,
    mut holds: impl AsyncFnMut() -> bool,
) -> anyhow::Result<()> {
    /// Short beside everything that is waited for, long beside what asking costs.
    const PAUSE: Duration = Duration::from_millis(5);
    let end = Instant::now() + limit;
    while !holds().await {
        anyhow::ensure!(Instant::now() < end, "{what}: not within {} s", limit.as_secs());
        sleep(PAUSE).await;
    }
    Ok(())
}
