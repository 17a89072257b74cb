//! What is looked at before a path leads to its handler: the `Host` header, which web pages may call, `OPTIONS`, and how
//! the path is written.
//!
//! [`refusal`], [`tidied`] and [`path`] are what Go's HTTP server does on every port; [`Front`] is what etcd adds on those
//! of clients.

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body_util::Full;
use hyper::ext::ReasonPhrase;

use super::{Answer, percent_decode, set_type, text_error, unescape};

/// Answers a request that no handler shall see.
pub fn refusal<B>(request: &Request<B>) -> Option<Answer> {
    const NO_HOST: &str = "400 Bad Request: missing required Host header";
    const BAD_HOST: &str = "400 Bad Request: malformed Host header";
    let mut hosts = request.headers().get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => Some(bad_request("400 Bad Request")),
        (Some(host), None) if !is_host(host.as_bytes()) => Some(bad_request(BAD_HOST)),
        (None, _) if request.version() == Version::HTTP_11 => Some(bad_request(NO_HOST)),
        _ if !is_target(request) => Some(bad_request("400 Bad Request")),
        // About the server, not a path of it.
        _ if request.method() == Method::OPTIONS && request.uri().path() == "*" => Some(Answer::default()),
        _ => None,
    }
}

/// Go reads a path whose escapes are whole. Only `CONNECT` may have none.
fn is_target<B>(request: &Request<B>) -> bool {
    let path = request.uri().path();
    let is_escape = |escape: &[u8]| escape.len() == 2 && escape.iter().all(u8::is_ascii_hexdigit);
    path.split('%').skip(1).all(|rest| is_escape(&rest.as_bytes()[..rest.len().min(2)]))
        && (!path.is_empty() || request.method() == Method::CONNECT)
}

/// By what Go's router finds a handler: the path without what is untidy, its escapes read. An escaped slash stays
/// escaped, for it parts nothing.
pub fn path<B>(request: &Request<B>) -> String {
    let written = written(request.uri().path());
    let tidy = if request.method() == Method::CONNECT { written.into_owned() } else { tidy(&written) };
    percent_decode(&tidy.replace("%2F", "%252F").replace("%2f", "%252F"))
}

/// Where Go's router sends a path with empty parts, `.` or `..`: to the same without them. It escapes anew what it does
/// not unescape.
pub fn tidied<B>(request: &Request<B>) -> Option<Answer> {
    let path = written(request.uri().path());
    if path == "*" {
        let mut response = Answer::default();
        *response.status_mut() = StatusCode::BAD_REQUEST;
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        return Some(response);
    }
    let tidy = tidy(&path);
    (request.method() != Method::CONNECT && tidy != path).then(|| moved(request, &tidy))
}

fn tidy(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    let end = if path.ends_with('/') && !parts.is_empty() { "/" } else { "" };
    format!("/{}{end}", parts.join("/"))
}

/// A path as it came, unless something in it should have been escaped: then Go escapes all of it anew.
fn written(path: &str) -> Cow<'_, str> {
    match path.bytes().all(|byte| is_plain(byte) || b"!'()*[]%".contains(&byte)) {
        true => path.into(),
        false => escaped(&unescape(path)).into(),
    }
}

fn escaped(path: &[u8]) -> String {
    let escape = |byte: &u8| if is_plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    path.iter().map(escape).collect()
}

/// What Go leaves as it is in a path.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@".contains(&byte)
}

