//! From a gRPC path to its service, and what holds for every call: metadata checks, deadlines, transport errors'
//! texts, counters.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Request, Response};
use tonic::{Code, Status, body::Body, codec::CompressionEncoding};
use tower_service::Service;

use super::{
    Handle, long,
    metered::{Asked, Call, NoLeader, Unanswered},
    status,
};
use crate::pb::{
    etcdserverpb::{
        auth_server::AuthServer, cluster_server::ClusterServer, kv_server::KvServer, lease_server::LeaseServer,
        maintenance_server::MaintenanceServer, watch_server::WatchServer,
    },
    health::health_server::HealthServer,
    v3electionpb::election_server::ElectionServer,
    v3lockpb::lock_server::LockServer,
};

/// All services of one RPC runtime.
#[derive(Clone)]
pub struct Routes {
    handle: Handle,
    kv: KvServer<Handle>,
    watch: WatchServer<Handle>,
    lease: LeaseServer<Handle>,
    cluster: ClusterServer<Handle>,
    maintenance: MaintenanceServer<Handle>,
    auth: AuthServer<Handle>,
    lock: LockServer<Handle>,
    election: ElectionServer<Handle>,
    health: HealthServer<Handle>,
    receive_max: usize,
}

/// What a learner answers (C-25); of ranges only serializable ones, which the handler looks at.
const LEARNER_MAY: [&str; 3] =
    ["/etcdserverpb.KV/Range", "/etcdserverpb.Maintenance/Status", "/etcdserverpb.Maintenance/Snapshot"];

pub const ENCODING: &str = "grpc-encoding";
const ACCEPT_ENCODING: &str = "grpc-accept-encoding";

