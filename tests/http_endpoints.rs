//! HTTP on the client port: health, version, metrics (M-14, M-15).

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use actd::pb::etcdserverpb::{AlarmRequest, PutRequest};
use common::{Client, Server};

/// Status line, headers, body.
fn ask(server: &Server, method: &str, path: &str) -> (String, String, String) {
    let address = server.endpoint().trim_start_matches("http://").to_owned();
    let mut socket = TcpStream::connect(&address).expect("the port answers");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout can be set");
    write!(socket, "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("a request goes out");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let (status, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    (status.trim_start_matches("HTTP/1.1 ").to_owned(), headers.to_lowercase(), body.to_owned())
}

/// Everything that comes back until the server closes, for a request as it stands.
fn raw(port: u16, request: &str) -> String {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the port answers");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout can be set");
    socket.write_all(request.as_bytes()).expect("a request goes out");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).expect("an answer");
    String::from_utf8(answer).expect("text")
}

/// Of a `GET` that says nothing but this.
fn with_host(server: &Server, path: &str, host: &str, origin: Option<&str>) -> String {
    let origin = origin.map_or_else(String::new, |origin| format!("Origin: {origin}\r\n"));
    raw(server.client_port, &format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{origin}Connection: close\r\n\r\n"))
}

fn start() -> Server {
    Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), &[])
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

async fn alarm(server: &Server, action: i32, kind: i32) {
    let request = AlarmRequest { action, member_id: 7, alarm: kind };
    Client::connect(server).await.maintenance.alarm(request).await.expect("the alarm is set");
}

