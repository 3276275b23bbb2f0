//! Stands where the worker stands and hands its end of the socket to whoever listens in the worker's
//! folder, so that a test can speak to the launcher exactly as the worker does.

use bulkhead_launcher::connection::Connection;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use std::os::fd::AsFd;
use std::time::Duration;

fn main() -> std::io::Result<()> {
    let channel = bulkhead_launcher::take_channel().expect("started by a launcher");
    let arguments: Vec<String> = std::env::args().collect();
    let data = arguments
        .iter()
        .skip_while(|argument| *argument != "--data")
        .nth(1)
        .expect("--data");
    let test = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
    connect(&test, &SocketAddrUnix::new(format!("{data}/test.sock"))?)?;
    Connection::from_descriptor(test)?.send(&arguments, &[channel.as_fd()])?;
    loop {
        std::thread::park_timeout(Duration::from_secs(3_600)); // until the launcher ends it
    }
}
