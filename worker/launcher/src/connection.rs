//! One message at a time, with descriptors beside it, over a `SOCK_SEQPACKET` socket.
//!
//! Never blocks: callers wait for readiness in their own way (`poll` here, the runtime's
//! descriptor watch in the worker). `WouldBlock` means try again when ready.

use crate::message::{MAX_DESCRIPTORS, MAX_MESSAGE_BYTES};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// One end of a message socket.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Connection {
    /// Two connected ends.
    pub fn pair() -> io::Result<(Connection, Connection)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Connection(a), Connection(b)))
    }

    /// Takes over a descriptor that is such a socket, and makes it non-blocking.
    pub fn from_descriptor(socket: OwnedFd) -> io::Result<Connection> {
        if rustix::net::sockopt::socket_type(&socket)? != SocketType::SEQPACKET {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a message socket",
            ));
        }
        rustix::io::ioctl_fionbio(&socket, true)?;
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        Ok(Connection(socket))
    }

    /// Sends one message. Nothing was sent when this fails.
    pub fn send<T: Serialize>(&self, message: &T, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE_BYTES || descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "message over its limit",
            ));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Receives one message; `None` when the other end is closed. A message that is too
    /// long, has too many descriptors or does not parse is an error of kind `InvalidData`.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; self.next_bytes()?.min(MAX_MESSAGE_BYTES)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut descriptors = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                descriptors.extend(rights);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "message over its limit",
            ));
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&bytes[..received.bytes])?;
        Ok(Some((message, descriptors)))
    }

    /// How long the next message is, which stays; 0 when the other end is closed. A launcher asks hundreds of
    /// supervisors whether they said anything: room for the longest message each time would cost more than the messages.
    fn next_bytes(&self) -> io::Result<usize> {
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
        // The descriptors beside a message come with the message itself.
        let peeked = recvmsg(&self.0, &mut [], &mut RecvAncillaryBuffer::default(), flags)?;
        Ok(peeked.bytes)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> OwnedFd {
        connection.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_travel_with_their_message() {
        let (a, b) = Connection::pair().expect("pair");
        let (reader, writer) = std::io::pipe().expect("pipe");
        a.send(&"take this", &[writer.as_fd()]).expect("send");
        drop(writer);
        let (text, descriptors): (String, _) = b.receive().expect("receive").expect("open");
        assert_eq!((text.as_str(), descriptors.len()), ("take this", 1));
        drop(descriptors);
        assert_eq!(std::io::read_to_string(reader).expect("read"), "");
    }

    #[test]
    fn too_long_a_message_is_not_sent() {
        let (a, _b) = Connection::pair().expect("pair");
        let error = a
            .send(&"x".repeat(MAX_MESSAGE_BYTES), &[])
            .expect_err("over the limit");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn the_largest_message_fits_the_socket() {
        let (a, b) = Connection::pair().expect("pair");
        a.send(&"x".repeat(MAX_MESSAGE_BYTES - 2), &[]).expect("send");
        assert!(b.receive::<String>().expect("receive").is_some());
    }

    #[test]
    fn a_message_over_the_limit_is_refused_and_gone() {
        let (a, b) = Connection::pair().expect("pair");
        let long = vec![b' '; MAX_MESSAGE_BYTES + 1];
        let mut space = SendAncillaryBuffer::default();
        sendmsg(&a, &[IoSlice::new(&long)], &mut space, SendFlags::empty()).expect("the socket takes it");
        a.send(&"next", &[]).expect("send");
        let error = b.receive::<String>().expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let (next, _) = b.receive::<String>().expect("receive").expect("open");
        assert_eq!(next, "next");
    }

    #[test]
    fn the_end_is_seen() {
        let (a, b) = Connection::pair().expect("pair");
        assert_eq!(
            b.receive::<String>().expect_err("nothing yet").kind(),
            io::ErrorKind::WouldBlock
        );
        drop(a);
        assert!(b.receive::<String>().expect("end").is_none());
    }
}
