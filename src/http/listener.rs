//! Listening sockets: each accepted socket goes to the RPC runtime with the fewest connections.
//!
//! One listener per address; two processes on one port are refused by the kernel unless `--socket-reuse-port` says
//! otherwise.

use std::{io, net::SocketAddr, sync::Arc};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UnixListener};

use super::runtime::{Accepted, Runtimes, Serves};
use crate::config::Url;

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Binds every address of `url`.
pub async fn bind(url: &Url, reuse_port: bool) -> io::Result<Vec<Listener>> {
    let fail = |e: io::Error| io::Error::new(e.kind(), format!("cannot listen on {}: {e}", url.as_str()));
    if url.is_socket() {
        let path = url.socket_path();
        // A socket file nobody listens on is a leftover of a process that died.
        if std::os::unix::net::UnixStream::connect(&path).is_err() {
            let _ = std::fs::remove_file(&path);
        }
        return Ok(vec![Listener::Unix(UnixListener::bind(&path).map_err(fail)?)]);
    }
    let mut listeners = Vec::new();
    let mut last = None;
    for address in tokio::net::lookup_host(url.authority()).await.map_err(fail)? {
        match bind_tcp(address, reuse_port) {
            Ok(listener) => listeners.push(Listener::Tcp(listener)),
            Err(e) => last = Some(e),
        }
        // One address, as Go's listener: the first that works, IPv4 first for a name.
        if address.is_ipv4() && !listeners.is_empty() {
            break;
        }
    }
    match last {
        Some(e) if listeners.is_empty() => Err(fail(e)),
        _ => Ok(listeners),
    }
}

fn bind_tcp(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // As Go does, whatever --socket-reuse-address says: a port whose old connections linger can be taken again.
    socket.set_reuse_address(true)?;
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Accepts until the process ends.
pub async fn accept(listener: Listener, runtimes: Arc<Runtimes>, serves: Serves) {
    loop {
        let accepted = match &listener {
            Listener::Tcp(l) => l.accept().await.and_then(|(s, _)| {
                s.set_nodelay(true)?;
                Ok(Accepted::Tcp(s.into_std()?))
            }),
            Listener::Unix(l) => l.accept().await.and_then(|(s, _)| Ok(Accepted::Unix(s.into_std()?))),
        };
        match accepted {
            Ok(socket) => runtimes.hand_over(socket, serves),
            Err(e) => {
                // Out of descriptors, or the caller has already gone: the next may do better.
                tracing::warn!("cannot accept a connection: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        }
    }
}
