//! HTTP on the client port: health, version, metrics, what helps debugging; what comes before them; and the listeners that
//! both gRPC and HTTP come in by.

mod debug;
pub mod front;
mod health;
pub mod listener;
mod metrics;
mod pings;
mod plain_io;
pub mod runtime;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;

use crate::{
    api::{Handle, Server},
    cluster::Version,
    config::ETCD_VERSION,
};
use front::Front;
use runtime::Serves;

pub type Answer = Response<Full<Bytes>>;

/// HTTP/1.1 heads: Go's bound for their bytes; what has come with the last read may go beyond it. Go counts no headers;
/// our parser must, and sets aside 64 bytes for each.
pub const HEAD_BYTES_MAX: usize = (1 << 20) + 4096;
pub const HEADERS_MAX: usize = 4096;

/// Answers a plain HTTP request.
pub async fn respond<B>(handle: &Handle, front: &Front, serves: Serves, request: &Request<B>) -> Answer {
    if let Some(refused) = front::refusal(request) {
        return refused;
    }
    if serves == Serves::Metrics {
        return route(handle, serves, request).await;
    }
    if let Some(refused) = front.misdirected(request) {
        return refused;
    }
    let mut answer = match *request.method() {
        Method::OPTIONS => Answer::default(),
        _ => route(handle, serves, request).await,
    };
    front.allow(request.headers(), &mut answer);
    answer
}

async fn route<B>(handle: &Handle, serves: Serves, request: &Request<B>) -> Answer {
    let path = front::path(request);
    let path = path.as_str();
    let query = request.uri().query().unwrap_or("");
    // A listener for metrics serves these and the health endpoints only.
    let everything = serves != Serves::Metrics;
    if everything && path == "/v3" {
        return front::moved(request, "/v3/");
    }
    if let Some(answer) = front::tidied(request) {
        return answer;
    }
    if path == "/metrics" {
        return metrics::render(handle, accepts_gzip(request.headers()));
    }
    if let Some(profile) = path.strip_prefix("/debug/pprof/").filter(|_| everything && handle.server.settings.profiles)
    {
        return debug::profile(profile);
    }
    let is_get_path = matches!(path, "/health" | "/livez" | "/readyz")
        || (everything && matches!(path, "/version" | "/debug/vars"))
        || health::is_check(path);
    if is_get_path && request.method() != Method::GET {
        let mut response = text_error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    match path {
        "/version" if everything => version(&handle.server),
        "/debug/vars" if everything => debug::vars(&handle.server).await,
        "/health" => health::health(handle, query).await,
        _ if path.starts_with("/livez") || path.starts_with("/readyz") => health::checks(handle, path, query).await,
        _ if everything && (path.starts_with("/v3/") || path.starts_with("/v3beta/")) => {
            let mut response = Response::new(Full::from_static(
                br#"{"error":"not implemented: the JSON gateway","code":12,"message":"not implemented: the JSON gateway"}"#,
            ));
            *response.status_mut() = StatusCode::NOT_IMPLEMENTED;
            set_type(&mut response, "application/json");
            response
        }
        _ => not_found(),
    }
}

/// `Full::from` a static slice, named for its use above.
trait FromStatic {
    fn from_static(bytes: &'static [u8]) -> Self;
}

impl FromStatic for Full<Bytes> {
    fn from_static(bytes: &'static [u8]) -> Self {
        Full::new(Bytes::from_static(bytes))
    }
}

/// `/version`, the same on client and peer listeners.
pub fn version(server: &Server) -> Answer {
    let members = &server.view.load().members;
    let or = |version: Option<Version>, unknown: &str| version.map_or_else(|| unknown.to_owned(), |v| v.to_string());
    // The fields in etcd's order.
    let body = format!(
        r#"{{"etcdserver":"{ETCD_VERSION}","etcdcluster":"{}","storage":"{}"}}"#,
        or(members.cluster_version(), "not_decided"),
        or(members.storage_version(), "unknown")
    );
    let mut response = Response::new(Full::from(body));
    set_type(&mut response, "application/json");
    response
}

pub fn set_type(response: &mut Answer, content_type: &'static str) {
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
}

pub fn not_found() -> Answer {
    text_error(StatusCode::NOT_FOUND, "404 page not found")
}

/// A plain text error as Go's HTTP library writes it.
pub fn text_error(status: StatusCode, text: &str) -> Answer {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    set_type(&mut response, "text/plain; charset=utf-8");
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Whether the answer may be compressed: gzip is named, and not with the weight 0.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let weight = weight.trim().strip_prefix("q=").map_or(Ok(1.0), str::parse::<f64>);
        name.trim() == "gzip" && weight.is_ok_and(|weight| weight > 0.0)
    })
}

/// Values of `name` in a query, decoded; a name without a value counts as present with an empty one.
fn query_values(query: &str, name: &str) -> Vec<String> {
    query
        .split('&')
        .filter_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then(|| percent_decode(&value.replace('+', " ")))
        })
        .collect()
}

/// A path or a part of a query as it is meant.
pub fn percent_decode(text: &str) -> String {
    String::from_utf8_lossy(&unescape(text)).into_owned()
}

fn unescape(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let hex: String = bytes.by_ref().take(2).map(char::from).collect();
                out.extend(u8::from_str_radix(&hex, 16).ok());
            }
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_for_who_asks_for_it() {
        let asks = |value: &'static str| {
            accepts_gzip(&HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static(value))]))
        };
        assert!(asks("gzip") && asks("zstd, gzip") && asks("gzip;q=0.5, deflate") && asks("br , gzip ; q=1"));
        assert!(!asks("gzip;q=0") && !asks("*") && !asks("deflate") && !asks("gzip;q=x"));
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    #[test]
    fn queries_read_as_go_reads_them() {
        assert_eq!(query_values("exclude=NOSPACE&exclude=COR%52UPT", "exclude"), ["NOSPACE", "CORRUPT"]);
        assert_eq!(query_values("verbose", "verbose"), [""]);
        assert!(query_values("a=1", "b").is_empty());
    }
}
