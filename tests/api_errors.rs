//! The table of errors, `data/errors.tsv`, row by row: each is provoked over a socket and compared to the byte, or named
//! here with the reason why it is not. A row that is in neither list fails the test, and so does an entry without a row.

mod common;

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

use actd::pb::{
    etcdserverpb::{
        AlarmRequest, AuthenticateRequest, DowngradeRequest, LeaseGrantRequest, LeaseKeepAliveRequest,
        LeaseRevokeRequest, MemberAddRequest, MemberPromoteRequest, MemberRemoveRequest, MoveLeaderRequest, PutRequest,
        RangeRequest, RangeResponse, StatusRequest, WatchCreateRequest, WatchRequest, auth_client::AuthClient,
        watch_request::RequestUnion,
    },
    health::{HealthCheckRequest, health_client::HealthClient},
};
use bytes::Bytes;
use common::{
    Client, Server,
    calls::{Op, PATIENCE, Watching, all, block_on, get, put},
};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};

const TABLE: &str = include_str!("data/errors.tsv");

const NEVER: &str = "the table says that it never leaves a server with this code";
const AUTH: &str = "authentication cannot be switched on yet";
const LOCK: &str = "the lock and election services are not there yet";
const GONE: &str = "it goes to a caller that has cancelled and no longer listens";
const RACE: &str = "it needs a member at one moment of its start, stop or change of leader, which no caller can choose";
const SLOW: &str = "it needs a member that is behind in applying, which no request makes it";

/// Code, text, reason.
const NOT_PROVOKED: &[(&str, &str, &str)] = &[
    ("Canceled", "etcdserver: watch canceled", GONE),
    ("Canceled", "etcdserver: request canceled", GONE),
    ("Canceled", "context canceled", GONE),
    ("Canceled", "Stream has ended.", GONE),
    ("FailedPrecondition", "etcdserver: member ID already exist", "ids are of URLs and time: URLs in use come first"),
    ("FailedPrecondition", "etcdserver: re-configuration failed due to not enough started members", NEVER),
    ("FailedPrecondition", "etcdserver: cluster ID mismatch", NEVER),
    ("ResourceExhausted", "etcdserver: too many requests", NEVER),
    ("FailedPrecondition", "etcdserver: no inflight downgrade job", NEVER),
    ("DeadlineExceeded", "etcdserver: context deadline exceeded", NEVER),
    ("FailedPrecondition", "etcdserver: root user does not exist", AUTH),
    ("FailedPrecondition", "etcdserver: root user does not have root role", AUTH),
    ("FailedPrecondition", "etcdserver: user name already exists", AUTH),
    ("InvalidArgument", "etcdserver: user name is empty", AUTH),
    ("FailedPrecondition", "etcdserver: user name not found", AUTH),
    ("FailedPrecondition", "etcdserver: role name already exists", AUTH),
    ("FailedPrecondition", "etcdserver: role name not found", AUTH),
    ("InvalidArgument", "etcdserver: role name is empty", AUTH),
    ("InvalidArgument", "etcdserver: authentication failed, invalid user ID or password", AUTH),
    ("InvalidArgument", "etcdserver: permission not given", AUTH),
    ("PermissionDenied", "etcdserver: permission denied", AUTH),
    ("FailedPrecondition", "etcdserver: role is not granted to the user", AUTH),
    ("FailedPrecondition", "etcdserver: permission is not granted to the role", AUTH),
    ("Unauthenticated", "etcdserver: invalid auth token", AUTH),
    ("InvalidArgument", "etcdserver: invalid auth management", AUTH),
    ("InvalidArgument", "etcdserver: revision of auth store is old", AUTH),
    ("Unknown", "auth: authentication failed, password was given for no password user", AUTH),
    ("Unknown", "auth: token signing attempted with verify-only key", AUTH),
    ("Unknown", "failed to assign", AUTH),
    ("Unknown", "bcrypt: password length exceeds 72 bytes", AUTH),
    ("(watch cancel_reason)", "rpc error: code = PermissionDenied desc = etcdserver: permission denied", AUTH),
    ("(watch cancel_reason)", "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token", AUTH),
    (
        "(watch cancel_reason)",
        "rpc error: code = InvalidArgument desc = etcdserver: revision of auth store is old",
        AUTH,
    ),
    ("(watch cancel_reason)", "rpc error: code = InvalidArgument desc = etcdserver: user name is empty", AUTH),
    ("Unknown", "\"leader\" field must be provided", LOCK),
    ("Unknown", "election: not leader", LOCK),
    ("Unknown", "election: no leader", LOCK),
    ("Unknown", "mutex: session is expired", LOCK),
    ("Unknown", "lost watcher waiting for delete", LOCK),
    ("Unknown", "etcdserver: requested lease not found", LOCK),
    ("Unavailable", "etcdserver: leader changed", RACE),
    ("FailedPrecondition", "etcdserver: not capable", RACE),
    ("Unavailable", "etcdserver: server stopped", RACE),
    ("Unavailable", "etcdserver: request timed out, possibly due to previous leader failure", RACE),
    ("Unavailable", "etcdserver: request timed out, possibly due to connection lost", RACE),
    ("FailedPrecondition", "etcdserver: cluster version not found during downgrade", RACE),
    ("Unknown", "not a primary lessor", RACE),
    (
        "Unknown",
        "etcdserver: request timed out, leader transfer took too long",
        "the caller's own deadline comes first",
    ),
    ("Unknown", "raft proposal dropped", RACE),
    ("Unknown", "raft: stopped", RACE),
    ("Unavailable", "etcdserver: request timed out, waiting for the applied index took too long", SLOW),
    ("Unknown", "etcdserver: too many requests", SLOW),
    ("Unknown", "<any text>", "a rule and no text"),
    (
        "ResourceExhausted",
        "grpc: trying to send message larger than max (<n> vs. <limit>)",
        "it takes an answer of 2 GiB",
    ),
    ("(HTTP/2 GOAWAY ENHANCE_YOUR_CALM)", "too_many_pings", "it is the connection's; tests/api_limits.rs has it"),
];