/// Sends the caller to another path of this server, as Go's router does.
pub fn moved<B>(request: &Request<B>, path: &str) -> Answer {
    let path = escaped(path.as_bytes());
    let to = match request.uri().query() {
        None | Some("") => path,
        Some(query) => format!("{path}?{query}"),
    };
    let mut response = Answer::default();
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    if request.method() == Method::GET {
        // No target has a `<`, `>` or `"` in its query.
        let shown = to.replace('&', "&amp;").replace('\'', "&#39;");
        *response.body_mut() = Full::from(format!("<a href=\"{shown}\">Temporary Redirect</a>.\n\n"));
    }
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        set_type(&mut response, "text/html; charset=utf-8");
    }
    // Of what a query may hold a header cannot hold what is not ASCII.
    let ascii = |c: char| {
        if c.is_ascii() { c.to_string() } else { c.to_string().bytes().map(|b| format!("%{b:02x}")).collect() }
    };
    let to: String = to.chars().map(ascii).collect();
    response.headers_mut().insert(header::LOCATION, HeaderValue::try_from(to).expect("visible ASCII"));
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

    fn request(method: Method, target: &str) -> Request<()> {
        Request::builder().method(method).uri(target).header(header::HOST, "a").body(()).unwrap()
    }

    #[test]
    fn untidy_paths_are_sent_to_tidy_ones_as_go_writes_them() {
        let location = |method: Method, target: &str| {
            tidied(&request(method, target)).map(|answer| {
                assert_eq!(answer.status(), StatusCode::TEMPORARY_REDIRECT);
                answer.headers()[header::LOCATION].to_str().unwrap().to_owned()
            })
        };
        for path in
            ["/", "/version", "/raft/stream/", "/a.b/..c", "/a%2F%2Fb", "/a/%2E%2E/b", "/..%2Fa", "/a!b", "/a\"b"]
        {
            assert_eq!(location(Method::GET, path), None, "{path}");
        }
        for path in ["foo:80", "//version", "/version/.."] {
            assert_eq!(location(Method::CONNECT, path), None, "{path}");
        }
        let cases = [
            ("//version", "/version"),
            ("/./version", "/version"),
            ("/a/../version?x=1&y", "/version?x=1&y"),
            ("/raft//stream//", "/raft/stream/"),
            ("/..", "/"),
            ("//", "/"),
            ("/a/.", "/a"),
            ("//version?", "/version"),
            ("//version??", "/version??"),
            ("//version?x=%20&y=%zz", "/version?x=%20&y=%zz"),
            ("//version?x=\u{e4}", "/version?x=%c3%a4"),
            // Escapes are escaped again.
            ("//a%20b", "/a%2520b"),
            ("//a%3Fb", "/a%253Fb"),
            ("//a%2fb;c", "/a%252fb;c"),
            ("//a%2Fb", "/a%252Fb"),
            ("/../%2e", "/%252e"),
            ("//a%ffb", "/a%25ffb"),
            ("//a%00b", "/a%2500b"),
            ("//a;b,c@d:e$f&g=h+i!j*k(l)", "/a;b,c@d:e$f&g=h+i%21j%2Ak%28l%29"),
            // What should have been escaped is so twice.
            ("//\u{e4}", "/%25C3%25A4"),
            ("//a\"b'd", "/a%2522b%2527d"),
            ("//a%2f\"b", "/a/%2522b"),
        ];
        for (path, to) in cases {
            assert_eq!(location(Method::POST, path).as_deref(), Some(to), "{path}");
        }
    }

    #[test]
    fn handlers_are_found_by_tidy_paths_without_escapes() {
        let cases = [
            ("/%76ersion", "/version"),
            ("//x/../%763", "/v3"),
            ("/version%2F", "/version%2F"),
            ("/a%2fb%20%C3%A4", "/a%2Fb \u{e4}"),
            ("/%2e%2e/version", "/../version"),
        ];
        for (target, by) in cases {
            assert_eq!(path(&request(Method::GET, target)), by, "{target}");
        }
        assert_eq!(path(&request(Method::CONNECT, "//version")), "//version");
        assert_eq!(path(&request(Method::CONNECT, "foo:80")), "");
    }

    #[test]
    fn targets_that_go_cannot_read_are_refused() {
        for bad in ["/a%zz", "//a%", "/%4", "/%4\u{e4}", "foo"] {
            let answer = refusal(&request(Method::GET, bad)).unwrap_or_else(|| panic!("{bad}"));
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{bad}");
        }
        for good in ["/%41", "/a?%zz", "http://a"] {
            assert!(refusal(&request(Method::GET, good)).is_none(), "{good}");
        }
        assert!(refusal(&request(Method::CONNECT, "foo:80")).is_none());
        assert_eq!(tidied(&request(Method::GET, "*")).unwrap().status(), StatusCode::BAD_REQUEST);
        assert_eq!(refusal(&request(Method::OPTIONS, "*")).unwrap().status(), StatusCode::OK);
    }

    #[test]
    fn hosts_hold_no_other_characters() {
        assert!(is_host(b"a-b_c.example:1") && is_host(b"[::1%25eth0]:1") && is_host(b""));
        for bad in ["a b", "a/b", "a<b", "a@b", "\u{e4}", "a\"", "a\\b", "{a}"] {
            assert!(!is_host(bad.as_bytes()), "{bad}");
        }
    }
}
