//! The RPC runtimes: one current-thread runtime per core, each with its connections and its watch hub.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::sync::OwnedSemaphorePermit;
use tonic::body::Body;

use super::{HEAD_BYTES_MAX, HEADERS_MAX, front::Front, pings::Pings, plain_io::PlainIo};
use crate::{
    api::{Handle, Routes, Server},
    apply::Deliveries,
    watch,
};

/// A connection on its way to a runtime.
pub struct Accepted {
    pub socket: Socket,
    pub serves: Serves,
    /// Given back when the connection ends.
    pub place: OwnedSemaphorePermit,
}

pub enum Socket {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

/// What a listener offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Serves {
    GrpcAndHttp,
    Grpc,
    Http,
    /// `/metrics` and the health endpoints.
    Metrics,
}

/// HTTP/2 limits from the configuration.
#[derive(Clone, Debug)]
pub struct Limits {
    pub max_concurrent_streams: u32,
    /// Interval and timeout of the server's own pings; `None`: no pings.
    pub pings: Option<(Duration, Duration)>,
    /// Between two pings of a client.
    pub least_ping_gap: Duration,
}

/// Room for data a peer may send before it is asked to wait.
const WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
const HEADER_LIST_MAX: u32 = 16 << 20;
/// Calls given up before this side has looked at them. A connection's task reads at most 128 times (tokio's budget), some
/// 16 KiB each, before it looks at all that came; a call that is given up is 100 bytes at the least (head, message,
/// reset), so clients that keep to gRPC stay below this. It also bounds what one that does not can pile up: 20 MiB.
const UNSEEN_RESETS_MAX: usize = 20_000;
/// Streams that this side had to reset, in a connection's life: a client still sending a message that was refused for
/// its size does that each time, and would be cut off. Resets that a client does not read stay in memory, hence a bound.
const OWN_RESETS_MAX: usize = 100_000;
const HEADER_READ_MAX: Duration = Duration::from_secs(300);

pub struct Runtimes(Vec<Runtime>);

struct Runtime {
    sockets: flume::Sender<Accepted>,
    connections: Arc<AtomicUsize>,
}

/// What every connection is served with.
#[derive(Clone)]
struct Service {
    front: Arc<Front>,
    limits: Limits,
}

/// What one runtime is made of.
pub struct Parts {
    pub deliveries: Deliveries,
    pub watch: watch::Client,
    pub hub: watch::Ends,
    pub hub_config: watch::HubConfig,
}

impl Runtimes {
    /// Starts one thread for each of `parts`.
    pub fn start(server: &Arc<Server>, parts: Vec<Parts>, limits: &Limits, front: Front) -> Self {
        let front = Arc::new(front);
        Self(
            parts
                .into_iter()
                .enumerate()
                .map(|(index, parts)| {
                    let (sockets, accepted) = flume::unbounded();
                    let connections = Arc::new(AtomicUsize::new(0));
                    let service = Service { front: front.clone(), limits: limits.clone() };
                    let (server, counter) = (server.clone(), connections.clone());
                    std::thread::Builder::new()
                        .name(format!("rpc-{index}"))
                        .spawn(move || run(index, server, parts, service, accepted, counter))
                        .expect("a thread can be started at start-up");
                    Runtime { sockets, connections }
                })
                .collect(),
        )
    }

    /// Gives the connection to the least busy runtime.
    pub fn hand_over(&self, accepted: Accepted) {
        let least = self.0.iter().min_by_key(|r| r.connections.load(Ordering::Relaxed));
        if let Some(runtime) = least {
            runtime.connections.fetch_add(1, Ordering::Relaxed);
            let _ = runtime.sockets.send(accepted);
        }
    }

    pub fn connections(&self) -> usize {
        self.0.iter().map(|r| r.connections.load(Ordering::Relaxed)).sum()
    }
}

