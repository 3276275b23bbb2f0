//! The one key file, and who may change it: renewal puts new credentials in, the session new managers.

use bulkhead_identity::join::Enrolled;
use bulkhead_identity::store::{KeyFile, StoreError};
use bulkhead_identity::{Bundle, BundleError, Credentials, CredentialsError, Identity, KeyError};
use bulkhead_proto::{Role, wire};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why the key file or its content cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The file.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The roots.
    #[error("the cluster's roots cannot be used")]
    Roots(#[from] BundleError),
    /// The key cannot be copied.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The credentials.
    #[error("these credentials cannot be used")]
    Credentials(#[from] CredentialsError),
    /// The key file of another program.
    #[error("the key file is a {role}'s: this data folder belongs to another program")]
    Role {
        /// Whose.
        role: Role,
    },
}

/// Keeps file and live identity in step: what is in use is on disk first.
#[derive(Debug)]
pub struct Keep {
    path: PathBuf,
    file: Mutex<KeyFile>,
    identity: Identity,
    /// Held by whoever asks for new credentials, until they are taken up.
    turn: tokio::sync::Mutex<()>,
}

impl Keep {
    /// Opens the key file; `None` when there is none.
    pub fn open(path: &Path) -> Result<Option<Keep>, KeepError> {
        match KeyFile::load(path) {
            Ok(file) => Keep::new(path, file).map(Some),
            Err(StoreError::Missing(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes the first key file of a node that was admitted.
    pub fn create(path: &Path, enrolled: Enrolled) -> Result<Keep, KeepError> {
        let file = KeyFile {
            credentials: Arc::new(enrolled.credentials),
            name: enrolled.name,
            managers: enrolled.managers,
            manager: None,
            lock: None,
            standby: None,
        };
        file.save(path)?;
        Keep::new(path, file)
    }

    fn new(path: &Path, file: KeyFile) -> Result<Keep, KeepError> {
        match file.subject().role {
            Role::Worker => {}
            role @ (Role::Manager | Role::Operator | Role::Standby) => return Err(KeepError::Role { role }),
        }
        Ok(Keep {
            path: path.to_owned(),
            identity: Identity::new(file.credentials.clone())?,
            file: Mutex::new(file),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// Who this node is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The node's name.
    pub fn name(&self) -> String {
        self.lock().name.clone()
    }

    /// Where managers were last known to be.
    pub fn managers(&self) -> Vec<wire::ManagerAddress> {
        self.lock().managers.clone()
    }

    /// Remembers where managers are.
    pub fn set_managers(&self, managers: Vec<wire::ManagerAddress>) -> Result<(), KeepError> {
        let mut file = self.lock();
        file.managers = managers;
        Ok(file.save(&self.path)?)
    }

    /// The right to ask for new credentials and to take them up. One at a time: of two answers the one that was committed
    /// first could be taken up last, and the cluster takes who uses an older key than it saw for a clone of this node.
    pub(crate) async fn turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Trusts these roots from now on; the certificate stays.
    pub fn trust(&self, roots: Vec<Vec<u8>>) -> Result<(), KeepError> {
        let bundle = Bundle::from_ders(roots)?;
        let file = self.lock();
        let new = file.credentials.with_bundle(bundle);
        self.take_up(file, Arc::new(new))
    }

    /// Takes up new credentials: on disk, then live. When that fails the old ones stay.
    pub fn renew(&self, credentials: Credentials) -> Result<(), KeepError> {
        self.take_up(self.lock(), Arc::new(credentials))
    }

    fn take_up(&self, mut file: MutexGuard<'_, KeyFile>, new: Arc<Credentials>) -> Result<(), KeepError> {
        // Whether the parts fit is known before anything is written.
        if Identity::new(new.clone())?.subject() != self.identity.subject() {
            return Err(CredentialsError::Subject.into());
        }
        let old = std::mem::replace(&mut file.credentials, new.clone());
        if let Err(error) = file.save(&self.path) {
            file.credentials = old;
            return Err(error.into());
        }
        Ok(self.identity.replace(new)?)
    }

    /// Each change of the file's content is one assignment, so a panic elsewhere leaves it whole.
    fn lock(&self) -> MutexGuard<'_, KeyFile> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
