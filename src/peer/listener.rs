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
    http::listener::{Listener, bind},
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

    /// Serves on `arbiter`, which must be the transport's.
    pub fn serve(self, arbiter: &actix_rt::ArbiterHandle, transport: &Arc<Transport>, others: &Handler) -> Listening {
        let (stop, stopped) = tokio::sync::watch::channel(());
        for socket in self.0 {
            let service = Service { transport: transport.clone(), others: others.clone() };
            let mut stopped = stopped.clone();
            arbiter.spawn(vital("peer port", async move {
                tokio::select! {
                    // An error: the sender is gone.
                    _ = stopped.changed() => {}
                    () = accept(socket, service) => {}
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
async fn accept(socket: Socket, service: Service) {
    let listener = match socket {
        Socket::Tcp(l) => TcpListener::from_std(l).map(Listener::Tcp),
        Socket::Unix(l) => UnixListener::from_std(l).map(Listener::Unix),
    };
    let listener = match listener {
        Ok(listener) => listener,
        Err(e) => return tracing::error!("cannot serve the peer port: {e}"),
    };
    let mut connections = JoinSet::new();
    loop {
        let accepted = match &listener {
            Listener::Tcp(l) => l.accept().await.and_then(|(socket, _)| {
                socket.set_nodelay(true)?;
                keep_alive(&socket);
                connections.spawn(serve(socket, service.clone()));
                Ok(())
            }),
            Listener::Unix(l) => l.accept().await.map(|(socket, _)| {
                connections.spawn(serve(socket, service.clone()));
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
            tracing::warn!("cannot accept a peer connection: {e}");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }
}

async fn serve<S>(socket: S, service: Service)
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
        .serve_connection(socket, answer)
        .await;
    if let Err(e) = served {
        tracing::debug!("connection of a peer ended: {}", super::dial::chain(&e));
    }
}

impl Service {
    async fn answer(&self, request: Request<body::Incoming>) -> Result<Response<Body>, Cut> {
        if is_raft(request.uri().path()) {
            return self.transport.handle(request).await;
        }
        Ok((self.others)(request).await.map(Body::Whole))
    }
}
