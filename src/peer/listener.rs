//! The peer port: HTTP/1.1 on `--listen-peer-urls`. What is not under `/raft` goes to a handler given in.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{body, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};

use super::{
    accept::{Body, Cut, is_raft},
    dial::{Timed, keep_alive},
    transport::Transport,
    wire::STREAM_STEP,
};
use crate::{
    actor::shell::vital,
    config::Url,
    http::{
        HEAD_BYTES_MAX, HEADERS_MAX,
        front::{refusal, tidied},
        listener::{Listener, listen},
    },
    telemetry::logs::Seldom,
};

/// Answers what is not under `/raft`.
pub type Handler = Arc<dyn Fn(Request<body::Incoming>) -> BoxFuture<'static, Response<Full<Bytes>>> + Send + Sync>;

/// Addresses that are this process's. Connections wait until they are served.
pub struct Bound(Vec<Socket>);

enum Socket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// A peer port that is served. Dropping it ends the port and every connection on it.
pub struct Listening {
    _stop: tokio::sync::watch::Sender<()>,
}

impl Bound {
    /// Listens on every URL.
    pub async fn bind(urls: &[Url], reuse_port: bool) -> io::Result<Self> {
        let mut sockets = Vec::new();
        for url in urls {
            if url.is_secure() {
                let text = format!("cannot listen for peers on {}: TLS is not implemented", url.as_str());
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            }
            for listener in listen(url, reuse_port).await? {
                sockets.push(match listener {
                    Listener::Tcp(l) => Socket::Tcp(l.into_std()?),
                    Listener::Unix(l) => Socket::Unix(l.into_std()?),
                });
            }
        }
        Ok(Self(sockets))
    }

    /// TCP addresses as bound.
    pub fn addresses(&self) -> Vec<std::net::SocketAddr> {
        self.0
            .iter()
            .filter_map(|socket| match socket {
                Socket::Tcp(listener) => listener.local_addr().ok(),
                Socket::Unix(_) => None,
            })
            .collect()
    }

    /// Serves on `arbiter`, which must be the transport's. At most so many `connections` at a time; more wait in the
    /// kernel's queue.
    pub fn serve(
        self,
        arbiter: &actix_rt::ArbiterHandle,
        transport: &Arc<Transport>,
        others: &Handler,
        connections: usize,
    ) -> Listening {
        let (stop, stopped) = tokio::sync::watch::channel(());
        let places = Arc::new(Semaphore::new(connections));
        for socket in self.0 {
            let service = Service { transport: transport.clone(), others: others.clone() };
            let (mut stopped, places) = (stopped.clone(), places.clone());
            arbiter.spawn(vital("peer port", async move {
                tokio::select! {
                    // An error: the sender is gone.
                    _ = stopped.changed() => {}
                    () = accept(socket, service, places) => {}
                }
            }));
        }
        Listening { _stop: stop }
    }
}

#[derive(Clone)]
struct Service {
    transport: Arc<Transport>,
    others: Handler,
}

/// Until it is dropped, and with it the connections.
async fn accept(socket: Socket, service: Service, places: Arc<Semaphore>) {
    let listener = match socket {
        Socket::Tcp(l) => TcpListener::from_std(l).map(Listener::Tcp),
        Socket::Unix(l) => UnixListener::from_std(l).map(Listener::Unix),
    };
    let listener = match listener {
        Ok(listener) => listener,
        Err(e) => return tracing::error!("cannot serve the peer port: {e}"),
    };
    let mut connections = JoinSet::new();
    let (mut full, mut failing) = (Seldom::default(), Seldom::default());
    loop {
        if places.available_permits() == 0
            && let Some(unsaid) = full.admit()
        {
            tracing::warn!(unsaid, "all places for connections of other members are taken; more wait until one ends");
        }
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accepted = match &listener {
            Listener::Tcp(l) => l.accept().await.and_then(|(socket, _)| {
                socket.set_nodelay(true)?;
                keep_alive(&socket);
                connections.spawn(serve(socket, service.clone(), place));
                Ok(())
            }),
            Listener::Unix(l) => l.accept().await.map(|(socket, _)| {
                connections.spawn(serve(socket, service.clone(), place));
            }),
        };
        while let Some(ended) = connections.try_join_next() {
            if ended.is_err_and(|e| e.is_panic()) {
                // As for clients: that call ends.
                tracing::error!("the answer to a peer panicked; its connection is closed");
            }
        }
        if let Err(e) = accepted {
            // Out of descriptors, or the caller has already gone: the next may do better.
            if let Some(unsaid) = failing.admit() {
                tracing::warn!(unsaid, "cannot accept a peer connection: {e}");
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

async fn serve<S>(socket: S, service: Service, _place: OwnedSemaphorePermit)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    // Reads have their limits where they are waited for: beside a stream that is written nothing is ever read.
    let (read, write) = tokio::io::split(Timed::new(socket, None, Some(STREAM_STEP)));
    let read = Incoming(Arc::new(Mutex::new(read)));
    let socket = TokioIo::new(tokio::io::join(read.clone(), write));
    let answer = service_fn(move |request: Request<body::Incoming>| {
        let (service, read) = (service.clone(), read.clone());
        async move { service.answer(request).await.map(|answer| answer.map(|body| Watched { body, read })) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(STREAM_STEP)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .title_case_headers(true)
        // Who has said all may still listen. Streams see for themselves when their reader is gone.
        .half_close(true)
        .serve_connection(socket, answer)
        .await;
    if let Err(e) = served {
        tracing::debug!("connection of a peer ended: {}", super::dial::chain(&e));
    }
}

/// What comes in on a connection: hyper reads requests from it, and beside a stream, where nothing may come, the stream's
/// body waits for the end. Never both: with half-closed connections allowed hyper reads nothing while it answers. So nobody
/// waits for the lock.
struct Incoming<S>(Arc<Mutex<ReadHalf<S>>>);

impl<S> Clone for Incoming<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S: AsyncRead> AsyncRead for Incoming<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).poll_read(cx, buf)
    }
}

/// The body of an answer. A stream ends when the member that asked for it closes, or says anything more.
struct Watched<S> {
    body: Body,
    read: Incoming<S>,
}

impl<S: AsyncRead> body::Body for Watched<S> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<body::Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        if matches!(this.body, Body::Stream(_)) {
            let mut byte = [0];
            if Pin::new(&mut this.read).poll_read(cx, &mut ReadBuf::new(&mut byte)).is_ready() {
                return Poll::Ready(Some(Err(io::Error::other("the member closed the stream"))));
            }
        }
        Pin::new(&mut this.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> body::SizeHint {
        self.body.size_hint()
    }
}

impl Service {
    async fn answer(&self, request: Request<body::Incoming>) -> Result<Response<Body>, Cut> {
        if let Some(answer) = refusal(&request).or_else(|| tidied(&request)) {
            return Ok(answer.map(Body::Whole));
        }
        if is_raft(request.uri().path()) {
            return self.transport.handle(request).await;
        }
        Ok((self.others)(request).await.map(Body::Whole))
    }
}
