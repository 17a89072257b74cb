//! How members begin: with others, in a running cluster, alone again; and what they ask each other. The running members
//! are real etcd ones.

mod common;

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    AuthEnableRequest, AuthRoleAddRequest, AuthUserAddRequest, AuthUserGrantRoleRequest, LeaseGrantRequest,
    MemberAddRequest, MemberListRequest, PutRequest, RangeRequest, StatusRequest, auth_client::AuthClient,
};
use actd::{
    cluster::bootstrap::InitialCluster,
    peer::client::{self, Error},
    wal::{self, Wal},
};
use common::{Client, Server};
use tonic::transport::{Channel, Endpoint};

const PATIENCE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(5);

fn program() -> PathBuf {
    common::server_under_test(env!("CARGO_BIN_EXE_actd"))
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

async fn channel(port: u16) -> Channel {
    Endpoint::from_shared(url(port)).expect("an address").connect().await.expect("a connection")
}

/// A member that need not become ready; killed when dropped.
struct Starting {
    child: Child,
    log: PathBuf,
    client_port: u16,
}

impl Starting {
    fn new(data: &Path, name: &str, peer_port: u16, flags: &[&str]) -> Self {
        let [port] = common::free_ports();
        let log = data.with_extension("log");
        let file = File::create(&log).expect("a log file");
        let child = Command::new(program())
            .arg(format!("--name={name}"))
            .arg(format!("--data-dir={}", data.display()))
            .args([format!("--listen-client-urls={}", url(port)), format!("--advertise-client-urls={}", url(port))])
            .arg(format!("--listen-peer-urls={}", url(peer_port)))
            .arg(format!("--initial-advertise-peer-urls={}", url(peer_port)))
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .expect("it starts");
        Self { child, log, client_port: port }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for a start that fails, with these words.
    fn refused(mut self, words: &[&str]) {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                break status;
            }
            assert!(Instant::now() < deadline, "still running:\n{}", self.log());
            common::pause();
        };
        let log = self.log().replace("\\\"", "\"");
        assert_eq!(status.code(), Some(1), "{log}");
        for word in words {
            assert!(log.contains(word), "{word:?} is not in:\n{log}");
        }
    }

    fn wait_until_healthy(&mut self) {
        let port = self.client_port;
        let healthy = || common::http_get(port, "/health").is_some_and(|body| body.contains(r#""health":"true""#));
        self.wait_for("health", healthy);
    }

    async fn client(&self) -> Client {
        Client::over(channel(self.client_port).await)
    }

    fn wait_for(&mut self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(self.child.try_wait().expect("our own child").is_none(), "it ended:\n{}", self.log());
            assert!(Instant::now() < deadline, "no {what}:\n{}", self.log());
            common::pause();
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The log of a member that does not run.
fn read_log(data: &Path) -> wal::Recovered {
    Wal::open(wal::Options::new(data.join("member/wal"))).expect("the log opens").1
}

#[test]
fn every_founding_member_writes_the_same_first_entries() {
    // C-1, C-2, limits.md 17
    let folder = tempfile::tempdir().expect("a folder");
    let ports: [u16; 3] = common::free_ports();
    let list = format!("a={},b={},c={}", url(ports[0]), url(ports[1]), url(ports[2]));
    let founding = InitialCluster::parse(&list, |url| Ok(url.to_owned())).expect("a list").found("t");
    for (name, port) in ["a", "b"].into_iter().zip(ports) {
        let data = folder.path().join(name);
        let flags = [format!("--initial-cluster={list}"), "--initial-cluster-token=t".to_owned()];
        let mut member = Starting::new(&data, name, port, &flags.each_ref().map(String::as_str));
        member.wait_for("store", || data.join("member/store/CURRENT").exists());
        drop(member);
        let log = read_log(&data);
        assert_eq!(log.entries[..3], founding.entries());
        assert_eq!(log.metadata.cluster_id, Some(founding.cluster_id));
        assert_eq!(log.metadata.node_id, founding.member_id(name));
    }
}

#[test]
fn force_new_cluster_leaves_one_member_with_its_id() {
    // limits.md 17
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("a");
    let ports: [u16; 3] = common::free_ports();
    let list = format!("a={},b={},c={}", url(ports[0]), url(ports[1]), url(ports[2]));
    let mut member = Starting::new(&data, "a", ports[0], &[&format!("--initial-cluster={list}")]);
    member.wait_for("store", || data.join("member/store/CURRENT").exists());
    drop(member);
    let founding = InitialCluster::parse(&list, |url| Ok(url.to_owned())).expect("a list").found("etcd-cluster");
    let id = founding.member_id("a").expect("listed");

    let data_dir = format!("--data-dir={}", data.display());
    let list_members = async |server: &Server| {
        let mut client = Client::connect(server).await;
        let response = client.cluster.member_list(MemberListRequest { linearizable: true }).await.expect("a list");
        let response = response.into_inner();
        assert_eq!(response.header.expect("a header").cluster_id, founding.cluster_id);
        response.members.iter().map(|member| member.id).collect::<Vec<_>>()
    };
    let forced = Server::start(&program(), &[&data_dir, "--force-new-cluster"]);
    runtime().block_on(async {
        assert_eq!(list_members(&forced).await, [id]);
        let put = PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
        Client::connect(&forced).await.kv.put(put).await.expect("a put");
    });
    drop(forced);
    let again = Server::start(&program(), &[&data_dir]);
    runtime().block_on(async {
        assert_eq!(list_members(&again).await, [id]);
        let range = RangeRequest { key: "k".into(), ..Default::default() };
        assert_eq!(Client::connect(&again).await.kv.range(range).await.expect("a range").into_inner().count, 1);
    });
}

#[test]
fn a_joining_member_takes_its_ids_from_the_running_cluster() {
    // limits.md 17, files.md 9.1
    let Some(etcd) = common::require_tool("etcd") else { return };
    let running = Server::start(&etcd, &[]);
    let folder = tempfile::tempdir().expect("a folder");
    let [port, unused] = common::free_ports();
    let mine = format!("m1={}", url(port));
    let both = format!("--initial-cluster=m0={},{mine}", url(running.peer_port));
    let existing = "--initial-cluster-state=existing";
    let start = |name: &str, flags: &[&str]| Starting::new(&folder.path().join(name), "m1", port, flags);

    start("a", &[&both, existing]).refused(&["error validating peerURLs {ClusterID:", "]}: member count is unequal"]);
    start("b", &[&format!("--initial-cluster={mine}"), existing]).refused(&[
        "cannot fetch cluster info from peer urls: could not retrieve cluster information from the given URLs",
    ]);
    let elsewhere = format!("--initial-cluster=m0={},{mine}", url(unused));
    start("c", &[&elsewhere, existing]).refused(&["could not retrieve cluster information from the given URLs"]);
    start("d", &["--initial-cluster=m2=http://127.0.0.1:1", existing])
        .refused(&[r#"couldn't find local name "m1" in the initial cluster configuration"#]);

    let (id, cluster) = runtime().block_on(async {
        let add = MemberAddRequest { peer_ur_ls: vec![url(port)], is_learner: true };
        let added =
            Client::connect(&running).await.cluster.member_add(add).await.expect("an added member").into_inner();
        (added.member.expect("the member").id, added.header.expect("a header").cluster_id)
    });
    start("e", &[&format!("--initial-cluster=m0={},m1={}", url(running.peer_port), url(unused)), existing]).refused(&[
        &format!("PeerURLs: no match found for existing member ({id:x}, [{}])", url(port)),
        &format!("last resolver error (resolved urls: \"{}\" != \"", url(port)),
    ]);
    start("f", &[&both, existing, "--max-learners=0"]).refused(&["membership: too many learner members in cluster"]);

    let data = folder.path().join("g");
    let mut member = Starting::new(&data, "m1", port, &[&both, existing]);
    member.wait_for("store", || data.join("member/store/CURRENT").exists());
    drop(member);
    let log = read_log(&data);
    assert_eq!((log.metadata.node_id, log.metadata.cluster_id), (Some(id), Some(cluster)));
    assert!(log.entries.is_empty());
}

#[test]
fn a_member_that_has_been_there_before_does_not_begin_again() {
    // limits.md 17: the others list it with client URLs
    let Some(etcd) = common::require_tool("etcd") else { return };
    let [port, other] = common::free_ports();
    let list = format!("m0={},m1={}", url(port), url(other));
    // A member that lists m0 as one that has started, as the others of a lost member do.
    let running = Server::start(&etcd, &[]);
    let own = runtime().block_on(client::members(&url(running.peer_port), SHORT)).expect("an answer").1;
    assert_eq!(own.len(), 1);
    drop(running);
    let id =
        InitialCluster::parse(&list, |url| Ok(url.to_owned())).expect("a list").found("etcd-cluster").member_id("m0");
    let body = format!(
        r#"[{{"id":{},"peerURLs":["{}"],"name":"m0","clientURLs":["http://c:1"]}}]"#,
        id.expect("listed"),
        url(port)
    );
    let listener = std::net::TcpListener::bind(("127.0.0.1", other)).expect("the port is free");
    let answering = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut socket, _) = listener.accept().expect("a question");
        let mut question = [0; 1024];
        let read = socket.read(&mut question).expect("readable");
        assert!(question[..read].starts_with(b"GET /members HTTP/1.1\r\n"));
        let head = format!("HTTP/1.1 200 OK\r\nX-Etcd-Cluster-Id: 1\r\nContent-Length: {}\r\n\r\n", body.len());
        socket.write_all((head + &body).as_bytes()).expect("writable");
    });
    let folder = tempfile::tempdir().expect("a folder");
    Starting::new(&folder.path().join("a"), "m0", port, &[&format!("--initial-cluster={list}")])
        .refused(&[&format!("member {:x} has already been bootstrapped", id.expect("listed"))]);
    answering.join().expect("it was asked");
}

#[test]
fn members_of_other_makes_answer_what_is_asked() {
    // http.md 4.3, files.md 7.6
    let Some(etcd) = common::require_tool("etcd") else { return };
    let server = Server::start(&etcd, &[]);
    let peer = url(server.peer_port);
    let version = server.version();
    let is_34 = version.starts_with("3.4.");
    runtime().block_on(async {
        let mut of = Client::connect(&server).await;
        let lease = of.lease.lease_grant(LeaseGrantRequest { ttl: 1000, id: 7 }).await.expect("a lease").into_inner();
        let put = PutRequest { key: "k".into(), value: "v".into(), lease: 7, ..Default::default() };
        of.kv.put(put).await.expect("a put");
        let cluster = lease.header.expect("a header").cluster_id;

        let (id, members) = client::members(&peer, SHORT).await.expect("members");
        assert_eq!(id, cluster);
        assert_eq!(
            (members.len(), members[0].name.as_str(), &members[0].peer_urls[..]),
            (1, "m0", &[peer.clone()][..])
        );

        let versions = client::versions(&peer, SHORT).await.expect("versions");
        assert_eq!(versions.server, version);
        assert!(version.starts_with(versions.cluster.trim_end_matches(".0")), "{versions:?}");

        assert_eq!(client::renew_lease(&peer, 7, SHORT).await.expect("renewed"), 1000);
        let left = client::lease_time_to_live(&peer, 7, true, SHORT).await.expect("its time");
        assert_eq!((left.granted_ttl, &left.keys[..]), (1000, &["k".into()][..]));
        assert!((990..=1000).contains(&left.ttl));
        let gone = client::renew_lease(&peer, 8, SHORT).await.unwrap_err();
        assert!(matches!(&gone, Error::Refused { status: 404, text, .. } if text == "lease not found"), "{gone}");
        let gone = client::lease_time_to_live(&peer, 8, false, SHORT).await.unwrap_err();
        assert!(matches!(&gone, Error::Refused { status: 404, text, .. } if text == "lease not found"), "{gone}");

        let hash = client::hash_kv(&peer, cluster, 0, SHORT).await.expect("a hash");
        assert_eq!((hash.revision, hash.compact_revision), (2, -1));
        assert_ne!(hash.hash, 0);
        match client::downgrade_enabled(&peer, SHORT).await {
            Ok(enabled) => assert!(!enabled && !is_34),
            Err(e) => assert!(is_34 && matches!(e, Error::Refused { status: 404, .. }), "{e}"),
        }
        if is_34 {
            return; // What follows it answers only when the caller's time is over.
        }
        let future = client::hash_kv(&peer, cluster, 9, SHORT).await.unwrap_err();
        assert!(matches!(&future, Error::Refused { status: 400, .. }), "{future}");
        let unknown = client::promote(&peer, 5, None, SHORT).await.unwrap_err();
        assert!(matches!(&unknown, Error::Refused { status: 404, .. }), "{unknown}");
        let voter = client::promote(&peer, members[0].id, None, SHORT).await.unwrap_err();
        assert!(matches!(&voter, Error::Refused { status: 412, .. }), "{voter}");
    });
}

#[test]
fn promotions_are_forwarded_with_the_caller_s_token() {
    // C-22
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let leader = url(listener.local_addr().expect("an address").port());
    let answering = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let mut heads = Vec::new();
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().expect("a question");
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                socket.read_exact(&mut byte).expect("readable");
                head.extend(byte);
            }
            socket.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[]\n").expect("writable");
            heads.push(String::from_utf8(head).expect("text").to_lowercase());
        }
        heads
    });
    runtime().block_on(async {
        client::promote(&leader, 5, Some("abc.1"), SHORT).await.expect("an answer");
        client::promote(&leader, 6, None, SHORT).await.expect("an answer");
    });
    let heads = answering.join().expect("both were asked");
    assert!(heads[0].starts_with("post /members/promote/5 http/1.1\r\n"), "{}", heads[0]);
    assert!(heads[0].contains("\r\nauthorization: abc.1\r\n"), "{}", heads[0]);
    assert!(!heads[1].contains("authorization"), "{}", heads[1]);
}

