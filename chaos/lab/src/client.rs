//! An operator's side of the wire: the same client stack as the command line's, held open.

use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bulkhead_identity::comeback::come_back;
use bulkhead_identity::follow::{Due, Told, due, renew};
use bulkhead_identity::seam::{Entropy as _, SystemEntropy};
use bulkhead_identity::store::KeyFile;
use bulkhead_identity::tls::{self, Expect};
use bulkhead_identity::{Bundle, Credentials, Identity};
use bulkhead_proto::limits;
use bulkhead_proto::wire::control_client::ControlClient;
use bulkhead_proto::wire::{ChangeResponse, ClusterStatus, CreateSecretRequest};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};
use tonic::Status;
use tonic::transport::Channel;
use zeroize::Zeroizing;

/// The control service of one manager, over one connection.
pub type Control = ControlClient<Channel>;

/// The operator whose key `cluster init` wrote. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Operator {
    identity: Identity,
    file: PathBuf,
    /// The file of another user, of which `file` is a copy.
    original: Option<PathBuf>,
    /// Who follows: one at a time, since a newer key takes the place of an older one.
    follows: Arc<Mutex<()>>,
}

impl Operator {
    /// The key in a context's folder.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn load(key: &Path) -> anyhow::Result<Self> {
        let file = KeyFile::load(key)?;
        Ok(Self {
            identity: Identity::new(file.credentials)?,
            file: key.to_owned(),
            original: None,
            follows: Arc::default(),
        })
    }

    /// The key in a context's folder of another user, which only its owner's programs read: a copy is used, in a folder of
    /// this program's own, and what changes is written back.
    ///
    /// # Errors
    /// Where it cannot be read or copied.
    pub fn borrow(key: &Path, own: &Path) -> anyhow::Result<Self> {
        let copy = own.join("operator.key");
        let content = Zeroizing::new(std::fs::read(key)?);
        private(&copy, &content)?;
        Ok(Self {
            original: Some(key.to_owned()),
            ..Self::load(&copy)?
        })
    }

    /// A connection of its own to the manager at this address; it is made at the first call.
    ///
    /// # Errors
    /// Where the address is none.
    pub fn control(&self, address: &str) -> anyhow::Result<Control> {
        Ok(ControlClient::new(self.channel(address)?)
            .max_decoding_message_size(limits::MESSAGE_BYTES)
            .max_encoding_message_size(limits::MESSAGE_BYTES))
    }

    /// Rises with each new key or trust.
    fn version(&self) -> u64 {
        *self.identity.changed().borrow()
    }

    fn channel(&self, address: &str) -> anyhow::Result<Channel> {
        Ok(tls::channel(&self.identity, address, Expect::AnyManager)?)
    }

    /// Trusts what the cluster trusts, and has a certificate of the root that signs, as a context does with each command:
    /// once after a rotation. New connections are made with it.
    ///
    /// # Errors
    /// Where no certificate is to be had now, or the key file cannot be written.
    pub async fn follow(&self, address: &str, status: &ClusterStatus) -> anyhow::Result<()> {
        let told = Told {
            roots: &status.roots,
            former: None,
            issuer: &status.issuer,
        };
        let _alone = self.follows.lock().await;
        let mut current = self.identity.current();
        if due(&current, &told) == Some(Due::Trust) {
            self.take(current.with_bundle(Bundle::from_ders(status.roots.clone())?))?;
            current = self.identity.current();
        }
        if due(&current, &told) == Some(Due::Renew) {
            self.take(renew(self.channel(address)?, &SystemEntropy).await?)?;
        }
        Ok(())
    }

    /// Comes back by its key, where a rotation was over before it could follow.
    ///
    /// # Errors
    /// Where the manager does not take it back.
    pub async fn come_back(&self, address: &str) -> anyhow::Result<()> {
        let _alone = self.follows.lock().await;
        let current = self.identity.current();
        self.take(come_back(&current, address, Expect::AnyManager, &SystemEntropy).await?)
    }

    /// Keeps credentials, for this program and for the command line that uses the same file.
    fn take(&self, credentials: Credentials) -> anyhow::Result<()> {
        let mut file = KeyFile::load(&self.file)?;
        file.credentials = Arc::new(credentials);
        file.save(&self.file)?;
        if let Some(original) = &self.original {
            let owner = std::fs::metadata(original)?;
            let next = original.with_extension("next");
            let _ = std::fs::remove_file(&next); // of a program that ended in between
            private(&next, &Zeroizing::new(std::fs::read(&self.file)?))?;
            chown(&next, Some(owner.uid()), Some(owner.gid()))?;
            std::fs::rename(&next, original)?;
        }
        self.identity.replace(file.credentials)?;
        Ok(())
    }
}

/// Writes a new file that is its owner's alone.
fn private(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Connections of one client to each manager. Those of a key that another one took the place of are made anew.
#[derive(Debug, Clone)]
pub struct Managers {
    operator: Operator,
    endpoints: Vec<String>,
    controls: Vec<Control>,
    /// Of the operator's identity, when they were made.
    version: u64,
}

impl Managers {
    /// To the managers at these addresses; each is connected to at the first call.
    ///
    /// # Errors
    /// Where an address is none.
    pub fn new(operator: Operator, endpoints: Vec<String>) -> anyhow::Result<Self> {
        let mut managers = Self {
            version: operator.version(),
            controls: Vec::new(),
            operator,
            endpoints,
        };
        managers.connect()?;
        Ok(managers)
    }

    fn connect(&mut self) -> anyhow::Result<()> {
        let controls = self.endpoints.iter().map(|at| self.operator.control(at));
        self.controls = controls.collect::<anyhow::Result<_>>()?;
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.endpoints.len()
    }

    /// The operator.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    /// The address of one, by number.
    pub fn endpoint(&self, at: usize) -> &str {
        &self.endpoints[at]
    }

    /// A connection to one, by number.
    ///
    /// # Errors
    /// Where its address is none.
    pub fn control(&mut self, at: usize) -> anyhow::Result<Control> {
        let version = self.operator.version();
        if version != self.version {
            self.version = version;
            self.connect()?;
        }
        Ok(self.controls[at].clone())
    }
}

/// Sixteen random bytes: a new id.
pub fn new_id() -> anyhow::Result<Vec<u8>> {
    let mut id = vec![0; 16];
    SystemEntropy
        .fill(&mut id)
        .context("the system gave no random bytes")?;
    Ok(id)
}

/// A new secret with these bytes; its ids are chosen here, so it may be sent again.
pub fn secret(value: Vec<u8>) -> anyhow::Result<CreateSecretRequest> {
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
pub async fn create(control: &mut Control, secret: CreateSecretRequest) -> Result<ChangeResponse, Status> {
    Ok(control.create_secret(secret).await?.into_inner())
}

/// Waits until something holds, asking again and again, and says what did not come true.
pub async fn until(what: &str, limit: Duration, mut holds: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
    /// Short beside everything that is waited for, long beside what asking costs.
    const PAUSE: Duration = Duration::from_millis(5);
    let end = Instant::now() + limit;
    while !holds().await {
        anyhow::ensure!(Instant::now() < end, "{what}: not within {} s", limit.as_secs());
        sleep(PAUSE).await;
    }
    Ok(())
}
