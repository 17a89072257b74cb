//! The Lease service over a socket and in real time, statement by statement (L-1 to L-33, as one member shows them).

mod common;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    AlarmRequest, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, PutRequest,
    WatchCreateRequest,
};
use common::{
    Client, Server,
    calls::{PATIENCE, Watching, block_on, delete, etcd, everything, keys, put, refusal, text},
};
use tokio::sync::mpsc::UnboundedSender;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};

/// The shortest time a lease may have, with default timings (L-4).
const SHORTEST: i64 = 2;
/// Of a lease that a test keeps alive: a busy machine must manage that.
const RENEWED: i64 = 4;
/// How late an expiry may be on a busy machine (L-17 says 1 to 2 s on a healthy one).
const LATE: Duration = Duration::from_secs(15);

fn start(flags: &[&str]) -> Server {
    Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), flags)
}

/// A server and a test's calls to it.
fn with_client<F: Future<Output = ()>>(test: impl FnOnce(Client) -> F) {
    let server = start(&[]);
    block_on(async { test(Client::connect(&server).await).await });
}

async fn grant(c: &mut Client, id: i64, ttl: i64) -> Result<LeaseGrantResponse, Status> {
    c.lease.lease_grant(LeaseGrantRequest { ttl, id }).await.map(tonic::Response::into_inner)
}

/// Revokes and answers the header's revision.
async fn revoke(c: &mut Client, id: i64) -> Result<i64, Status> {
    let response = c.lease.lease_revoke(LeaseRevokeRequest { id }).await?;
    Ok(response.into_inner().header.expect("a header").revision)
}

async fn time(c: &mut Client, id: i64) -> LeaseTimeToLiveResponse {
    let request = LeaseTimeToLiveRequest { id, keys: true };
    c.lease.lease_time_to_live(request).await.expect("an answer").into_inner()
}

async fn attached(c: &mut Client, id: i64) -> Vec<String> {
    let mut keys: Vec<_> = time(c, id).await.keys.iter().map(|key| text(key)).collect();
    keys.sort_unstable();
    keys
}

async fn leases(c: &mut Client) -> Vec<i64> {
    let answer = c.lease.lease_leases(LeaseLeasesRequest {}).await.expect("an answer").into_inner();
    answer.leases.iter().map(|lease| lease.id).collect()
}

async fn leased(c: &mut Client, key: &'static str, lease: i64) {
    c.put(PutRequest { lease, ..put(key, "v") }).await.expect("a put");
}

fn not_found() -> (Code, String) {
    etcd(Code::NotFound, "requested lease not found")
}

/// One LeaseKeepAlive stream.
struct KeepAlive {
    requests: UnboundedSender<LeaseKeepAliveRequest>,
    responses: Streaming<LeaseKeepAliveResponse>,
}

impl KeepAlive {
    /// Opens the stream with a first renewal, and gives that one's answer.
    async fn open(c: &Client, id: i64) -> (Self, LeaseKeepAliveResponse) {
        let (requests, outgoing) = tokio::sync::mpsc::unbounded_channel();
        requests.send(LeaseKeepAliveRequest { id }).expect("just opened");
        let mut lease = c.lease.clone();
        let call = lease.lease_keep_alive(UnboundedReceiverStream::new(outgoing));
        let responses = tokio::time::timeout(PATIENCE, call).await.expect("in time").expect("a stream").into_inner();
        let mut stream = Self { requests, responses };
        let first = stream.next().await;
        (stream, first)
    }

    fn ask(&self, id: i64) {
        self.requests.send(LeaseKeepAliveRequest { id }).expect("the stream is open");
    }

    async fn next(&mut self) -> LeaseKeepAliveResponse {
        let next = tokio::time::timeout(PATIENCE, self.responses.message()).await.expect("an answer in time");
        next.expect("no error").expect("the stream goes on")
    }
}

