//! The local socket of a program: for root and the program's own user, and nobody else.
//!
//! Two locks: the file's mode, and the kernel's word on who connects.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::Stream;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint};

use crate::net::Stream as NetStream;
use crate::peer::{ConnectInfo, Connection, Peer};

/// A connection of a process that may.
pub type LocalConnection = Connection<NetStream>;

/// Listens on a socket of mode 0600. A socket that a dead program left there is replaced; it is removed when the stream
/// is dropped. The stream yields no errors and never ends.
///
/// # Errors
/// `AddrInUse` where a program answers there; otherwise what the system says, as of a folder that is not there.
pub fn listen(
    path: &Path,
) -> io::Result<impl Stream<Item = io::Result<LocalConnection>> + Send + Unpin + use<>> {
    #[cfg(feature = "simulated")]
    if let Some(world) = crate::simulated::world() {
        return Ok(connections(Source::Simulated(world.listen_local(path)?)));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "something that is no socket is in the way",
            ));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another program serves this data folder",
            ));
        }
        Ok(_) | Err(_) => {} // stale, or not there: the bind says what else is wrong
    }
    // It comes into being under its name with its mode: at no time can others open it there.
    let fresh = path.with_extension("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
    fs::rename(&fresh, path)?;
    let socket = Socket {
        listener,
        path: path.to_owned(),
    };
    Ok(connections(Source::System(socket)))
}

/// Where connections come from.
enum Source {
    System(Socket),
    #[cfg(feature = "simulated")]
    Simulated(tokio::sync::mpsc::Receiver<Box<dyn crate::simulated::Io>>),
}

fn connections(source: Source) -> impl Stream<Item = io::Result<LocalConnection>> + Send + Unpin + use<> {
    Box::pin(futures::stream::unfold(source, |mut source| async {
        let connection = match &mut source {
            Source::System(socket) => socket.next().await,
            #[cfg(feature = "simulated")]
            Source::Simulated(connections) => {
                let uid = rustix::process::geteuid().as_raw();
                local(NetStream::simulated(connections.recv().await?), uid)
            }
        };
        Some((Ok(connection), source))
    }))
}

/// A connection of this user.
fn local(stream: NetStream, uid: u32) -> LocalConnection {
    let info = ConnectInfo {
        peer: Peer::Local { uid },
        address: None,
        opened_ms: 0,
    };
    Connection::new(stream, info)
}

struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    async fn next(&self) -> LocalConnection {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred().map(|credentials| credentials.uid()) {
                    Ok(uid) if may_connect(uid, rustix::process::geteuid().as_raw()) => {
                        return local(NetStream::local(stream), uid);
                    }
                    Ok(uid) => tracing::warn!(target: "audit", uid, "local connection refused"),
                    Err(error) => tracing::warn!(%error, "local connection of nobody"),
                },
                Err(error) => {
                    tracing::debug!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(20)).await; // out of descriptors: wait for some to close
                }
            }
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // the next start replaces it in any case
    }
}

/// Root, and the program's own user.
fn may_connect(uid: u32, own: u32) -> bool {
    uid == 0 || uid == own
}

/// A channel to the program that listens at this path. It connects at the first call.
pub fn connect(path: &Path) -> Channel {
    let path = path.to_owned();
    Endpoint::from_static("http://local").connect_with_connector_lazy(tower::service_fn(move |_| {
        let path = path.clone();
        async move {
            #[cfg(feature = "simulated")]
            if let Some(world) = crate::simulated::world() {
                return world
                    .connect_local(&path)
                    .map(|it| TokioIo::new(NetStream::simulated(it)));
            }
            let stream = UnixStream::connect(path).await?;
            io::Result::Ok(TokioIo::new(NetStream::local(stream)))
        }
    }))
}

#[cfg(test)]
mod tests {
    use bulkhead_proto::wire::enrolment_client::EnrolmentClient;
    use bulkhead_proto::wire::enrolment_server::{Enrolment, EnrolmentServer};
    use bulkhead_proto::wire::{EnrolRequest, EnrolResponse, GetRootRequest, GetRootResponse};
    use tokio_util::task::AbortOnDropHandle;
    use tonic::{Request, Response, Status};

    use super::*;

    struct SaysWho;

    #[tonic::async_trait]
    impl Enrolment for SaysWho {
        async fn get_root(
            &self,
            request: Request<GetRootRequest>,
        ) -> Result<Response<GetRootResponse>, Status> {
            match request
                .extensions()
                .get::<ConnectInfo>()
                .map(|info| info.peer.clone())
            {
                Some(Peer::Local { uid }) => Ok(Response::new(GetRootResponse {
                    now: uid.into(),
                    ..Default::default()
                })),
                other => Err(Status::internal(format!("{other:?}"))),
            }
        }

        async fn enrol(&self, _: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn r#return(
            &self,
            _: Request<bulkhead_proto::wire::ReturnRequest>,
        ) -> Result<Response<EnrolResponse>, Status> {
            Err(Status::unimplemented(""))
        }
    }

    #[tokio::test]
    async fn the_kernel_says_who_connects_and_others_cannot_open_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("local.socket");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket that a dead program leaves"));
        let stream = listen(&path).expect("a socket");
        assert_eq!(
            fs::metadata(&path).expect("it is there").permissions().mode() & 0o777,
            0o600
        );
        let server = tonic::transport::Server::builder().add_service(EnrolmentServer::new(SaysWho));
        let server = AbortOnDropHandle::new(tokio::spawn(async move {
            server.serve_with_incoming(stream).await.expect("a server");
        }));
        let answer = EnrolmentClient::new(connect(&path))
            .get_root(GetRootRequest {})
            .await
            .expect("an answer");
        assert_eq!(
            answer.into_inner().now,
            i64::from(rustix::process::geteuid().as_raw())
        );
        let second = listen(&path).err().expect("a program is there");
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        server.abort();
        let _ = server.await;
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_is_no_socket_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        fs::write(&path, "precious").expect("a file");
        assert!(listen(&path).is_err());
        assert_eq!(fs::read(&path).expect("it is there"), b"precious");
    }

    #[test]
    fn root_and_the_own_user_may_connect_and_nobody_else() {
        for (uid, own, may) in [
            (0, 0, true),
            (0, 1000, true),
            (1000, 1000, true),
            (1000, 0, false),
            (1001, 1000, false),
        ] {
            assert_eq!(may_connect(uid, own), may, "{uid} to {own}");
        }
    }
}