#[test]
fn healthy_member_says_so_in_etcds_words() {
    let server = start();
    let (status, headers, body) = ask(&server, "GET", "/health");
    assert_eq!((status.as_str(), body.as_str()), ("200 OK", r#"{"health":"true","reason":""}"#));
    assert!(headers.contains("content-type: text/plain; charset=utf-8"));
    let (_, headers, body) = ask(&server, "GET", "/version");
    assert_eq!(body, r#"{"etcdserver":"3.7.1","etcdcluster":"3.7.0","storage":"3.7.0"}"#);
    assert!(headers.contains("content-type: application/json") && headers.contains("\r\ndate: "), "{headers}");
    assert_eq!(ask(&server, "GET", "/livez").2, "ok\n");
    assert_eq!(ask(&server, "GET", "/readyz/non_learner").2, "ok\n");
    let verbose = ask(&server, "GET", "/readyz?verbose").2;
    assert!(verbose.ends_with("ok\n") && verbose.contains("[+]linearizable_read ok\n"), "{verbose}");
    assert_eq!(ask(&server, "GET", "/livez?verbose").2, "[+]serializable_read ok\nok\n");
}

#[test]
fn debug_pages_are_there_for_who_asks_for_them() {
    let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    let server = start();
    let (status, headers, body) = ask(&server, "GET", "/debug/vars");
    assert_eq!(status, "200 OK");
    assert!(headers.contains("content-type: application/json; charset=utf-8"), "{headers}");
    let lines: Vec<&str> = body.lines().map(|line| line.split(':').next().expect("a name")).collect();
    let names = ["{", r#""cmdline""#, r#""file_descriptor_limit""#, r#""memstats""#, r#""raft.status""#, "}"];
    assert_eq!(lines, names);
    let vars: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(vars["cmdline"][1], "--name=m0");
    assert!(vars["file_descriptor_limit"].as_u64() > Some(0) && vars["memstats"]["Sys"].as_u64() > Some(1 << 20));
    let raft = &vars["raft.status"];
    let id = raft["id"].as_str().expect("an id");
    assert_eq!((&raft["lead"], &raft["vote"], &raft["leadtransferee"]), (&raft["id"], &raft["id"], &"0".into()));
    assert_eq!(raft["raftState"], "StateLeader");
    let own = &raft["progress"][id];
    assert_eq!(
        (own["next"].as_u64(), own["state"].as_str()),
        (own["match"].as_u64().map(|n| n + 1), Some("StateReplicate"))
    );
    assert!(raft["commit"].as_u64() > Some(0) && raft["applied"] == raft["commit"] && raft["term"].as_u64() > Some(0));
    assert_eq!(ask(&server, "HEAD", "/debug/vars").0, "405 Method Not Allowed");

    assert_eq!(ask(&server, "GET", "/debug/pprof/cmdline").0, "404 Not Found");
    let server = Server::start(Path::new(&program), &["--enable-pprof"]);
    assert!(ask(&server, "GET", "/debug/pprof/cmdline").2.contains("\0--name=m0\0"));
    assert_eq!(ask(&server, "GET", "/debug/pprof/none").0, "404 Not Found");
    let (status, _, text) = ask(&server, "GET", "/debug/pprof/heap");
    // A real etcd has them.
    if program.file_name() != Some("etcd".as_ref()) {
        assert_eq!(status, "501 Not Implemented");
        assert!(text.starts_with("not implemented: profiles"), "{text}");
    }
}

#[test]
fn metrics_are_compressed_for_who_asks_for_it() {
    let server = start();
    let mut socket = TcpStream::connect(("127.0.0.1", server.client_port)).expect("the port answers");
    let head = "GET /metrics HTTP/1.0\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n";
    socket.write_all(head.as_bytes()).expect("a request goes out");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).expect("an answer");
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("a head") + 4;
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    assert!(head.contains("content-encoding: gzip\r\n"), "{head}");
    let mut text = String::new();
    flate2::read::GzDecoder::new(&answer[end..]).read_to_string(&mut text).expect("gzip");
    assert!(text.contains("\netcd_server_has_leader 1\n"), "{text}");
    assert!(answer.len() < text.len() / 4);
}

#[test]
fn wrong_methods_and_paths_are_refused_as_by_go() {
    let server = start();
    for path in ["/health", "/version", "/livez", "/readyz/data_corruption"] {
        for method in ["POST", "HEAD"] {
            let (status, headers, _) = ask(&server, method, path);
            assert_eq!(status, "405 Method Not Allowed", "{method} {path}");
            assert!(headers.contains("allow: get"));
        }
    }
    for path in ["/", "/v2/keys", "/livez/nonsense", "/readyz/", "/members"] {
        let (status, _, body) = ask(&server, "GET", path);
        assert_eq!((status.as_str(), body.as_str()), ("404 Not Found", "404 page not found\n"), "{path}");
    }
    let (status, _, body) = ask(&server, "GET", "/v3/kv/range");
    assert!(status.starts_with("501") && body.contains("not implemented"), "{status} {body}");
}

#[test]
fn untidy_paths_are_sent_to_tidy_ones() {
    let server = start();
    let cases = [
        ("//health", "/health"),
        ("/a/../health", "/health"),
        ("/livez/./nope?a=1&b=2", "/livez/nope?a=1&b=2"),
        ("/version//", "/version/"),
        ("/health/..", "/"),
        ("/../", "/"),
        ("/v3", "/v3/"),
        ("//v3?x", "/v3/?x"),
        ("/%763?", "/v3/"),
        ("//version?", "/version"),
        ("//a%20b?q='", "/a%2520b?q='"),
    ];
    for (path, to) in cases {
        let (status, headers, body) = ask(&server, "GET", path);
        assert_eq!(status, "307 Temporary Redirect", "{path}");
        assert!(headers.lines().any(|line| line == format!("location: {to}")), "{path}: {headers}");
        let shown = to.replace('&', "&amp;").replace('\'', "&#39;");
        assert_eq!(body, format!("<a href=\"{shown}\">Temporary Redirect</a>.\n\n"), "{path}");
    }
    let (status, headers, body) = ask(&server, "POST", "//health");
    assert_eq!((status.as_str(), body.as_str()), ("307 Temporary Redirect", ""));
    assert!(!headers.lines().any(|line| line.starts_with("content-type:")), "{headers}");
    for path in ["/livez/", "/livez/nope", "/readyz/", "/livez/non_learner"] {
        assert!(ask(&server, "POST", path).0.starts_with("404"), "{path}");
    }
    assert!(ask(&server, "POST", "/readyz/non_learner").0.starts_with("405"));
}

#[test]
fn escapes_in_paths_are_read_and_connect_finds_no_other_path() {
    let server = start();
    let status = |port, line: &str| {
        let answer = raw(port, &format!("{line} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
        answer.split(' ').nth(1).expect("a status").to_owned()
    };
    let (client, peer) = (server.client_port, server.peer_port);
    let cases = [
        (client, "GET /%76ersion", "200"),
        (client, "GET /he%61lth", "200"),
        (client, "GET /livez/serializable%5Fread", "200"),
        (client, "GET /version%2F", "404"),
        (client, "GET /livez%2Fx", "404"),
        (client, "CONNECT foo:80", "404"),
        (client, "CONNECT //version", "404"),
        (client, "CONNECT /%76ersion", "405"),
        (client, "CONNECT /v3", "307"),
        (client, "GET /a%zz", "400"),
        (client, "GET *", "400"),
        (client, "GET foo", "400"),
        (peer, "GET /%76ersion", "200"),
        (peer, "GET /%6dembers", "200"),
        (peer, "GET /members%2Fhashkv", "404"),
        (peer, "GET /members/hash%6bv", "400"),
        (peer, "GET /members/promote/%31", "405"),
        (peer, "GET /raft/strea%6d", "307"),
        (peer, "CONNECT foo:80", "404"),
        (peer, "GET //a%zz", "400"),
        (peer, "GET //a%20b", "307"),
    ];
    for (port, line, expected) in cases {
        assert_eq!(status(port, line), expected, "{line}");
    }
}

#[test]
fn alarms_show_in_health_and_readiness() {
    let server = start();
    let runtime = runtime();
    runtime.block_on(alarm(&server, 1, 1));
    let (status, _, body) = ask(&server, "GET", "/health");
    assert_eq!(
        (status.as_str(), body.as_str()),
        ("503 Service Unavailable", "{\"health\":\"false\",\"reason\":\"ALARM NOSPACE\"}\n")
    );
    assert_eq!(ask(&server, "GET", "/health?exclude=NOSPACE").0, "200 OK");
    assert_eq!(ask(&server, "GET", "/readyz").0, "200 OK", "NOSPACE is not looked at");
    runtime.block_on(alarm(&server, 1, 2));
    let (status, _, body) = ask(&server, "GET", "/readyz");
    assert_eq!(status, "503 Service Unavailable");
    assert!(body.contains("[-]data_corruption failed: alarm activated: CORRUPT\n"), "{body}");
    assert!(body.ends_with("\n\n"));
    assert_eq!(ask(&server, "GET", "/readyz?exclude=data_corruption").0, "200 OK");
    assert_eq!(ask(&server, "GET", "/livez").0, "200 OK");
    let (_, _, body) = ask(&server, "GET", "/health?exclude=NOSPACE");
    assert!(body.contains("ALARM CORRUPT"));
}

#[test]
fn metrics_are_described_unique_and_move() {
    let server = start();
    let before = server.metric("etcd_mvcc_put_total").expect("the metric is there");
    runtime().block_on(async {
        let mut client = Client::connect(&server).await;
        let put = PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
        client.kv.put(put).await.expect("a put");
    });
    assert_eq!(server.metric("etcd_mvcc_put_total"), Some(before + 1.0));
    assert_eq!(server.metric("etcd_debugging_mvcc_keys_total"), Some(1.0));
    assert_eq!(server.metric("etcd_server_has_leader"), Some(1.0));

    let (_, headers, body) = ask(&server, "GET", "/metrics");
    assert!(headers.contains("content-type: text/plain; version=0.0.4; charset=utf-8; escaping=underscores"));
    let mut described = std::collections::HashSet::new();
    let mut samples = std::collections::HashSet::new();
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let name = rest.split(' ').next().expect("a name").to_owned();
            assert!(described.insert(name.clone()), "{name} is described twice");
        } else if !line.starts_with('#') && !line.is_empty() {
            let (series, _) = line.rsplit_once(' ').expect("a value");
            assert!(samples.insert(series.to_owned()), "{series} is there twice");
            let name = series.split('{').next().expect("a name");
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
            let known = described.contains(name) || family.is_some_and(|f| described.contains(f));
            assert!(known, "{name} has no head");
        }
    }
    for actor in ["raft", "wal", "apply", "lease_expirer", "checkpointer"] {
        assert!(body.contains(&format!("actd_actor_messages_total{{actor=\"{actor}\"}}")), "{actor} is not told of");
    }
}

#[test]
fn promtool_reads_the_metrics() {
    let Some(promtool) = common::require_tool("promtool") else { return };
    let server = start();
    let (_, _, body) = ask(&server, "GET", "/metrics");
    let mut child = std::process::Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("promtool starts");
    child.stdin.take().expect("piped").write_all(body.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    // Exit 3: only remarks about names, and those are etcd's.
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 3)), "promtool: {text}");
    let ours: Vec<&str> = text.lines().filter(|line| line.starts_with("actd_")).collect();
    assert!(ours.is_empty(), "remarks about our own names: {ours:#?}");
}

#[test]
fn who_has_said_all_still_gets_the_answer() {
    let server = start();
    for (port, path) in [(server.client_port, "/metrics"), (server.peer_port, "/version")] {
        for (head, rest) in [("HTTP/1.1\r\nHost: x", ""), ("HTTP/1.0", "")] {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the port answers");
            socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout can be set");
            write!(socket, "GET {path} {head}\r\n\r\n{rest}").expect("a request goes out");
            socket.shutdown(std::net::Shutdown::Write).expect("half of it closes");
            let mut answer = String::new();
            socket.read_to_string(&mut answer).expect("an answer");
            assert!(answer.split(' ').nth(1) == Some("200"), "{path} {head}: {answer:?}");
        }
    }
}

#[test]
fn long_heads_are_read_as_far_as_gos_server_reads_them() {
    let server = start();
    let ask = |port, extra: &str| {
        let answer = raw(port, &format!("GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{extra}\r\n"));
        answer.split_once("\r\n").expect("a status line").0.to_owned()
    };
    for port in [server.client_port, server.peer_port] {
        let many: String = (0..4_000).map(|n| format!("h{n}: x\r\n")).collect();
        assert_eq!(ask(port, &many), "HTTP/1.1 200 OK");
        let long = |bytes| format!("h: {}\r\n", "a".repeat(bytes));
        assert_eq!(ask(port, &long(1_050_000)), "HTTP/1.1 200 OK");
    }
    // The rest of what is too long is not read, so the answer may be lost: only that there is no good one is certain.
    let mut socket = TcpStream::connect(("127.0.0.1", server.client_port)).expect("the port answers");
    let head = "GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    let _ = write!(socket, "{head}h: {}\r\n\r\n", "a".repeat(4 << 20));
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
}

#[test]
fn a_request_must_name_one_well_formed_host() {
    let server = start();
    let cases = [
        ("", "400 Bad Request: missing required Host header"),
        ("Host: a\r\nHost: a\r\n", "400 Bad Request"),
        ("Host: a b\r\n", "400 Bad Request: malformed Host header"),
        ("Host:\r\n", "200 OK"),
    ];
    for port in [server.client_port, server.peer_port] {
        for (hosts, expected) in cases {
            // A refusal closes the connection unasked.
            let close = if expected == "200 OK" { "Connection: close\r\n" } else { "" };
            let answer = raw(port, &format!("GET /version HTTP/1.1\r\n{hosts}{close}\r\n"));
            let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
            assert!(head.starts_with(&format!("HTTP/1.1 {expected}\r\n")), "{hosts:?}: {head}");
            assert!(head.contains("\r\nConnection: close") || head.contains("\r\nconnection: close"), "{head}");
            assert!(expected == "200 OK" || body == expected, "{body}");
        }
        assert!(raw(port, "GET /version HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 200 OK\r\n"));
        let about_all = raw(port, "OPTIONS * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        assert!(about_all.starts_with("HTTP/1.1 200 OK\r\n") && !about_all.contains("Access-Control"), "{about_all}");
    }
}

const FOR_PAGES: &str = "Access-Control-Allow-Origin: ";

#[test]
fn pages_of_any_site_may_call_by_default() {
    let server = start();
    for path in ["/version", "/metrics", "/nope"] {
        let (_, headers, _) = ask(&server, "GET", path);
        for line in [
            "access-control-allow-origin: *",
            "access-control-allow-methods: post, get, options, put, delete",
            "access-control-allow-headers: accept, content-type, authorization",
        ] {
            assert!(headers.contains(line), "{path}: {headers}");
        }
    }
    let (status, headers, body) = ask(&server, "OPTIONS", "/any/path");
    assert_eq!((status.as_str(), body.as_str()), ("200 OK", ""));
    assert!(headers.contains("access-control-allow-origin: *"));
    let other_port = raw(server.peer_port, "GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    assert!(!other_port.contains(FOR_PAGES), "{other_port}");
}

#[test]
fn pages_and_hosts_that_are_not_listed_get_nothing() {
    let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    let flags = ["--cors=http://a.example:80,https://b.example:8443", "--host-whitelist=good.example,127.0.0.1"];
    let server = Server::start(Path::new(&program), &flags);
    let allowed = with_host(&server, "/version", "good.example:80", Some("https://b.example:8443"));
    assert!(allowed.contains("Access-Control-Allow-Origin: https://b.example:8443\r\n"), "{allowed}");
    for origin in [None, Some("http://c.example:80"), Some("http://A.example:80"), Some("http://a.example:80/")] {
        let answer = with_host(&server, "/version", "good.example", origin);
        assert!(answer.starts_with("HTTP/1.1 200 OK") && !answer.contains("Access-Control"), "{origin:?}: {answer}");
    }
    for host in ["bad.example:1", "GOOD.example", ""] {
        let answer = with_host(&server, "/metrics", host, Some("http://a.example:80"));
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 421 Misdirected Request\r\n"), "{host}: {head}");
        assert!(!head.contains(FOR_PAGES), "{head}");
        let name = host.trim_end_matches(":1");
        assert!(body.contains(&format!("  - e.g. etcd --host-whitelist \"{name}\"\n\n")), "{body}");
        assert!(body.ends_with("attacks (CVE-2018-5702).\n\n") && body.len() == 362 + name.len(), "{body}");
    }
}