#[test]
fn grants_take_the_id_or_pick_one_and_keep_to_the_bounds() {
    with_client(|mut c| async move {
        // L-1
        let picked = grant(&mut c, 0, 60).await.expect("a lease");
        assert!(picked.id > 0 && picked.ttl == 60 && picked.error.is_empty());
        let other = grant(&mut c, 0, 60).await.expect("a lease");
        assert_ne!(other.id, picked.id);
        for id in [1, 7_587_848_390_000_000_000, -5, i64::MIN] {
            assert_eq!(grant(&mut c, id, 60).await.expect("a lease").id, id);
        }
        // L-2
        let exists = etcd(Code::FailedPrecondition, "lease already exists");
        assert_eq!(refusal(grant(&mut c, 1, 60).await), exists);
        assert_eq!(refusal(grant(&mut c, -5, 60).await), exists);
        // L-3, and that it is looked at first
        let too_large = etcd(Code::OutOfRange, "too large lease TTL");
        for id in [0, 99, 1] {
            assert_eq!(refusal(grant(&mut c, id, 9_000_000_001).await), too_large);
        }
        assert_eq!(grant(&mut c, 0, 9_000_000_000).await.expect("at the bound").ttl, 9_000_000_000);
        // L-4
        for ttl in [SHORTEST, 1, 0, -1, i64::MIN] {
            assert_eq!(grant(&mut c, 0, ttl).await.expect("a lease").ttl, SHORTEST, "asked for {ttl}");
        }
        // L-5
        let header = grant(&mut c, 0, 60).await.expect("a lease").header.expect("a header");
        assert_eq!((header.revision, c.revision().await), (1, 1));
    });
}

#[test]
fn shortest_time_follows_the_election_timeout() {
    let server = start(&["--heartbeat-interval=500", "--election-timeout=3000"]);
    block_on(async {
        let mut c = Client::connect(&server).await;
        // L-4: one and a half election timeouts, in whole seconds.
        assert_eq!(grant(&mut c, 0, 1).await.expect("a lease").ttl, 5);
        assert_eq!(grant(&mut c, 0, 6).await.expect("a lease").ttl, 6);
    });
}

#[test]
fn revocation_takes_the_keys_in_one_revision() {
    with_client(|mut c| async move {
        let id = c.grant(60).await;
        for key in ["c", "a", "b", "d"] {
            leased(&mut c, key, id).await;
        }
        c.set("d", "free").await;
        c.set("e", "free").await;
        assert_eq!(c.revision().await, 7);
        let create =
            WatchCreateRequest { key: "\0".into(), range_end: "\0".into(), prev_kv: true, ..Default::default() };
        let mut watching = Watching::on(&c, create).await;
        // L-14, W-32
        assert_eq!(revoke(&mut c, id).await.expect("revoked"), 8);
        let response = watching.next().await;
        let events: Vec<_> = response.events.iter().map(common::EventRecord::decode_raw).collect();
        let seen: Vec<_> = events
            .iter()
            .map(|e| (e.is_delete(), e.kv.as_ref().expect("a record")))
            .map(|(deleted, kv)| (deleted, text(&kv.key), kv.mod_revision))
            .collect();
        assert_eq!(seen, [(true, "a".into(), 8), (true, "b".into(), 8), (true, "c".into(), 8)]);
        assert!(events.iter().all(|e| e.prev_kv.as_ref().is_some_and(|kv| kv.lease == id)));
        assert_eq!(keys(&c.range(everything()).await.expect("a read")), ["d", "e"]);
        // L-15
        assert_eq!(refusal(revoke(&mut c, id).await), not_found());
        assert_eq!(refusal(c.put(PutRequest { lease: id, ..put("x", "") }).await), not_found());
        let gone = time(&mut c, id).await;
        assert_eq!((gone.id, gone.ttl, gone.granted_ttl, gone.keys.len()), (id, -1, 0, 0));
        // L-2, L-33: the id is free, and the new lease has nothing of the old one.
        assert_eq!(grant(&mut c, id, 90).await.expect("a lease").ttl, 90);
        assert_eq!((attached(&mut c, id).await.len(), time(&mut c, id).await.granted_ttl), (0, 90));
        // L-14: without keys the revision stays.
        assert_eq!(revoke(&mut c, id).await.expect("revoked"), 8);
        assert_eq!(c.revision().await, 8);
    });
}