#[test]
fn a_port_that_is_taken_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("a");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("an address").port();
    let [peer_port] = common::free_ports();
    // What it would found goes with it: the next start is given another list.
    let initial = |port| format!("--initial-cluster=a={}", url(port));
    Starting::new(&data, "a", taken, &[&initial(taken)]).refused(&["cannot listen on", "Address already in use"]);
    assert!(!data.exists());
    let client = format!("--listen-client-urls={}", url(taken));
    Starting::new(&data, "a", peer_port, &[&initial(peer_port), &client]).refused(&["cannot listen on"]);
    assert!(!data.exists());
    // The member's own two ports are one.
    let client = format!("--listen-client-urls={}", url(peer_port));
    let taken = ["cannot listen on", "Address already in use"];
    Starting::new(&data, "a", peer_port, &[&initial(peer_port), &client]).refused(&taken);
    assert!(!data.exists());
    let mut member = Starting::new(&data, "a", peer_port, &[&initial(peer_port)]);
    member.wait_until_healthy();
    assert!(data.exists());
}

/// Status of the answer to a post on the peer port.
fn post(port: u16, path: &str, headers: &str, body: &[u8]) -> u16 {
    let length = body.len();
    let head =
        format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
    ask(port, &[head.as_bytes(), body].concat(), PATIENCE).expect("an answer").0
}

