//! A place of its own for each cluster: a folder, a network, and a turn on the machine.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::thread::available_parallelism;
use std::time::Duration;

use tempfile::TempDir;

use crate::wait::within;

/// A test that waits for its turn waits for whole other tests.
const TURN: Duration = Duration::from_secs(600);
/// The networks of turn N are 127.(140 + N).0 and up.
const FIRST_NETWORK: u8 = 140;

/// A folder and a network that no other test uses.
#[derive(Debug)]
pub struct Place {
    folder: TempDir,
    network: String,
    /// The name in the abstract namespace is the turn: the kernel gives it back, whatever becomes of this process.
    _turn: UnixListener,
}

impl Place {
    /// Waits for a turn: more clusters at once than the machine has processors would only slow each other down.
    pub fn take() -> Self {
        let turns = available_parallelism().map_or(2, usize::from).clamp(2, 8);
        let (number, turn) = within(TURN, "a turn", || {
            let free = (0..turns).find_map(|number| Some((number, take_turn(number)?)));
            free.ok_or_else(|| "all are taken by other tests".into())
        });
        let second = FIRST_NETWORK + u8::try_from(number).expect("at most 8");
        // A cluster that a killed test left may still listen.
        let network = (0..=u8::MAX)
            .map(|third| format!("127.{second}.{third}"))
            .find(|network| TcpListener::bind(format!("{network}.1:7443")).is_ok())
            .expect("256 networks are not all in use");
        let folder = tempfile::Builder::new()
            .prefix("bh-")
            .tempdir()
            .expect("a temporary folder");
        // Every node's user must be able to reach what is its own in it.
        let open = std::fs::Permissions::from_mode(0o711);
        std::fs::set_permissions(folder.path(), open).expect("its owner may");
        Self {
            folder,
            network,
            _turn: turn,
        }
    }

    /// The folder, which other users may pass.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Three numbers of a loopback network.
    pub fn network(&self) -> &str {
        &self.network
    }
}

fn take_turn(number: usize) -> Option<UnixListener> {
    let name = format!("bulkhead-test-turn-{number}");
    let address = SocketAddr::from_abstract_name(name).expect("a short name");
    UnixListener::bind_addr(&address).ok()
}

/// Whether tests of clusters can run here; says why not.
pub fn may_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: it needs root");
    }
    root
}

/// Whether a program is there that the test cannot do without; says so if not.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    if !found {
        eprintln!("skipped: '{program}' is not installed");
    }
    found
}
