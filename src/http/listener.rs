//! Listening sockets: each accepted socket goes to the RPC runtime with the fewest connections.
//!
//! One listener per address; two processes on one port are refused by the kernel unless `--socket-reuse-port` says
//! otherwise.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Semaphore,
};

use super::runtime::{Accepted, Runtimes, Serves, Socket as ClientSocket};
use crate::{config::Url, telemetry::logs::Seldom};

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Connections that wait to be accepted, as many as usual systems allow: all wait until a starting member is ready.
const BACKLOG: i32 = 4096;
/// Before the first probe of a silent connection, and between probes.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// After an accept that failed.
const RETRY: Duration = Duration::from_millis(10);

fn failed(url: &Url, e: io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("cannot listen on {}: {e}", url.as_str()))
}

/// Listens on every address of `url`: from now on nobody else can. Connections wait in the kernel's queue until somebody
/// accepts them.
pub async fn listen(url: &Url, reuse_port: bool) -> io::Result<Vec<Listener>> {
    let fail = |e| failed(url, e);
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
        match listen_tcp(address, reuse_port) {
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

fn listen_tcp(address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
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

/// A client that vanished is noticed although nothing is sent to it. Best effort.
fn keep_alive(socket: &tokio::net::TcpStream) {
    let keepalive = socket2::TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE);
    let _ = socket2::SockRef::from(socket).set_tcp_keepalive(&keepalive);
}

/// Accepts until the process ends. Each connection has a place of `places` for as long as it lasts; without one the
/// next waits in the kernel's queue.
pub async fn accept(listener: Listener, runtimes: Arc<Runtimes>, serves: Serves, places: Arc<Semaphore>) {
    let (mut full, mut failing) = (Seldom::default(), Seldom::default());
    loop {
        if places.available_permits() == 0
            && let Some(unsaid) = full.admit()
        {
            tracing::warn!(unsaid, "all places for client connections are taken; more clients wait until one leaves");
        }
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accepted = match &listener {
            Listener::Tcp(l) => l.accept().await.and_then(|(s, _)| {
                s.set_nodelay(true)?;
                keep_alive(&s);
                Ok(ClientSocket::Tcp(s.into_std()?))
            }),
            Listener::Unix(l) => l.accept().await.and_then(|(s, _)| Ok(ClientSocket::Unix(s.into_std()?))),
        };
        match accepted {
            Ok(socket) => runtimes.hand_over(Accepted { socket, serves, place }),
            Err(e) => {
                // Out of descriptors, or the caller has already gone: the next may do better.
                if let Some(unsaid) = failing.admit() {
                    tracing::warn!(unsaid, "cannot accept a connection: {e}");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