/// Status and text of the answer to a request that closes its connection; `None` if there is none in time.
fn ask(port: u16, request: &[u8], patience: Duration) -> Option<(u16, String)> {
    use std::io::{Read, Write};
    let mut socket = std::net::TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    socket.set_read_timeout(Some(patience)).expect("a socket");
    socket.write_all(request).expect("writable");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    Some((status, answer))
}

#[test]
fn a_member_that_waits_for_others_shows_its_metrics() {
    let folder = tempfile::tempdir().expect("a folder");
    let [peer_port, other, metrics] = common::free_ports();
    let initial = format!("--initial-cluster=a={},b={}", url(peer_port), url(other));
    let at = format!("--listen-metrics-urls={}", url(metrics));
    let mut member = Starting::new(&folder.path().join("a"), "a", peer_port, &[&initial, &at]);
    member.wait_for("metrics", || common::http_get(metrics, "/metrics").is_some());
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").into_bytes();
    let (status, health) = ask(metrics, &get("/health"), PATIENCE).expect("an answer");
    assert!(status == 503 && health.contains("RAFT NO LEADER"), "{health}");
    assert_eq!(ask(metrics, &get("/livez"), PATIENCE).expect("an answer").0, 200);
    // The port is this member's, and clients wait.
    assert_eq!(ask(member.client_port, &get("/health"), Duration::from_millis(200)), None);
}