#[test]
fn renewals_answer_in_order_and_unknown_leases_end_nothing() {
    with_client(|mut c| async move {
        c.set("a", "v").await;
        let (short, long) = (c.grant(10).await, c.grant(600).await);
        // L-7
        let (mut stream, first) = KeepAlive::open(&c, long).await;
        assert_eq!((first.id, first.ttl), (long, 600));
        // L-13
        let header = first.header.expect("a header");
        assert!(header.revision == 2 && header.member_id != 0 && header.cluster_id != 0 && header.raft_term != 0);
        // L-8: between known ones, in one go.
        for id in [short, 4711, 0, -1, long, short] {
            stream.ask(id);
        }
        for (id, ttl) in [(short, 10), (4711, 0), (0, 0), (-1, 0), (long, 600), (short, 10)] {
            let answer = stream.next().await;
            assert_eq!((answer.id, answer.ttl), (id, ttl));
            assert_eq!(answer.header.expect("a header").revision, 2, "also with an answer of 0");
        }
        // L-8: revoked meanwhile.
        revoke(&mut c, short).await.expect("revoked");
        stream.ask(short);
        stream.ask(long);
        assert_eq!(stream.next().await.ttl, 0);
        assert_eq!(stream.next().await.ttl, 600);
        // L-12: no entry of the log is taken.
        let status = |mut c: Client| async move {
            let request = actd::pb::etcdserverpb::StatusRequest {};
            c.maintenance.status(request).await.expect("a status").into_inner().raft_index
        };
        let before = status(c.clone()).await;
        for _ in 0..20 {
            stream.ask(long);
            stream.next().await;
        }
        assert_eq!(status(c.clone()).await, before);
        // Closing this side ends the stream well.
        drop(stream.requests);
        let end = tokio::time::timeout(PATIENCE, stream.responses.message()).await.expect("in time");
        assert!(end.expect("no error").is_none());
    });
}

