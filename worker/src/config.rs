//! The command line, as the launcher writes it.

use clap::Parser;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

/// Runs the tasks that a cluster gives to this machine; started by bulkhead-launcher
#[derive(Debug, Clone, Parser)]
#[command(name = "bulkhead-worker", version)]
pub struct Config {
    /// Folder for this program's key, records and images
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Number of the descriptor that leads to the launcher
    #[arg(long, value_name = "N")]
    pub launcher_fd: i32,
    /// Local socket for `bulkhead cluster join` and status [default: worker.sock in the data folder]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Address on which published ports answer
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::UNSPECIFIED))]
    pub publish_address: IpAddr,
    /// Manager to join by itself, HOST:PORT; may be repeated
    #[arg(long, value_name = "ADDRESS", requires = "ticket_file")]
    pub join: Vec<String>,
    /// File with the ticket for --join; waited for until it appears
    #[arg(long, value_name = "FILE", requires = "join")]
    pub ticket_file: Option<PathBuf>,
    /// Name of this node [default: the host's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
}

impl Config {
    /// The local socket.
    pub fn socket(&self) -> PathBuf {
        self.socket
            .clone()
            .unwrap_or_else(|| self.data.join("worker.sock"))
    }

    /// The key file.
    pub fn key_file(&self) -> PathBuf {
        self.data.join("node.key")
    }

    /// A join that waits for approval.
    pub fn joining_file(&self) -> PathBuf {
        self.data.join("joining")
    }

    /// The task records.
    pub fn records(&self) -> PathBuf {
        self.data.join("records")
    }

    /// The image blobs.
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Config, clap::Error> {
        Config::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_launchers_arguments_are_enough() {
        let config = parse("bulkhead-worker --data /d --launcher-fd 3").expect("valid");
        assert_eq!(config.socket(), PathBuf::from("/d/worker.sock"));
        assert!(config.publish_address.is_unspecified() && config.join.is_empty());
    }

    #[test]
    fn joining_by_itself_takes_address_and_ticket() {
        let line = "bulkhead-worker --data /d --launcher-fd 3";
        for bad in ["--join m1:7443", "--ticket-file /t", "--publish-address host"] {
            assert!(parse(&format!("{line} {bad}")).is_err(), "{bad}");
        }
        let config = parse(&format!("{line} --join m1:1 --join m2:2 --ticket-file /t")).expect("valid");
        assert_eq!(config.join, ["m1:1", "m2:2"]);
    }
}