fn run(
    index: usize,
    server: Arc<Server>,
    parts: Parts,
    service: Service,
    accepted: flume::Receiver<Accepted>,
    connections: Arc<AtomicUsize>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Long reads run beside the connections; idle threads go away.
        .max_blocking_threads(4)
        .build()
        .expect("a runtime can be started at start-up");
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async move {
        tokio::spawn(parts.deliveries.deliver());
        let numbers = server.metrics.clone();
        let hub = watch::run(
            parts.hub_config,
            index as u64,
            parts.hub,
            server.view.clone(),
            server.storage.clone(),
            move |stats| numbers.hubs[index.min(numbers.hubs.len() - 1)].set(stats),
        );
        tokio::task::spawn_local(hub);
        let routes = Routes::new(Handle { server, runtime: index, watch: parts.watch });
        while let Ok(Accepted { socket, serves, place }) = accepted.recv_async().await {
            let routes = routes.clone();
            let service = service.clone();
            let leaving = Leaving(connections.clone());
            tokio::spawn(async move {
                let _leaving = (leaving, place);
                let served = match socket {
                    Socket::Tcp(s) => match tokio::net::TcpStream::from_std(s) {
                        Ok(s) => serve(s, routes, serves, service).await,
                        Err(e) => Err(e.into()),
                    },
                    Socket::Unix(s) => match tokio::net::UnixStream::from_std(s) {
                        Ok(s) => serve(s, routes, serves, service).await,
                        Err(e) => Err(e.into()),
                    },
                };
                if let Err(e) = served {
                    tracing::debug!("connection ended: {e}");
                }
            });
        }
    });
}

struct Leaving(Arc<AtomicUsize>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve<S>(
    socket: S,
    routes: Routes,
    serves: Serves,
    Service { front, limits }: Service,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    let is_grpc = matches!(serves, Serves::GrpcAndHttp | Serves::Grpc);
    if serves == Serves::Grpc {
        // Nothing of HTTP/1 has a meaning here: the connection ends.
        builder = builder.http2_only();
    }
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .title_case_headers(true)
        // Who has said all may still listen.
        .half_close(true);
    let streams = (limits.max_concurrent_streams != u32::MAX).then_some(limits.max_concurrent_streams);
    builder
        .http2()
        .timer(TokioTimer::new())
        // gRPC says no date, and where it is offered HTTP/2 is nothing else.
        .auto_date_header(!is_grpc)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEADER_LIST_MAX)
        .max_pending_accept_reset_streams(UNSEEN_RESETS_MAX)
        .max_local_error_reset_streams(OWN_RESETS_MAX);
    if let Some((interval, timeout)) = limits.pings {
        builder.http2().keep_alive_interval(interval).keep_alive_timeout(timeout);
    }
    let service = hyper::service::service_fn(move |request| {
        let (routes, front) = (routes.clone(), front.clone());
        async move { Ok::<_, std::convert::Infallible>(answer(&routes, &front, serves, request).await) }
    });
    let socket = PlainIo::new(socket, Pings::new(limits.least_ping_gap));
    builder.serve_connection(TokioIo::new(socket), service).await
}

async fn answer(routes: &Routes, front: &Front, serves: Serves, request: Request<Incoming>) -> Response<Body> {
    let http2 = request.version() == http::Version::HTTP_2;
    let grpc = matches!(serves, Serves::GrpcAndHttp | Serves::Grpc);
    if http2 && grpc {
        let content_type = request.headers().get(http::header::CONTENT_TYPE);
        if content_type.is_some_and(|v| v.as_bytes().starts_with(b"application/grpc")) {
            return routes.call(request).await;
        }
        let text =
            format!("invalid gRPC request content-type {:?}", content_type.map_or("", |v| v.to_str().unwrap_or("")));
        let mut response = tonic::Status::invalid_argument(text).into_http();
        *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
        return response;
    }
    let response: Response<http_body_util::Full<Bytes>> =
        super::respond(routes.handle(), front, serves, &request).await;
    response.map(Body::new)
}
