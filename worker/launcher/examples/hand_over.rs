//! Stands where the worker stands and hands its end of the socket to whoever listens in the worker's
//! folder, so that a test can speak to the launcher exactly as the worker does.

use bulkhead_launcher::connection::Connection;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use std::os::fd::AsFd;

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
    // A worker ends with its launcher's end of the socket.
    poll(&mut [PollFd::new(&channel, PollFlags::empty())], None)?;
    Ok(())
}