fn start(flags: &[&str]) -> Server {
    Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), flags)
}

/// Whether a text is one of a row's, whose `<…>` stand for anything.
fn is_like(template: &str, text: &str) -> bool {
    let mut parts = template.split(['<', '>']).step_by(2);
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    if !template.contains('<') {
        return rest.is_empty();
    }
    for part in parts {
        let Some(at) = rest.rfind(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty() || template.ends_with('>')
}

/// What was provoked: codes and texts as they came.
#[derive(Default)]
struct Provoked(Vec<(String, String)>);

impl Provoked {
    /// Notes a refusal, which must be one of the table with this text.
    #[track_caller]
    fn note<T: std::fmt::Debug>(&mut self, expected: &str, outcome: Result<T, Status>) {
        let status = outcome.expect_err(expected);
        let code = match status.code() {
            tonic::Code::Cancelled => "Canceled".to_owned(),
            code => format!("{code:?}"),
        };
        self.note_text(expected, &code, status.message());
    }

    #[track_caller]
    fn note_text(&mut self, expected: &str, code: &str, text: &str) {
        assert!(is_like(expected, text), "{expected:?} was to be provoked and {code} {text:?} was");
        self.0.push((code.to_owned(), text.to_owned()));
    }

    fn covers(&self, code: &str, template: &str) -> bool {
        self.0.iter().any(|(c, text)| c == code && is_like(template, text))
    }
}

#[test]
fn every_row_is_provoked_or_excused() {
    let mut provoked = Provoked::default();
    let refusals = start(&[]);
    block_on(validation(&refusals, &mut provoked));
    block_on(state(&refusals, &mut provoked));
    block_on(transport(&refusals, &mut provoked));
    block_on(watch_reasons(&refusals, &mut provoked));
    block_on(alarms(&refusals, &mut provoked));
    drop(refusals);
    block_on(membership(&mut provoked));
    block_on(without_leader(&mut provoked));

    let rows: Vec<Vec<&str>> = TABLE.lines().skip(1).map(|line| line.split('\t').collect()).collect();
    assert!(rows.len() > 100, "the table is whole");
    let excused: HashSet<_> = NOT_PROVOKED.iter().map(|(code, text, _)| (*code, *text)).collect();
    assert_eq!(excused.len(), NOT_PROVOKED.len(), "nothing is excused twice");
    let mut wrong = Vec::new();
    for row in &rows {
        let (code, text, sent) = (row[0], row[2], row[7]);
        let is_excused = excused.contains(&(code, text));
        match (provoked.covers(code, text), is_excused) {
            (false, false) => wrong.push(format!("neither provoked nor excused: {code} {text}")),
            (true, true) if text != "<any text>" => wrong.push(format!("excused, but provoked: {code} {text}")),
            _ => {}
        }
        if sent.starts_with("never") && !is_excused {
            wrong.push(format!("never sent, but not excused: {code} {text}"));
        }
    }
    let is_row = |code: &str, text: &str| rows.iter().any(|row| row[0] == code && row[2] == text);
    for (code, text, _) in NOT_PROVOKED {
        if !is_row(code, text) {
            wrong.push(format!("excused, but not in the table: {code} {text}"));
        }
    }
    for (code, text) in &provoked.0 {
        let is_known = rows.iter().any(|row| row[0] == code && row[2] != "<any text>" && is_like(row[2], text));
        if !is_known {
            wrong.push(format!("provoked with a code or text that is not in the table: {code} {text}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Refused before a request goes anywhere.
async fn validation(server: &Server, seen: &mut Provoked) {
    let mut c = Client::connect(server).await;
    let no_key = "etcdserver: key is not provided";
    seen.note(no_key, c.range(get("")).await);
    seen.note(no_key, c.put(put("", "")).await);
    seen.note(no_key, c.delete(Default::default()).await);
    seen.note(no_key, c.txn(all([get("").op()])).await);
    seen.note(no_key, c.kv.range_stream(get("")).await.map(drop).and(ended(&c, get("")).await));
    seen.note("etcdserver: key not found", c.put(PutRequest { ignore_value: true, ..put("k", "") }).await);
    seen.note("etcdserver: value is provided", c.put(PutRequest { ignore_value: true, ..put("k", "v") }).await);
    seen.note(
        "etcdserver: lease is provided",
        c.put(PutRequest { ignore_lease: true, lease: 1, ..put("k", "") }).await,
    );
    seen.note("etcdserver: too many operations in txn request", c.txn(all(vec![get("k").op(); 129])).await);
    let twice = all([put("k", "").op(), put("k", "").op()]);
    seen.note("etcdserver: duplicate key given in txn request", c.txn(twice).await);
    let bad_sort = RangeRequest { sort_order: 9, ..get("k") };
    seen.note("etcdserver: invalid sort option", c.range(bad_sort).await);
    let sorted = RangeRequest { sort_order: 2, ..get("k") };
    seen.note("RangeStream does not support custom sort orders", ended(&c, sorted).await);
    let filtered = RangeRequest { min_mod_revision: 2, ..get("k") };
    seen.note("RangeStream does not support revision filters", ended(&c, filtered).await);
    // G-8
    let mut request = Request::new(get("k"));
    let not_text = AsciiMetadataValue::try_from(&b"\xff\xfe"[..]).expect("bytes may be opaque");
    request.metadata_mut().insert("client-api-version", not_text);
    seen.note("etcdserver: invalid client api version", c.kv.range(request).await);
}

/// How a RangeStream ends.
async fn ended(c: &Client, request: RangeRequest) -> Result<Option<RangeResponse>, Status> {
    let mut parts = c.kv.clone().range_stream(request).await?.into_inner();
    while parts.message().await?.is_some() {}
    Ok(None)
}

/// Refused because of what is there.
async fn state(server: &Server, seen: &mut Provoked) {
    let mut c = Client::connect(server).await;
    for value in ["1", "2", "3"] {
        c.set("k", value).await;
    }
    c.compact(3, false).await.expect("a compaction");
    let at = |revision| RangeRequest { revision, ..get("k") };
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    seen.note(compacted, c.range(at(2)).await);
    seen.note(compacted, ended(&c, at(2)).await);
    seen.note(compacted, c.compact(3, false).await);
    let future = "etcdserver: mvcc: required revision is a future revision";
    seen.note(future, c.range(at(99)).await);
    seen.note(future, c.compact(99, true).await);
    let no_lease = "etcdserver: requested lease not found";
    seen.note(no_lease, c.put(PutRequest { lease: 77, ..put("k", "") }).await);
    seen.note(no_lease, c.lease.lease_revoke(LeaseRevokeRequest { id: 77 }).await);
    let grant = |id, ttl| LeaseGrantRequest { id, ttl };
    c.lease.lease_grant(grant(5, 60)).await.expect("a lease");
    seen.note("etcdserver: lease already exists", c.lease.lease_grant(grant(5, 60)).await);
    seen.note("etcdserver: too large lease TTL", c.lease.lease_grant(grant(6, 9_000_000_001)).await);
    seen.note("etcdserver: request is too large", c.put(put("k", vec![0; 1_572_864])).await);
    let transfer = MoveLeaderRequest { target_id: 1 };
    seen.note("etcdserver: bad leader transferee", c.maintenance.move_leader(transfer).await);
    let mut auth = AuthClient::new(channel(server).await);
    let login = AuthenticateRequest { name: "root".into(), password: "x".into() };
    seen.note("etcdserver: authentication is not enabled", auth.authenticate(login).await);
    let mut health = HealthClient::new(channel(server).await);
    seen.note("unknown service", health.check(HealthCheckRequest { service: "nothing".into() }).await);
    // Downgrades, once the cluster's version is decided.
    let deadline = Instant::now() + PATIENCE;
    while c.maintenance.status(StatusRequest {}).await.expect("a status").into_inner().storage_version != "3.7.0" {
        assert!(Instant::now() < deadline, "the version is decided");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let downgrade = |action, version: &str| {
        let mut maintenance = c.maintenance.clone();
        let request = DowngradeRequest { action, version: version.to_owned() };
        async move { maintenance.downgrade(request).await }
    };
    seen.note("etcdserver: unknown method", downgrade(9, "3.6").await);
    seen.note("etcdserver: wrong downgrade target version format", downgrade(0, "nonsense").await);
    seen.note("etcdserver: invalid downgrade target version", downgrade(1, "3.4").await);
    downgrade(1, "3.6").await.expect("enabled");
    // The cluster's version may be lowered before the next look: one of the two is below it.
    let again = match downgrade(0, "3.6").await {
        Err(status) if status.message().contains("invalid downgrade target") => downgrade(0, "3.5").await,
        outcome => outcome,
    };
    seen.note("etcdserver: cluster has a downgrade job in progress", again);
    downgrade(2, "").await.expect("cancelled");
}

async fn channel(server: &Server) -> Channel {
    Endpoint::from_shared(server.endpoint()).expect("an address").connect().await.expect("a connection")
}

/// One HTTP/2 request as it is given, and the status of its answer.
async fn raw(server: &Server, path: &str, headers: &[(&str, &str)], body: &'static [u8]) -> Result<(), Status> {
    try_raw(server, path, headers, body).await.expect("an answer")
}

/// As `raw`; the outer error is a stream that was reset.
async fn try_raw(
    server: &Server,
    path: &str,
    headers: &[(&str, &str)],
    body: &'static [u8],
) -> Result<Result<(), Status>, hyper::Error> {
    let socket = tokio::net::TcpStream::connect(("127.0.0.1", server.client_port)).await.expect("a connection");
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
    let (mut sender, connection) = handshake.await.expect("HTTP/2");
    let running = tokio::spawn(connection);
    let mut request = http::Request::post(format!("{}{path}", server.endpoint())).header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from_static(body))).expect("a request");
    let response = tokio::time::timeout(PATIENCE, sender.send_request(request)).await.expect("in time");
    let (head, body) = response?.into_parts();
    let trailers = body.collect().await?.trailers().cloned().unwrap_or_default();
    running.abort();
    let status = Status::from_header_map(&head.headers).or_else(|| Status::from_header_map(&trailers));
    let status = status.expect("a gRPC status");
    Ok(if status.code() == tonic::Code::Ok { Ok(()) } else { Err(status) })
}

/// Refused by the gRPC layer itself.
async fn transport(server: &Server, seen: &mut Provoked) {
    const GRPC: (&str, &str) = ("content-type", "application/grpc");
    const PUT: &str = "/etcdserverpb.KV/Put";
    seen.note("unknown service <S>", raw(server, "/nothing.At/All", &[GRPC], b"\0\0\0\0\0").await);
    let method = "unknown method <M> for service <S>";
    seen.note(method, raw(server, "/etcdserverpb.KV/Nothing", &[GRPC], b"\0\0\0\0\0").await);
    seen.note("malformed method name: \"<path>\"", raw(server, "/nothing", &[GRPC], b"\0\0\0\0\0").await);
    // A field of two bytes of which none come.
    let cut = b"\0\0\0\0\x02\x0a\x02";
    seen.note("grpc: error unmarshalling request: <err>", raw(server, PUT, &[GRPC], cut).await);
    let stream = "grpc: failed to unmarshal the received message: <err>";
    seen.note(stream, raw(server, "/etcdserverpb.Watch/Watch", &[GRPC], cut).await);
    seen.note(stream, raw(server, "/etcdserverpb.Lease/LeaseKeepAlive", &[GRPC], b"\0\0\0\0\x02\x0a\x09").await);
    let content_type = "invalid gRPC request content-type \"<ct>\"";
    seen.note(content_type, raw(server, PUT, &[("content-type", "text/plain")], b"").await);
    for timeout in ["", "S", "1x", "-1S", "123456789S"] {
        let bad = raw(server, PUT, &[GRPC, ("grpc-timeout", timeout)], b"\0\0\0\0\0").await;
        seen.note("malformed grpc-timeout: <err>", bad);
    }
    let mut c = Client::connect(server).await;
    let too_large = c.put(put("k", vec![0; 2_200_000])).await;
    seen.note("grpc: received message larger than max (<n> vs. <limit>)", too_large);
}

/// Watchers that are refused or end, on a stream that goes on.
async fn watch_reasons(server: &Server, seen: &mut Provoked) {
    let c = Client::connect(server).await;
    let mut watching = Watching::open(&c);
    let on = |watch_id| WatchCreateRequest { key: "k".into(), watch_id, ..Default::default() };
    let reason = "(watch cancel_reason)";
    // W-7
    watching.create(WatchCreateRequest { start_revision: -1, ..on(0) });
    let refused = watching.next().await;
    assert_eq!((refused.created, refused.canceled, refused.watch_id), (true, true, -1));
    let compacted = "etcdserver: mvcc: required revision has been compacted";
    seen.note_text(compacted, reason, &refused.cancel_reason);
    // W-6
    watching.create(WatchCreateRequest { range_end: "a".into(), ..on(0) });
    let refused = watching.next().await;
    assert_eq!((refused.created, refused.canceled, refused.watch_id), (true, true, -1));
    seen.note_text("mvcc: watcher range is empty", reason, &refused.cancel_reason);
    // W-3
    watching.create(on(7));
    assert_eq!(watching.next().await.watch_id, 7);
    watching.create(on(7));
    let refused = watching.next().await;
    assert_eq!((refused.created, refused.canceled, refused.watch_id), (true, true, -1));
    let duplicate = "mvcc: duplicate watch ID provided on the WatchStream";
    seen.note_text(duplicate, reason, &refused.cancel_reason);
    // W-36, W-37
    let empty = |text: &str| if text.is_empty() { "(empty)".to_owned() } else { text.to_owned() };
    watching.cancel(4711);
    watching.cancel(7);
    let cancelled = watching.next().await;
    assert_eq!((cancelled.created, cancelled.canceled, cancelled.watch_id), (false, true, 7));
    assert_eq!(cancelled.compact_revision, 0);
    seen.note_text("(empty)", reason, &empty(&cancelled.cancel_reason));
    // W-17
    watching.create(WatchCreateRequest { start_revision: 1, ..on(8) });
    assert!(watching.next().await.created);
    let ended = watching.next().await;
    assert_eq!((ended.canceled, ended.watch_id, ended.compact_revision), (true, 8, 3));
    assert_eq!(ended.header.expect("a header").revision, 0);
    seen.note_text("(empty)", reason, &empty(&ended.cancel_reason));
}

/// Refused while an alarm is on.
async fn alarms(server: &Server, seen: &mut Provoked) {
    let mut c = Client::connect(server).await;
    let alarm = |action, alarm| AlarmRequest { action, member_id: 7, alarm };
    for (kind, text) in [(1, "etcdserver: mvcc: database space exceeded"), (2, "etcdserver: corrupt cluster")] {
        c.maintenance.alarm(alarm(1, kind)).await.expect("raised");
        seen.note(text, c.put(put("k", "v")).await);
        seen.note(text, c.lease.lease_grant(LeaseGrantRequest { id: 0, ttl: 60 }).await);
        c.maintenance.alarm(alarm(2, kind)).await.expect("lifted");
    }
}

fn add(url: &str, is_learner: bool) -> MemberAddRequest {
    MemberAddRequest { peer_ur_ls: vec![url.to_owned()], is_learner }
}

/// Refused changes of the membership; and what a learner refuses.
async fn membership(seen: &mut Provoked) {
    let server = start(&[]);
    let mut c = Client::connect(&server).await;
    let own = c.maintenance.status(StatusRequest {}).await.expect("a status").into_inner().leader;
    let own_url = format!("http://127.0.0.1:{}", server.peer_port);
    seen.note("etcdserver: Peer URLs already exists", c.cluster.member_add(add(&own_url, true)).await);
    for url in ["nonsense", "http://localhost", "ftp://a:1", "http://a:1/path"] {
        seen.note("etcdserver: given member URLs are invalid", c.cluster.member_add(add(url, false)).await);
    }
    let no_urls = MemberAddRequest::default();
    seen.note("etcdserver: given member URLs are invalid", c.cluster.member_add(no_urls).await);
    let no_member = "etcdserver: member not found";
    seen.note(no_member, c.cluster.member_remove(MemberRemoveRequest { id: 77 }).await);
    seen.note(no_member, c.cluster.member_promote(MemberPromoteRequest { id: 77 }).await);
    let promote_voter = c.cluster.member_promote(MemberPromoteRequest { id: own }).await;
    seen.note("etcdserver: can only promote a learner member", promote_voter);
    let last = c.cluster.member_remove(MemberRemoveRequest { id: own }).await;
    seen.note("etcdserver: re-configuration failed due to not enough started members", last);

    let program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    let mut learner = Server::stopped_in(&std::env::temp_dir(), Path::new(&program), &[]);
    let url = format!("http://127.0.0.1:{}", learner.peer_port);
    let added = c.cluster.member_add(add(&url, true)).await.expect("a learner").into_inner();
    let id = added.member.expect("the member").id;
    let not_ready = "etcdserver: can only promote a learner member which is in sync with leader";
    seen.note(not_ready, c.cluster.member_promote(MemberPromoteRequest { id }).await);
    let second = c.cluster.member_add(add("http://127.0.0.1:2", true)).await;
    seen.note("etcdserver: too many learner members in cluster", second);

    learner.join("m1", &format!("m0={own_url},m1={url}"));
    let mut at_learner = Client::connect(&learner).await;
    let unsupported = "etcdserver: rpc not supported for learner";
    seen.note(unsupported, at_learner.range(get("k")).await);
    seen.note(unsupported, at_learner.put(put("k", "v")).await);
    seen.note(unsupported, ended(&at_learner, RangeRequest { serializable: true, ..get("k") }).await);
    at_learner.range(RangeRequest { serializable: true, ..get("k") }).await.expect("the one read a learner serves");
}

/// A member whose cluster has lost its quorum.
async fn without_leader(seen: &mut Provoked) {
    let server = start(&[]);
    let mut c = Client::connect(&server).await;
    let lease = c.grant(600).await;
    let led = Watching::on(&c, WatchCreateRequest { key: "k".into(), ..Default::default() }).await;
    let (requests, outgoing) = tokio::sync::mpsc::unbounded_channel();
    let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
    requests.send(WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }).expect("just made");
    let mut request = Request::new(UnboundedReceiverStream::new(outgoing));
    request.metadata_mut().insert("hasleader", "true".parse().expect("a value"));
    let mut wants_leader = c.watch.watch(request).await.expect("a stream").into_inner();
    assert!(wants_leader.message().await.expect("no error").expect("an answer").created);

    c.cluster.member_add(add("http://127.0.0.1:1", false)).await.expect("a second voter, which never starts");
    // W-48
    let end = tokio::time::timeout(PATIENCE, wants_leader.message()).await.expect("the stream ends");
    seen.note("etcdserver: no leader", end);
    let status = c.maintenance.status(StatusRequest {}).await.expect("a status").into_inner();
    assert_eq!((status.leader, status.errors), (0, vec!["etcdserver: no leader".to_owned()]), "M-3");
    let mut request = Request::new(RangeRequest { serializable: true, ..get("k") });
    request.metadata_mut().insert("hasleader", "true".parse().expect("a value"));
    seen.note("etcdserver: no leader", c.kv.range(request).await);
    c.range(RangeRequest { serializable: true, ..get("k") }).await.expect("without that metadata it is served");
    // G-9
    for value in ["false", "TRUE", "1", ""] {
        let mut request = Request::new(RangeRequest { serializable: true, ..get("k") });
        request.metadata_mut().insert("hasleader", value.parse().expect("a value"));
        c.kv.range(request).await.expect("only `true` counts");
    }
    // G-4: the caller's own deadline comes before the server's.
    let asked = Instant::now();
    let headers = [("content-type", "application/grpc"), ("grpc-timeout", "300m")];
    match try_raw(&server, "/etcdserverpb.KV/Put", &headers, b"\0\0\0\0\x03\x0a\x01k").await {
        Ok(outcome) => seen.note("context deadline exceeded", outcome),
        // etcd's gRPC library sometimes ends the stream before the handler has answered.
        Err(reset) => assert!(std::env::var_os("ACTD_UNDER_TEST").is_some(), "{reset}"),
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    let transfer = MoveLeaderRequest { target_id: 5 };
    seen.note("etcdserver: not leader", c.maintenance.move_leader(transfer).await);
    seen.note("etcdserver: unhealthy cluster", c.cluster.member_add(add("http://127.0.0.1:2", true)).await);
    // Each of these waits for the request timeout.
    let (mut reads, mut writes, mut renews) = (c.clone(), c.clone(), c.lease.clone());
    let renewal = async {
        let requests = tokio_stream::iter([LeaseKeepAliveRequest { id: lease }]);
        renews.lease_keep_alive(requests).await?.into_inner().message().await
    };
    let (read, write, renewed) = tokio::join!(reads.range(get("k")), writes.put(put("k", "v")), renewal);
    seen.note("etcdserver: request timed out", read);
    seen.note("context deadline exceeded", write);
    seen.note("etcdserver: no leader", renewed);
    // W-49: who did not ask for a leader is still there.
    let mut led = led;
    let quiet = tokio::time::timeout(Duration::from_millis(100), led.message()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}
