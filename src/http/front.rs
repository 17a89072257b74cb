//! What is looked at before a path: the `Host` header, which web pages may call, `OPTIONS`.
//!
//! [`refusal`] is what Go's HTTP server does on every port; [`Front`] is what etcd adds on those of clients.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::Full;
use hyper::ext::ReasonPhrase;

use super::{Answer, set_type, text_error};

/// Answers a request that no handler shall see.
pub fn refusal<B>(request: &Request<B>) -> Option<Answer> {
    const NO_HOST: &str = "400 Bad Request: missing required Host header";
    const BAD_HOST: &str = "400 Bad Request: malformed Host header";
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => Some(bad_request("400 Bad Request")),
        (Some(host), None) if !is_host(host.as_bytes()) => Some(bad_request(BAD_HOST)),
        (None, _) if request.version() == Version::HTTP_11 => Some(bad_request(NO_HOST)),
        // About the server, not a path of it.
        _ if request.method() == Method::OPTIONS && request.uri().path() == "*" => Some(Answer::default()),
        _ => None,
    }
}

/// Where Go's router sends a path with empty parts, `.` or `..`: to the same without them.
pub fn tidied<B>(request: &Request<B>) -> Option<Answer> {
    let path = request.uri().path();
    if request.method() == Method::CONNECT || !path.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    let end = if path.ends_with('/') && !parts.is_empty() { "/" } else { "" };
    let tidy = format!("/{}{end}", parts.join("/"));
    (tidy != path).then(|| moved(request, &tidy))
}

/// Sends the caller to another path of this server, as Go's router does.
pub fn moved<B>(request: &Request<B>, path: &str) -> Answer {
    let to = request.uri().query().map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
    let mut response = Answer::default();
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    if request.method() == Method::GET {
        let escapes = [('&', "&amp;"), ('"', "&#34;"), ('\'', "&#39;"), ('<', "&lt;"), ('>', "&gt;")];
        let escaped = escapes.into_iter().fold(to.clone(), |text, (from, to)| text.replace(from, to));
        *response.body_mut() = Full::from(format!("<a href=\"{escaped}\">Temporary Redirect</a>.\n\n"));
    }
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        set_type(&mut response, "text/html; charset=utf-8");
    }
    if let Ok(to) = HeaderValue::try_from(to) {
        response.headers_mut().insert(header::LOCATION, to);
    }
    response
}

/// The status line says what the body says.
fn bad_request(text: &'static str) -> Answer {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    set_type(&mut response, "text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    let reason = text.split_once(' ').map_or(text, |(_, reason)| reason);
    response.extensions_mut().insert(ReasonPhrase::from_static(reason.as_bytes()));
    response
}

/// Could it be a host and a port? Characters alone are looked at.
fn is_host(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"!$%&'()*+,-.:;=[]_~".contains(b))
}

/// A host without its port: the brackets of an address go with the port and stay without one.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, _)) if !name.contains([':', '[', ']']) => name,
        Some((name, _)) => name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(host),
        None => host,
    }
}

/// `--cors` and `--host-whitelist`. An empty list allows all, as `*` does.
#[derive(Debug)]
pub struct Front {
    origins: Vec<String>,
    hosts: Vec<String>,
}

impl Front {
    pub fn new(cors: &[String], host_whitelist: &[String]) -> Self {
        let listed = |list: &[String]| if list.iter().any(|v| v == "*") { Vec::new() } else { list.to_vec() };
        Self { origins: listed(cors), hosts: listed(host_whitelist) }
    }

    /// A page of another site that makes its name mean this machine gives itself away by the name.
    pub fn misdirected<B>(&self, request: &Request<B>) -> Option<Answer> {
        if self.hosts.is_empty() {
            return None;
        }
        let header = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let host = without_port(request.uri().authority().map(|a| a.as_str()).or(header).unwrap_or(""));
        if self.hosts.iter().any(|allowed| allowed == host) {
            return None;
        }
        let text = format!(
            "\netcd received your request, but the Host header was unrecognized.\n\n\
             To fix this, choose one of the following options:\n\
             - Enable TLS, then any HTTPS request will be allowed.\n\
             - Add the hostname you want to use to the whitelist in settings.\n  \
             - e.g. etcd --host-whitelist {host:?}\n\n\
             This requirement has been added to help prevent \"DNS Rebinding\" attacks (CVE-2018-5702).\n"
        );
        Some(text_error(StatusCode::MISDIRECTED_REQUEST, &text))
    }

    /// Adds the headers by which a browser lets a page of `asking`'s origin read the answer.
    pub fn allow(&self, asking: &HeaderMap, answer: &mut Answer) {
        let origin = if self.origins.is_empty() {
            HeaderValue::from_static("*")
        } else {
            match asking.get(header::ORIGIN) {
                Some(origin) if self.origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()) => {
                    origin.clone()
                }
                _ => return,
            }
        };
        let headers = answer.headers_mut();
        let methods = HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE");
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        let names = HeaderValue::from_static("accept, content-type, authorization");
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_go_and_brackets_with_them() {
        let cases = [
            ("a.example:80", "a.example"),
            ("a.example", "a.example"),
            ("[::1]:5", "::1"),
            ("[::1]", "[::1]"),
            ("::1", "::1"),
            ("", ""),
        ];
        for (host, name) in cases {
            assert_eq!(without_port(host), name, "{host}");
        }
    }

    #[test]
    fn untidy_paths_are_sent_to_tidy_ones() {
        let location = |method: Method, path: &str| {
            let request = Request::builder().method(method).uri(path).body(()).unwrap();
            tidied(&request).map(|answer| {
                assert_eq!(answer.status(), StatusCode::TEMPORARY_REDIRECT);
                answer.headers()[header::LOCATION].to_str().unwrap().to_owned()
            })
        };
        for path in ["/", "/version", "/raft/stream/", "/a.b/..c", "*"] {
            assert_eq!(location(Method::GET, path), None, "{path}");
        }
        let cases = [
            ("//version", "/version"),
            ("/./version", "/version"),
            ("/a/../version?x=1&y", "/version?x=1&y"),
            ("/raft//stream//", "/raft/stream/"),
            ("/..", "/"),
            ("//", "/"),
        ];
        for (path, to) in cases {
            assert_eq!(location(Method::POST, path).as_deref(), Some(to), "{path}");
        }
    }

    #[test]
    fn hosts_hold_no_other_characters() {
        assert!(is_host(b"a-b_c.example:1") && is_host(b"[::1%25eth0]:1") && is_host(b""));
        for bad in ["a b", "a/b", "a<b", "a@b", "\u{e4}", "a\"", "a\\b", "{a}"] {
            assert!(!is_host(bad.as_bytes()), "{bad}");
        }
    }
}