#[test]
fn who_is_refused_many_times_a_second_fills_no_log() {
    use actd::pb::raftpb;
    use prost::Message as _;
    let folder = tempfile::tempdir().expect("a folder");
    let [peer_port] = common::free_ports();
    let flag = format!("--initial-cluster=a={}", url(peer_port));
    let mut member = Starting::new(&folder.path().join("a"), "a", peer_port, &[&flag]);
    member.wait_until_healthy();
    let header = runtime().block_on(async {
        let status = member.client().await.maintenance.status(StatusRequest {}).await.expect("a status").into_inner();
        status.header.expect("a header")
    });
    // Behind an entry that nobody has: raft takes none of them.
    let message = raftpb::Message {
        r#type: Some(raftpb::MessageType::MsgApp.into()),
        to: Some(header.member_id),
        from: Some(5),
        term: Some(9),
        index: Some(500),
        ..Default::default()
    };
    let versions = "X-Server-Version: 3.7.1\r\nX-Min-Cluster-Version: 3.0.0\r\nX-Server-From: 5\r\n";
    let own = format!("{versions}X-Etcd-Cluster-ID: {:x}\r\n", header.cluster_id);
    for _ in 0..20 {
        assert_eq!(post(peer_port, "/raft", versions, b""), 412);
        assert_eq!(post(peer_port, "/raft", "", b""), 412);
        assert_eq!(post(peer_port, "/raft", &own, &message.encode_to_vec()), 204);
    }
    for text in ["of another cluster", "of an incompatible version", "message is not taken"] {
        member.wait_for(text, || member_log_has(folder.path(), text) > 0);
        assert_eq!(member_log_has(folder.path(), text), 1, "{text}");
    }
    member.wait_until_healthy();
}