#[test]
fn keys_live_as_long_as_promised_and_no_longer_than_that() {
    with_client(|mut c| async move {
        let create = WatchCreateRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
        let mut watching = Watching::on(&c, create).await;
        let (dying, renewed) = (c.grant(SHORTEST).await, c.grant(RENEWED).await);
        let began = Instant::now();
        leased(&mut c, "k2", dying).await;
        leased(&mut c, "k1", dying).await;
        leased(&mut c, "r", renewed).await;
        watching.events(2).await;
        // L-9: kept alive all along, while the other one dies. KV-44: puts with it do not extend a lease.
        let (mut stream, _) = KeepAlive::open(&c, renewed).await;
        let mut renewer = c.clone();
        let renewal = async {
            let mut tick = tokio::time::interval(Duration::from_millis(400));
            while began.elapsed() < Duration::from_secs(RENEWED as u64 + 2) {
                tick.tick().await;
                stream.ask(renewed);
                assert_eq!(stream.next().await.ttl, RENEWED);
                assert!(renewer.record("r").await.is_some());
                if began.elapsed() < Duration::from_secs(1) {
                    leased(&mut renewer, "k1", dying).await;
                }
            }
        };
        let expiry = async {
            loop {
                let response = watching.next().await;
                let events: Vec<_> = response.events.iter().map(common::EventRecord::decode_raw).collect();
                if events.iter().any(common::EventRecord::is_delete) {
                    // L-17, W-32: both at once, in order.
                    let died = began.elapsed();
                    let order: Vec<_> = events.iter().map(|e| text(&e.kv.as_ref().expect("a record").key)).collect();
                    assert_eq!(order, ["k1", "k2"]);
                    assert!(died >= Duration::from_secs(SHORTEST as u64), "died after {died:?}");
                    assert!(died < Duration::from_secs(SHORTEST as u64) + LATE, "died after {died:?}");
                    return;
                }
            }
        };
        tokio::join!(renewal, expiry);
        // L-8, L-15, L-2
        let gone = time(&mut c, dying).await;
        assert_eq!((gone.ttl, gone.granted_ttl), (-1, 0));
        stream.ask(dying);
        assert_eq!(stream.next().await.ttl, 0);
        assert_eq!(refusal(revoke(&mut c, dying).await), not_found());
        assert_eq!(leases(&mut c).await, [renewed]);
        assert_eq!(grant(&mut c, dying, 60).await.expect("the id is free").id, dying);
        // Renewals have stopped: it dies as well (H-43).
        let deadline = Instant::now() + Duration::from_secs(RENEWED as u64) + LATE;
        while c.record("r").await.is_some() {
            assert!(Instant::now() < deadline, "the other lease outlived its renewals");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn time_to_live_and_leases_tell_what_there_is() {
    with_client(|mut c| async move {
        assert!(leases(&mut c).await.is_empty());
        let (later, sooner) = (c.grant(1_000).await, c.grant(100).await);
        leased(&mut c, "a", later).await;
        leased(&mut c, "b", later).await;
        // L-20
        let found = time(&mut c, later).await;
        assert_eq!((found.id, found.granted_ttl, found.keys.len()), (later, 1_000, 2));
        assert!((970..1_000).contains(&found.ttl), "rounded down: {}", found.ttl);
        assert_eq!(found.header.expect("a header").revision, 3);
        assert_eq!(attached(&mut c, later).await, ["a", "b"]);
        let request = LeaseTimeToLiveRequest { id: later, keys: false };
        let without = c.lease.lease_time_to_live(request).await.expect("an answer").into_inner();
        assert!(without.keys.is_empty());
        // L-21
        let unknown = time(&mut c, 4711).await;
        assert_eq!((unknown.id, unknown.ttl, unknown.granted_ttl, unknown.keys.len()), (4711, -1, 0, 0));
        assert!(unknown.header.is_some());
        // L-24: by remaining time.
        assert_eq!(leases(&mut c).await, [sooner, later]);
        // L-30: a key is of one lease at most, and of none once deleted.
        leased(&mut c, "a", sooner).await;
        assert_eq!(attached(&mut c, later).await, ["b"]);
        c.delete(delete("a")).await.expect("a delete");
        c.set("a", "again").await;
        assert!(attached(&mut c, sooner).await.is_empty());
        revoke(&mut c, sooner).await.expect("revoked");
        assert!(c.record("a").await.is_some());
        // L-7: a renewal brings the full time.
        let (_stream, answer) = KeepAlive::open(&c, later).await;
        assert_eq!(answer.ttl, 1_000);
        assert!(time(&mut c, later).await.ttl >= 998);
    });
}

#[test]
fn leases_and_their_keys_outlive_a_restart() {
    let mut server = start(&[]);
    block_on(async {
        let mut c = Client::connect(&server).await;
        for id in [5, -6, 7] {
            grant(&mut c, id, 500 + id).await.expect("a lease");
        }
        leased(&mut c, "moved", 5).await;
        leased(&mut c, "moved", -6).await;
        leased(&mut c, "freed", 5).await;
        c.set("freed", "v").await;
        leased(&mut c, "stays", 5).await;
        leased(&mut c, "deleted", 5).await;
        c.delete(delete("deleted")).await.expect("a delete");
        revoke(&mut c, 7).await.expect("revoked");
    });
    server.restart();
    block_on(async {
        let mut c = Client::connect(&server).await;
        // L-28, L-1, H-36
        let mut found = leases(&mut c).await;
        found.sort_unstable();
        assert_eq!(found, [-6, 5]);
        assert_eq!((time(&mut c, 5).await.granted_ttl, time(&mut c, -6).await.granted_ttl), (505, 494));
        // L-29
        assert_eq!(attached(&mut c, 5).await, ["stays"]);
        assert_eq!(attached(&mut c, -6).await, ["moved"]);
        revoke(&mut c, 5).await.expect("revoked");
        assert_eq!(keys(&c.range(everything()).await.expect("a read")), ["freed", "moved"]);
        revoke(&mut c, -6).await.expect("a negative id as well");
        assert_eq!(keys(&c.range(everything()).await.expect("a read")), ["freed"]);
    });
}

#[test]
fn expiry_goes_on_after_a_restart() {
    let mut server = start(&[]);
    block_on(async {
        let mut c = Client::connect(&server).await;
        let id = c.grant(SHORTEST).await;
        leased(&mut c, "k", id).await;
    });
    server.restart();
    block_on(async {
        let mut c = Client::connect(&server).await;
        // L-25, L-28: at least the full time again, and then it ends.
        let deadline = Instant::now() + Duration::from_secs(SHORTEST as u64 + 1) + LATE;
        while c.record("k").await.is_some() {
            assert!(Instant::now() < deadline, "the key is still there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(leases(&mut c).await.is_empty());
    });
}

#[test]
fn thousand_keys_of_one_lease_die_in_one_revision() {
    with_client(|mut c| async move {
        let id = c.grant(RENEWED).await;
        let (mut stream, _) = KeepAlive::open(&c, id).await;
        for n in 0..1_000 {
            c.put(PutRequest { lease: id, ..put(format!("k{n:04}"), "v") }).await.expect("a put");
            if n % 10 == 0 {
                stream.ask(id);
                assert_eq!(stream.next().await.ttl, RENEWED);
            }
        }
        let create = WatchCreateRequest { key: "k".into(), range_end: "l".into(), ..Default::default() };
        let mut watching = Watching::on(&c, create).await;
        // K-35, W-27: and in one response.
        let response = watching.next().await;
        assert_eq!(response.events.len(), 1_000);
        let events: Vec<_> = response.events.iter().map(common::EventRecord::decode_raw).collect();
        assert!(events.iter().all(|e| e.is_delete() && e.kv.as_ref().expect("a record").mod_revision == 1_002));
        let order: Vec<_> = events.iter().map(|e| e.kv.as_ref().expect("a record").key.clone()).collect();
        assert!(order.is_sorted());
        assert_eq!(c.revision().await, 1_002);
    });
}

#[test]
fn corrupt_alarm_keeps_leases_from_ending() {
    with_client(|mut c| async move {
        let id = c.grant(SHORTEST).await;
        leased(&mut c, "k", id).await;
        let alarm = |action| AlarmRequest { action, member_id: 1, alarm: 2 };
        c.maintenance.alarm(alarm(1)).await.expect("the alarm is raised");
        // L-5, L-19, M-13
        let corrupt = etcd(Code::DataLoss, "corrupt cluster");
        assert_eq!(refusal(grant(&mut c, 0, 60).await), corrupt);
        assert_eq!(refusal(revoke(&mut c, id).await), corrupt);
        let late = Instant::now() + Duration::from_secs(SHORTEST as u64 + 2);
        while Instant::now() < late {
            assert!(c.record("k").await.is_some());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // L-22
        let expired = time(&mut c, id).await;
        assert!(expired.ttl <= 0 && expired.granted_ttl == SHORTEST, "{expired:?}");
        c.maintenance.alarm(alarm(2)).await.expect("the alarm is off");
        let deadline = Instant::now() + LATE;
        while c.record("k").await.is_some() {
            assert!(Instant::now() < deadline, "the lease ends once it may");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn leases_that_end_together_fail_nobody_else() {
    // L-17, L-18: thousands end within a second, a bounded part of them at a time, and others notice nothing.
    const LEASES: i64 = 20_000;
    const REVOKING_MAX: u64 = 1_000;
    const GRANTERS: i64 = 64;
    const TOGETHER_AFTER: u64 = 14;
    let server = start(&[]);
    let port = server.client_port;
    let under_way = move || {
        let metrics = common::http_get(port, "/metrics").expect("metrics");
        let line =
            metrics.lines().find(|l| l.starts_with("actd_gate_slots_used{gate=\"proposals\"}")).expect("the gate");
        line.rsplit(' ').next().and_then(|n| n.parse::<f64>().ok()).expect("a number") as u64
    };
    block_on(async {
        let mut c = Client::connect(&server).await;
        let began = Instant::now();
        let granters = (0..GRANTERS).map(|first| {
            let mut c = c.clone();
            tokio::spawn(async move {
                for id in (1 + first..=LEASES).step_by(GRANTERS as usize) {
                    let ttl = TOGETHER_AFTER.saturating_sub(began.elapsed().as_secs()).max(SHORTEST as u64) as i64;
                    grant(&mut c, id, ttl).await.expect("a grant");
                    if id % 10 == 0 {
                        let leased = PutRequest { key: format!("leased-{id}").into(), lease: id, ..Default::default() };
                        c.kv.put(leased).await.expect("a put");
                    }
                }
            })
        });
        for granter in granters.collect::<Vec<_>>() {
            granter.await.expect("all are granted");
        }
        println!("granted in {:?}", began.elapsed());

        grant(&mut c, LEASES + 1, RENEWED).await.expect("a grant");
        leased(&mut c, "kept", LEASES + 1).await;
        let (keep_alive, first) = KeepAlive::open(&c, LEASES + 1).await;
        assert_eq!(first.ttl, RENEWED);
        let mut keep_alive = keep_alive;
        let (mut most, mut puts) = (0, 0);
        while leases(&mut c).await.len() > 1 {
            assert!(began.elapsed() < Duration::from_secs(TOGETHER_AFTER) + 4 * LATE, "leases are left");
            c.put(put("other", "v")).await.expect("a put beside");
            keep_alive.ask(LEASES + 1);
            assert_eq!(keep_alive.next().await.ttl, RENEWED);
            most = most.max(tokio::task::spawn_blocking(under_way).await.expect("metrics"));
            puts += 1;
        }
        println!("ended after {:?}; {puts} puts beside; at most {most} under way", began.elapsed());
        assert!(most <= REVOKING_MAX + 1, "{most} at once");
        let left = keys(&c.range(everything()).await.expect("a range"));
        assert_eq!(left, ["kept", "other"]);
    });
}