impl Routes {
    pub fn new(handle: Handle) -> Self {
        let receive_max = status::receive_max(handle.server.settings.max_request_bytes);
        macro_rules! service {
            ($server:ident) => {
                $server::new(handle.clone())
                    .max_decoding_message_size(receive_max)
                    .max_encoding_message_size(usize::MAX)
                    .accept_compressed(CompressionEncoding::Gzip)
                    .send_compressed(CompressionEncoding::Gzip)
            };
        }
        Self {
            kv: service!(KvServer),
            watch: service!(WatchServer),
            lease: service!(LeaseServer),
            cluster: service!(ClusterServer),
            maintenance: service!(MaintenanceServer),
            auth: service!(AuthServer),
            lock: service!(LockServer),
            election: service!(ElectionServer),
            health: service!(HealthServer),
            handle,
            receive_max,
        }
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    pub async fn call<B>(&self, mut request: Request<B>) -> Response<Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Unpin + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    {
        let uri = request.uri().clone();
        let Some((service, method)) = uri.path().strip_prefix('/').and_then(|p| p.split_once('/')) else {
            return Status::unimplemented(format!("malformed method name: {:?}", uri.path())).into_http();
        };
        if let Err(status) = self.check(uri.path(), request.headers()) {
            return status.into_http();
        }
        if let Err(status) = settle_compression(request.headers_mut()) {
            return status.into_http();
        }
        let timeout = match timeout_of(request.headers()) {
            Ok(timeout) => timeout,
            Err(status) => return status.into_http(),
        };
        let began = Instant::now();
        let metrics = &self.handle.server.metrics;
        let call = Call::start(metrics, uri.path());
        let unanswered = call.clone().map(Unanswered::new);
        let is_stream = call.as_ref().is_some_and(|call| call.method().is_stream());
        // Before the answer: a leader that is lost meanwhile is noticed.
        let no_leader = (is_stream && needs_leader(request.headers())).then(|| self.no_leader());
        let takes_one = call.as_ref().is_some_and(|call| call.method().kind == "server_stream");
        let messages = Arc::new(AtomicU64::new(0));
        let request = request.map(|body| Asked::new(body, call, messages.clone()));
        macro_rules! dispatch {
            ($($name:literal => $field:ident,)*) => {
                match service {
                    $($name => {
                        let mut service = self.$field.clone();
                        with_deadline(timeout, service.call(request)).await
                    })*
                    _ => Status::unimplemented(format!("unknown service {service}")).into_http(),
                }
            };
        }
        let response = dispatch! {
            "etcdserverpb.KV" => kv,
            "etcdserverpb.Watch" => watch,
            "etcdserverpb.Lease" => lease,
            "etcdserverpb.Cluster" => cluster,
            "etcdserverpb.Maintenance" => maintenance,
            "etcdserverpb.Auth" => auth,
            "v3lockpb.Lock" => lock,
            "v3electionpb.Election" => election,
            "grpc.health.v1.Health" => health,
        };
        let response = match messages.load(Ordering::Relaxed) {
            2.. if takes_one => status::many_messages().into_http(),
            _ => long::finish(self.transport_texts(response, service, method, takes_one)),
        };
        let Some(unanswered) = unanswered else { return response };
        let (took, expected) = (began.elapsed(), self.handle.server.settings.slow_request);
        if !is_stream && !expected.is_zero() && took > expected {
            tracing::warn!(method = uri.path(), ?took, expected_duration = ?expected, "request stats");
        }
        unanswered.meter(response, no_leader)
    }

    /// Ready when this member has been without a leader for long, from now on (W-48).
    fn no_leader(&self) -> NoLeader {
        Box::pin(self.handle.server.no_leader.clone().notified_owned())
    }

    /// G-8, G-9.
    fn check(&self, path: &str, headers: &HeaderMap) -> Result<(), Status> {
        if self.handle.server.raft_status.read().is_learner && !LEARNER_MAY.contains(&path) {
            return Err(status::learner_unsupported());
        }
        let version = headers.get("client-api-version").map_or(Ok("unknown"), |v| std::str::from_utf8(v.as_bytes()));
        let Ok(version) = version else { return Err(status::bad_api_version()) };
        let metrics = &self.handle.server.metrics;
        if let Some(place) = metrics.rpcs.find(path) {
            metrics.clients.called(version, metrics.rpcs.of(place).is_stream());
        }
        if needs_leader(headers) && self.handle.server.raft_status.read().leader == 0 {
            return Err(status::no_leader());
        }
        Ok(())
    }

    /// Errors of the transport itself get the texts of etcd's gRPC library.
    fn transport_texts(
        &self,
        mut response: Response<Body>,
        service: &str,
        method: &str,
        is_stream: bool,
    ) -> Response<Body> {
        if response.headers().get("grpc-status").is_none() {
            return response;
        }
        let Some(found) = Status::from_header_map(response.headers()) else { return response };
        let replaced = match (found.code(), found.message()) {
            // A method its service does not have: an empty answer.
            (Code::Unimplemented, "") => {
                Some(Status::unimplemented(format!("unknown method {method} for service {service}")))
            }
            (Code::Internal, "Missing request message.") => Some(status::no_message(is_stream)),
            _ if is_stream => status::of_transport(&found, status::BAD_STREAM_MESSAGE, self.receive_max),
            _ => status::of_transport(&found, "grpc: error unmarshalling request", self.receive_max),
        };
        if let Some(status) = replaced {
            response = status.into_http();
        }
        response
    }
}

/// An answer is compressed as its request is, whatever else the client would take, or not at all.
fn settle_compression(headers: &mut HeaderMap) -> Result<(), Status> {
    headers.remove(ACCEPT_ENCODING);
    match headers.get(ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => {}
        Some(b"gzip") => {
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
        }
        Some(other) => {
            let other = String::from_utf8_lossy(other);
            let text = format!("grpc: Decompressor is not installed for grpc-encoding {other:?}");
            return Err(Status::unimplemented(text));
        }
    }
    Ok(())
}

fn needs_leader(headers: &HeaderMap) -> bool {
    headers.get("hasleader").is_some_and(|value| value == "true")
}

/// The caller's own deadline wins over the server's (G-4). It ends the handler; what is in the log stays.
async fn with_deadline<E>(
    timeout: Option<Duration>,
    call: impl Future<Output = Result<Response<Body>, E>>,
) -> Response<Body>
where
    E: std::fmt::Display,
{
    let response = match timeout {
        None => call.await,
        Some(timeout) => match tokio::time::timeout(timeout, call).await {
            Ok(response) => response,
            Err(_) => return Status::deadline_exceeded("context deadline exceeded").into_http(),
        },
    };
    response.unwrap_or_else(|e| Status::internal(e.to_string()).into_http())
}

/// The `grpc-timeout` header: up to 8 digits and a unit.
fn timeout_of(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let parse = || {
        let text = value.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let n: u64 = digits.parse().ok()?;
        Some(match unit {
            "H" => Duration::from_secs(n * 3600),
            "M" => Duration::from_secs(n * 60),
            "S" => Duration::from_secs(n),
            "m" => Duration::from_millis(n),
            "u" => Duration::from_micros(n),
            "n" => Duration::from_nanos(n),
            _ => return None,
        })
    };
    match parse() {
        Some(timeout) => Ok(Some(timeout)),
        None => {
            let text = String::from_utf8_lossy(value.as_bytes());
            Err(Status::internal(format!("malformed grpc-timeout: {text:?} is no timeout")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_read_as_grpc_writes_them() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", http::HeaderValue::from_static(text));
            timeout_of(&headers)
        };
        assert_eq!(read("3S").unwrap(), Some(Duration::from_secs(3)));
        assert_eq!(read("250m").unwrap(), Some(Duration::from_millis(250)));
        assert_eq!(read("99999999n").unwrap(), Some(Duration::from_nanos(99_999_999)));
        assert_eq!(timeout_of(&HeaderMap::new()).unwrap(), None);
        for bad in ["", "S", "3", "999999999S", "-1S", "3s"] {
            assert_eq!(read(bad).unwrap_err().code(), Code::Internal, "{bad}");
        }
    }
}