fn member_log_has(folder: &Path, text: &str) -> usize {
    std::fs::read_to_string(folder.join("a.log")).unwrap_or_default().matches(text).count()
}

#[test]
fn questions_that_nobody_answers_end_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = url(listener.local_addr().expect("an address").port());
    let ask =
        |url: &str| runtime().block_on(client::versions(url, Duration::from_millis(200))).unwrap_err().to_string();
    assert_eq!(ask(&silent), format!("{silent}: no answer within 200ms"));
    let [closed] = common::free_ports();
    assert!(ask(&url(closed)).contains("refused"));
    assert_eq!(ask("https://127.0.0.1:1"), "https://127.0.0.1:1: not implemented: TLS between members");
}

// --- the discovery service

const SIZE_KEY: &str = "/_etcd/registry/tkn/_config/size";

/// What a member is told to find the others at these endpoints.
fn through(endpoints: &str) -> [String; 2] {
    [format!("--discovery-endpoints={endpoints}"), "--discovery-token=tkn".to_owned()]
}

async fn put(client: &Client, key: &str, value: &str) {
    let put = PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() };
    client.kv.clone().put(put).await.expect("a put");
}

/// Three members begin by what `service` tells them, a fourth is refused, and who has data does not ask again.
fn three_members_begin_through(service: Server) {
    let folder = tempfile::tempdir().expect("a folder");
    let ports: [u16; 4] = common::free_ports();
    let [nobody] = common::free_ports();
    runtime().block_on(async { put(&Client::connect(&service).await, SIZE_KEY, "3").await });
    // Written in each way there is, one that does not answer among them.
    let address = format!("127.0.0.1:{}", service.client_port);
    let flags = through(&format!("127.0.0.1:{nobody},http://{address},{address}"));
    let start = |name: &str, port: u16| {
        Starting::new(&folder.path().join(name), name, port, &flags.each_ref().map(String::as_str))
    };
    let mut members: Vec<Starting> =
        ["a", "b", "c"].into_iter().zip(ports).map(|(name, port)| start(name, port)).collect();
    for member in &mut members {
        member.wait_until_healthy();
    }
    start("d", ports[3]).refused(&["failed to join discovery cluster (discovery: cluster is full)"]);
    drop(service);

    let list = format!("a={},b={},c={}", url(ports[0]), url(ports[1]), url(ports[2]));
    let founding = InitialCluster::parse(&list, |url| Ok(url.to_owned())).expect("a list").found("tkn");
    let check = async |client: Client| {
        let list = MemberListRequest { linearizable: true };
        let list = client.cluster.clone().member_list(list).await.expect("a list").into_inner();
        assert_eq!(list.header.expect("a header").cluster_id, founding.cluster_id);
        let found: Vec<_> = list.members.iter().map(|member| (member.id, member.name.as_str())).collect();
        let expected: Vec<_> = founding.members.iter().map(|member| (member.id, member.name.as_str())).collect();
        assert_eq!(found, expected);
    };
    runtime().block_on(async {
        put(&members[0].client().await, "k", "v").await;
        let range = RangeRequest { key: "k".into(), ..Default::default() };
        let answer = members[2].client().await.kv.range(range).await.expect("a range").into_inner();
        assert_eq!(answer.count, 1);
        check(members[1].client().await).await;
    });
    drop(members.remove(0));
    let mut again = start("a", ports[0]);
    again.wait_until_healthy();
    runtime().block_on(async { check(again.client().await).await });
}

