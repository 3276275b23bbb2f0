//! How a manager ends when it must.

use std::io;
use std::path::PathBuf;

use bulkhead_identity::store::StoreError;
use bulkhead_identity::{CredentialsError, KeyError};
use bulkhead_raft::log_store::OpenError;
use bulkhead_raft::{Fatal, StartError};

/// Why a manager does not start or go on. Each has its exit code, after sysexits(3).
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// The data folder cannot be made or used.
    #[error("cannot use the data folder {path}; check that it exists and belongs to this program's user")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another program has the data folder.
    #[error("another program serves the data folder {0}; stop that one, or use another --data")]
    InUse(PathBuf),
    /// The local socket cannot be opened.
    #[error("cannot listen on the local socket {path}")]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The address for managers and workers cannot be listened on.
    #[error("cannot listen on {address}; is it an address of this machine, and free?")]
    Listen {
        /// Which.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The key file.
    #[error(transparent)]
    Keys(#[from] StoreError),
    /// The key file is a worker's or an operator's.
    #[error("the key file in {0} is not a manager's; use another --data")]
    NotAManager(PathBuf),
    /// No random bytes, or no key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Key, certificate and roots do not belong together.
    #[error("the key file does not fit together")]
    Credentials(#[from] CredentialsError),
    /// The replica does not start.
    #[error("the replica does not start")]
    Replica(#[from] StartError),
    /// What it acknowledged is not all there any more, and no leader took it back as a new member.
    #[error(
        "this manager's store is lost ({lost}), and it was not taken back as a new member ({why}): bring a majority of \
         the managers up without it, then start it again; where the others are gone for good, see \
         docs/operations/lose-quorum.md"
    )]
    Lost {
        /// What became of the store.
        lost: String,
        /// What the others said.
        why: String,
    },
    /// The image store.
    #[error("cannot use the image store {path}")]
    Images {
        /// Its folder.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Consensus or its store failed while running.
    #[error("the replica stopped")]
    Stopped(#[from] Fatal),
    /// A piece of the program ended by itself.
    #[error("{0} ended unexpectedly")]
    Piece(String),
}

impl ProgramError {
    /// The exit code of a program that ends with this.
    pub fn exit_code(&self) -> u8 {
        const DATA: u8 = 65; // EX_DATAERR
        const SOFTWARE: u8 = 70; // EX_SOFTWARE
        const IO: u8 = 74; // EX_IOERR
        const BUSY: u8 = 75; // EX_TEMPFAIL
        const CONFIGURATION: u8 = 78; // EX_CONFIG
        match self {
            Self::InUse(_) | Self::Replica(StartError::Log(OpenError::Locked { .. })) => BUSY,
            Self::Replica(StartError::Log(OpenError::Io { .. }) | StartError::Snapshot(_))
            | Self::Folder { .. } => IO,
            Self::Stopped(Fatal::Store(_)) | Self::Images { .. } => IO,
            Self::Replica(StartError::Log(_))
            | Self::Lost { .. }
            | Self::Keys(StoreError::Damaged { .. }) => DATA,
            Self::Replica(_) | Self::Stopped(_) | Self::Piece(_) | Self::Key(_) => SOFTWARE,
            Self::Socket { .. }
            | Self::Listen { .. }
            | Self::Keys(_)
            | Self::NotAManager(_)
            | Self::Credentials(_) => CONFIGURATION,
        }
    }
}
