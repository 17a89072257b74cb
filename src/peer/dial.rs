//! Connections to other members: HTTP/1.1 over TCP or a Unix socket, one at a time, with limits on waiting.
//!
//! Not here: what is asked over them, or TLS.

use std::{
    future::Future,
    io,
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::{
    body::Body,
    client::conn::http1::{SendRequest, handshake},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpSocket, TcpStream, UnixStream, lookup_host},
    time::{Instant, Sleep, sleep, timeout},
};

use crate::config::Url;

/// Where a connection comes from, and how long one step on it may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `None`: from where the system likes.
    pub from: Option<IpAddr>,
    pub connect: Duration,
    /// `None`: a read may wait for ever.
    pub read: Option<Duration>,
    pub write: Option<Duration>,
}

/// A new connection to `url`. It ends when the sender and the body of its answer are dropped. Must be called on a tokio
/// runtime, which then serves it.
pub async fn connect<B>(url: &Url, limits: Limits) -> io::Result<SendRequest<B>>
where
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if url.is_secure() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "not implemented: TLS between members"));
    }
    let too_late = |_| io::Error::new(io::ErrorKind::TimedOut, "dial: i/o timeout");
    if url.is_socket() {
        let socket = timeout(limits.connect, UnixStream::connect(url.socket_path())).await.map_err(too_late)??;
        return start(Timed::new(socket, limits.read, limits.write)).await;
    }
    let socket = timeout(limits.connect, connect_from(limits.from, url.authority())).await.map_err(too_late)??;
    socket.set_nodelay(true)?;
    keep_alive(&socket);
    start(Timed::new(socket, limits.read, limits.write)).await
}

async fn connect_from(from: Option<IpAddr>, to: &str) -> io::Result<TcpStream> {
    let Some(from) = from else { return TcpStream::connect(to).await };
    let mut failed = io::Error::new(io::ErrorKind::AddrNotAvailable, format!("{to} cannot be reached from {from}"));
    for address in lookup_host(to).await?.filter(|address| address.is_ipv4() == from.is_ipv4()) {
        let socket = if from.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.bind((from, 0).into())?;
        match socket.connect(address).await {
            Ok(socket) => return Ok(socket),
            Err(e) => failed = e,
        }
    }
    Err(failed)
}

/// A machine that vanished is noticed although nothing is sent to it. Best effort.
pub fn keep_alive(socket: &TcpStream) {
    let keepalive =
        socket2::TcpKeepalive::new().with_time(Duration::from_secs(30)).with_interval(Duration::from_secs(15));
    let _ = socket2::SockRef::from(socket).set_tcp_keepalive(&keepalive);
}

async fn start<S, B>(socket: Timed<S>) -> io::Result<SendRequest<B>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (sender, connection) = handshake(TokioIo::new(socket)).await.map_err(io::Error::other)?;
    tokio::spawn(async move {
        if let Err(e) = connection.await {
            // Whoever waits for the answer hears of it.
            tracing::debug!("connection to a peer ended: {e}");
        }
    });
    Ok(sender)
}

/// Host for the `Host` header.
pub fn host(url: &Url) -> &str {
    if url.is_socket() { "localhost" } else { url.authority() }
}

/// Why a request failed, with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}

/// A socket on which a read or write that waits too long fails.
pub struct Timed<S> {
    socket: S,
    read: Option<Limit>,
    write: Option<Limit>,
}

struct Limit {
    after: Duration,
    /// Set anew at the beginning of each wait.
    timer: Pin<Box<Sleep>>,
    waiting: bool,
}

impl Limit {
    fn new(after: Duration) -> Self {
        Self { after, timer: Box::pin(sleep(after)), waiting: false }
    }
}

/// Fails when `polled` has been pending for as long as `limit` allows.
fn within<T>(limit: &mut Option<Limit>, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
    let Some(limit) = limit else { return polled };
    if polled.is_ready() {
        limit.waiting = false;
        return polled;
    }
    if !limit.waiting {
        limit.waiting = true;
        limit.timer.as_mut().reset(Instant::now() + limit.after);
    }
    ready!(limit.timer.as_mut().poll(cx));
    Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "i/o timeout")))
}

impl<S> Timed<S> {
    pub fn new(socket: S, read: Option<Duration>, write: Option<Duration>) -> Self {
        Self { socket, read: read.map(Limit::new), write: write.map(Limit::new) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.socket).poll_read(cx, buf);
        within(&mut self.read, cx, polled)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.socket).poll_write(cx, buf);
        within(&mut self.write, cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        within(&mut self.write, cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_come_from_the_address_given() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap().to_string();
        for from in ["127.0.0.1", "127.0.0.2"] {
            let from: IpAddr = from.parse().unwrap();
            let _socket = connect_from(Some(from), &to).await.unwrap();
            assert_eq!(listener.accept().await.unwrap().1.ip(), from);
        }
        let failed = connect_from(Some("::1".parse().unwrap()), &to).await.unwrap_err();
        assert_eq!(failed.to_string(), format!("{to} cannot be reached from ::1"));
    }
}