#[test]
fn members_find_each_other_through_another_cluster() {
    // limits.md 17
    three_members_begin_through(Server::start(&program(), &[]));
}

#[test]
fn members_find_each_other_through_a_cluster_of_etcd() {
    let Some(etcd) = common::require_tool("etcd") else { return };
    three_members_begin_through(Server::start(&etcd, &[]));
}

#[test]
fn what_the_service_cannot_tell_ends_the_start() {
    // limits.md 17, flags.md (Validation)
    let service = Server::start(&program(), &[]);
    let folder = tempfile::tempdir().expect("a folder");
    let [port] = common::free_ports();
    let flags = through(&service.endpoint());
    let run = |data: &str, more: &[&str]| {
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Starting::new(&folder.path().join(data), "m", port, &flags)
    };
    let said = |reason: &str| format!("failed to join discovery cluster ({reason})");
    let write = |key: &str, value: &str| {
        runtime().block_on(async { put(&Client::connect(&service).await, key, value).await });
    };
    let registered = |id: &str, value: &str| write(&format!("/_etcd/registry/tkn/members/{id}"), value);

    run("a", &[]).refused(&[&said("discovery: size key not found")]);
    write(SIZE_KEY, "three");
    run("b", &[]).refused(&[&said("discovery: size key is bad")]);
    run("c", &["--initial-cluster-state=existing"])
        .refused(&["discovery URL should not be set when joining existing initial cluster"]);
    run("d", &["--discovery-cert=c", "--discovery-endpoints=127.0.0.1:1"])
        .refused(&["--discovery-endpoints 127.0.0.1:1: TLS is not implemented yet"]);

    write(SIZE_KEY, "2");
    registered("1", "x=ftp://127.0.0.1:1");
    run("e", &[]).refused(&[&said("discovery: invalid peer URL")]);
    // The own registration stays where it is, so each start takes the same place.
    registered("1", &format!("x={}", url(port)));
    run("f", &[]).refused(&[&format!("discovery cluster m={0},x={0} has duplicate url", url(port))]);
    registered("1", "m=http://127.0.0.1:1");
    run("g", &[]).refused(&["has no member of its own for this one"]);
    // Further ones are no member's.
    registered("1", "x=http://127.0.0.1:1");
    registered("2", "y=http://127.0.0.1:2");
    let mut member = run("h", &[]);
    member.wait_for("store", || folder.path().join("h/member/store/CURRENT").exists());
    drop(member);
    assert_eq!(read_log(&folder.path().join("h")).entries.len(), 2);
}

