//! The peer port: HTTP/1.1 on `--listen-peer-urls`. What is not under `/raft` goes to a handler given in.

use std::{io, sync::Arc};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body_util::Full;
use hyper::{body, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
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
    config::Url,
    http::{
        HEAD_BYTES_MAX, HEADERS_MAX,
        front::refusal,
        listener::{Listener, bind},
    },
    telemetry::logs::Seldom,
};

/// Answers what is not under `/raft`.
pub type Handler = Arc<dyn Fn(Request<body::Incoming>) -> BoxFuture<'static, Response<Full<Bytes>>> + Send + Sync>;

/// Bound addresses that nobody serves yet.
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
    /// Binds every URL.
    pub async fn bind(urls: &[Url], reuse_port: bool) -> io::Result<Self> {
        let mut sockets = Vec::new();
        for url in urls {
            if url.is_secure() {
                let text = format!("cannot listen for peers on {}: TLS is not implemented", url.as_str());
                return Err(io::Error::new(io::ErrorKind::Unsupported, text));
            }
            for listener in bind(url, reuse_port).await? {
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
            arbiter.spawn(async move {
                tokio::select! {
                    // An error: the sender is gone.
                    _ = stopped.changed() => {}
                    () = accept(socket, service, places) => {}
                }
            });
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
        while connections.try_join_next().is_some() {}
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
    let socket = TokioIo::new(Timed::new(socket, None, Some(STREAM_STEP)));
    let answer = service_fn(move |request: Request<body::Incoming>| {
        let service = service.clone();
        async move { service.answer(request).await }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(STREAM_STEP)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .title_case_headers(true)
        .serve_connection(socket, answer)
        .await;
    if let Err(e) = served {
        tracing::debug!("connection of a peer ended: {}", super::dial::chain(&e));
    }
}

impl Service {
    async fn answer(&self, request: Request<body::Incoming>) -> Result<Response<Body>, Cut> {
        if let Some(refused) = refusal(&request) {
            return Ok(refused.map(Body::Whole));
        }
        if is_raft(request.uri().path()) {
            return self.transport.handle(request).await;
        }
        Ok((self.others)(request).await.map(Body::Whole))
    }
}
