//! HTTP on the client port: health, version, metrics; and the listeners that both gRPC and HTTP come in by.

pub mod listener;
mod plain_io;
pub mod runtime;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;

use crate::{api::Handle, config::ETCD_VERSION};

/// Answers a plain HTTP request.
pub async fn respond<B>(handle: &Handle, request: &Request<B>) -> Response<Full<Bytes>> {
    match request.uri().path() {
        "/version" if request.method() == Method::GET => version(handle),
        "/health" if request.method() == Method::GET => health(handle).await,
        "/metrics" => metrics(handle),
        "/version" | "/health" => {
            let mut response = text_error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
            response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET"));
            response
        }
        _ => text_error(StatusCode::NOT_FOUND, "404 page not found"),
    }
}

fn version(handle: &Handle) -> Response<Full<Bytes>> {
    let version = handle.server.view.load().members.cluster_version();
    let or = |unknown: &str| version.map_or_else(|| unknown.to_owned(), |v| v.to_string());
    let body = serde_json::json!({
        "etcdserver": ETCD_VERSION, "etcdcluster": or("not_decided"), "storage": or("unknown")
    });
    let mut response = Response::new(Full::from(body.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

async fn health(handle: &Handle) -> Response<Full<Bytes>> {
    match handle.server.linearizable_view().await {
        Ok(_) => Response::new(Full::from(r#"{"health":"true","reason":""}"#)),
        Err(e) => text_error(
            StatusCode::SERVICE_UNAVAILABLE,
            &serde_json::json!({"health": "false", "reason": format!("RANGE ERROR:{e}")}).to_string(),
        ),
    }
}

fn metrics(handle: &Handle) -> Response<Full<Bytes>> {
    use std::fmt::Write;
    let mut out = String::new();
    let (buckets, count, sum) = handle.server.metrics.wal_sync.read();
    for (bound, n) in buckets {
        let _ = writeln!(out, "etcd_disk_wal_fsync_duration_seconds_bucket{{le=\"{bound}\"}} {n}");
    }
    let _ = writeln!(out, "etcd_disk_wal_fsync_duration_seconds_bucket{{le=\"+Inf\"}} {count}");
    let _ = writeln!(out, "etcd_disk_wal_fsync_duration_seconds_sum {sum}");
    let _ = writeln!(out, "etcd_disk_wal_fsync_duration_seconds_count {count}");
    for actor in handle.server.registry.actors() {
        let now = actor.snapshot(std::time::Instant::now());
        let _ = writeln!(out, "actd_actor_inbox_messages{{actor=\"{}\"}} {}", now.name, now.depth);
        let _ = writeln!(out, "actd_actor_turns_total{{actor=\"{}\"}} {}", now.name, now.turns.count);
        let _ = writeln!(out, "actd_actor_busy_seconds_total{{actor=\"{}\"}} {}", now.name, now.turns.seconds);
        let _ = writeln!(out, "actd_actor_messages_total{{actor=\"{}\"}} {}", now.name, now.batch_messages);
    }
    Response::new(Full::from(out))
}

/// A plain text error as Go's HTTP library writes it.
fn text_error(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    response
}