#[test]
fn a_member_waits_for_the_service_and_for_the_others() {
    let mut service = Server::start(&program(), &[]);
    let folder = tempfile::tempdir().expect("a folder");
    let [port] = common::free_ports();
    runtime().block_on(async { put(&Client::connect(&service).await, SIZE_KEY, "2").await });
    service.kill();
    let data = folder.path().join("a");
    let flags = through(&service.endpoint());
    let mut member = Starting::new(&data, "a", port, &[&flags[0], &flags[1], "--discovery-request-timeout=200ms"]);
    let log = member.log.clone();
    let logged =
        |words: &str, times: usize| std::fs::read_to_string(&log).unwrap_or_default().matches(words).count() >= times;
    member.wait_for("try", || logged("no answer of the discovery service", 1));
    service.restart();
    member.wait_for("registration", || logged("waiting for members to register", 1));
    service.kill();
    member.wait_for("end of the watch", || logged("no answer of the discovery service", 2));
    service.restart();
    member.wait_for("watch", || logged("waiting for members to register", 2));
    runtime().block_on(async {
        put(&Client::connect(&service).await, "/_etcd/registry/tkn/members/1", "b=http://127.0.0.1:1").await;
    });
    member.wait_for("store", || data.join("member/store/CURRENT").exists());
}

#[test]
fn a_service_with_users_is_told_who_asks() {
    let Some(etcd) = common::require_tool("etcd") else { return };
    let service = Server::start(&etcd, &[]);
    runtime().block_on(async {
        put(&Client::connect(&service).await, SIZE_KEY, "1").await;
        let mut auth = AuthClient::new(channel(service.client_port).await);
        let user = AuthUserAddRequest { name: "root".into(), password: "secret".into(), ..Default::default() };
        auth.user_add(user).await.expect("a user");
        auth.role_add(AuthRoleAddRequest { name: "root".into() }).await.expect("a role");
        let grant = AuthUserGrantRoleRequest { user: "root".into(), role: "root".into() };
        auth.user_grant_role(grant).await.expect("a grant");
        auth.auth_enable(AuthEnableRequest {}).await.expect("users count");
    });
    let folder = tempfile::tempdir().expect("a folder");
    let [port] = common::free_ports();
    let flags = through(&service.endpoint());
    let run = |data: &str, user: &[&str]| {
        let flags: Vec<&str> = flags.iter().map(String::as_str).chain(user.iter().copied()).collect();
        Starting::new(&folder.path().join(data), "m", port, &flags)
    };
    run("a", &["--discovery-user=root:wrong"]).refused(&[
        "failed to join discovery cluster (etcdserver: authentication failed, invalid user ID or password)",
    ]);
    run("b", &["--discovery-user=root", "--discovery-password=secret"]).wait_until_healthy();
}
