//! Network namespaces as machines' network stacks: one for each node, on one bridge, which is in this program's own.
//!
//! They have no name, so nothing of them is left once the programs in them and this one have ended.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// The bridge, in the namespace of whoever made it.
const BRIDGE: &str = "lab";
/// The address of whoever made it is the last but one.
const OWN: u8 = 254;

/// A network namespace. It lasts as long as this or a process in it.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A new one, empty but for a loopback device that is down.
    ///
    /// # Errors
    /// Without the right to make one, which root has.
    pub fn new() -> io::Result<Self> {
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net").map(Self)
        })
    }

    /// The one that a process is in.
    ///
    /// # Errors
    /// Where it is gone, or not ours to enter.
    pub fn of(pid: u32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/ns/net")).map(Self)
    }

    /// Does something in it: what it starts is in it, too.
    ///
    /// # Errors
    /// Those of what it does, and where the namespace cannot be entered.
    pub fn run<T: Send>(&self, what: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_a_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            what()
        })
    }

    /// Runs a tool in it, which reads `input`.
    ///
    /// # Errors
    /// Where the tool is not installed, or fails: with what it said.
    pub fn tool(&self, words: &[&str], input: &str) -> anyhow::Result<()> {
        let output = self.run(|| feed(words, input));
        succeeded(words, output)
    }
}

/// Namespaces are those of a thread: one of its own, that ends with what it does.
fn on_a_thread<T: Send>(what: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| match scope.spawn(what).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn feed(words: &[&str], input: &str) -> io::Result<Output> {
    use std::io::Write as _;
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    child.wait_with_output()
}

fn succeeded(words: &[&str], output: io::Result<Output>) -> anyhow::Result<()> {
    let line = words.join(" ");
    let output = output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => anyhow::anyhow!(
            "`{}` is not installed; on Debian: apt-get install -y iproute2 nftables",
            words.first().unwrap_or(&"")
        ),
        _ => anyhow::Error::new(error).context(format!("`{line}` could not be run")),
    })?;
    if !output.status.success() {
        bail!(
            "`{line}` failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// A bridge in this program's own namespace, and the network of it.
#[derive(Debug)]
pub struct Switch {
    subnet: [u8; 3],
}

impl Switch {
    /// Takes this program into a network of its own, where nothing of the machine's is, with a bridge in it, and into a
    /// table of mounts of its own.
    /// Before there are other threads, which would stay behind.
    ///
    /// # Errors
    /// Without root, or where `ip` is missing or fails.
    pub fn make(subnet: [u8; 3]) -> anyhow::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("namespaces need root")?;
        // What is mounted from here on is seen by what is started from here on alone, and gone with it.
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
            .context("mounts cannot be made private")?;
        let made = Self { subnet };
        let own = format!("{}/24", made.address(OWN));
        for line in [
            "ip link set lo up".to_owned(),
            format!("ip link add {BRIDGE} type bridge"),
            format!("ip addr add {own} dev {BRIDGE}"),
            format!("ip link set {BRIDGE} up"),
        ] {
            here(&line)?;
        }
        Ok(made)
    }

    /// The address of a host by its last number.
    pub fn address(&self, host: u8) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, host)
    }

    /// This program's own.
    pub fn own_address(&self) -> Ipv4Addr {
        self.address(OWN)
    }

    /// A new host's namespace, connected to the bridge.
    ///
    /// # Errors
    /// Where `ip` fails.
    pub fn connect(&self, host: u8) -> anyhow::Result<Arc<Namespace>> {
        let namespace = Namespace::new().context("no network namespace can be made")?;
        let (own, port) = (std::process::id(), format!("lab{host}"));
        let address = self.address(host);
        for line in [
            "ip link set lo up".to_owned(),
            format!("ip link add eth0 type veth peer name {port} netns {own}"),
            format!("ip addr add {address}/24 dev eth0"),
            "ip link set eth0 up".to_owned(),
        ] {
            namespace.tool(&line.split(' ').collect::<Vec<_>>(), "")?;
        }
        here(&format!("ip link set {port} master {BRIDGE} up"))?;
        Ok(Arc::new(namespace))
    }
}

fn here(line: &str) -> anyhow::Result<()> {
    let words: Vec<&str> = line.split(' ').collect();
    succeeded(&words, feed(&words, ""))
}
