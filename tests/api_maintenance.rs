//! The Maintenance service of one member over a socket, statement by statement (M-1 to M-31, M-38, C-37 to C-42,
//! KV-85, KV-86). Snapshot streams are in `snapshot_files.rs`, corruption checks and transfers in `cluster/`.

mod common;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    AlarmMember, AlarmRequest, DefragmentRequest, DowngradeRequest, HashKvRequest, HashKvResponse, HashRequest,
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, MemberListRequest,
    MoveLeaderRequest, PutRequest, RangeRequest, StatusRequest, StatusResponse, WatchCreateRequest,
    compare::{CompareResult, TargetUnion},
};
use common::{
    Client, Server,
    calls::{
        Op, PATIENCE, Watching, all, block_on, branch, compare, delete, delete_span, etcd, everything, get, put,
        refusal,
    },
};
use tonic::{Code, Status};

// Numbers of the wire: alarm actions, alarm types, downgrade actions.
const GET: i32 = 0;
const ACTIVATE: i32 = 1;
const DEACTIVATE: i32 = 2;
const NONE: i32 = 0;
const NOSPACE: i32 = 1;
const CORRUPT: i32 = 2;
const VALIDATE: i32 = 0;
const ENABLE: i32 = 1;
const CANCEL: i32 = 2;

const MIB: usize = 1 << 20;

fn start(flags: &[&str]) -> Server {
    Server::start(Path::new(&common::server_under_test(env!("CARGO_BIN_EXE_actd"))), flags)
}

/// A server and a test's calls to it.
fn with_client<F: Future<Output = ()>>(flags: &[&str], test: impl FnOnce(Client) -> F) {
    let server = start(flags);
    block_on(async { test(Client::connect(&server).await).await });
}

async fn status(c: &mut Client) -> StatusResponse {
    c.maintenance.status(StatusRequest {}).await.expect("a status").into_inner()
}

/// The status, once the cluster's version is decided and the store has followed it (C-36).
async fn settled(c: &mut Client) -> StatusResponse {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = status(c).await;
        if status.storage_version == "3.7.0" {
            return status;
        }
        assert!(Instant::now() < deadline, "{status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn alarm(c: &mut Client, action: i32, member_id: u64, alarm: i32) -> Result<Vec<AlarmMember>, Status> {
    let response = c.maintenance.alarm(AlarmRequest { action, member_id, alarm }).await?.into_inner();
    assert!(response.header.is_some_and(|header| header.member_id != 0));
    let mut alarms = response.alarms;
    alarms.sort_by_key(|a| (a.member_id, a.alarm));
    Ok(alarms)
}

async fn hash_kv(c: &mut Client, revision: i64) -> Result<HashKvResponse, Status> {
    c.maintenance.hash_kv(HashKvRequest { revision }).await.map(tonic::Response::into_inner)
}

async fn downgrade(c: &mut Client, action: i32, version: &str) -> Result<String, Status> {
    let request = DowngradeRequest { action, version: version.to_owned() };
    c.maintenance.downgrade(request).await.map(|response| response.into_inner().version)
}

fn no_space() -> (Code, String) {
    etcd(Code::ResourceExhausted, "mvcc: database space exceeded")
}

fn corrupt() -> (Code, String) {
    etcd(Code::DataLoss, "corrupt cluster")
}

#[test]
fn status_has_the_fields_of_3_7() {
    with_client(&[], |mut c| async move {
        let status = settled(&mut c).await;
        // M-1, M-2, M-4, M-5
        let header = status.header.expect("a header");
        assert_eq!((status.version.as_str(), status.storage_version.as_str()), ("3.7.1", "3.7.0"));
        assert_eq!((status.leader, status.is_learner), (header.member_id, false));
        assert!(status.raft_term >= 2 && status.raft_term == header.raft_term);
        assert!(status.raft_applied_index <= status.raft_index && status.raft_index >= 4);
        assert!(0 < status.db_size_in_use && status.db_size_in_use <= status.db_size);
        // A quota of 13 pages is used by others, so an empty store must be below.
        assert!(status.db_size < 13 * 4096, "{}", status.db_size);
        assert_eq!(status.db_size_quota, 2 << 30);
        assert!(status.errors.is_empty());
        let job = status.downgrade_info.as_ref().expect("always there");
        assert!(!job.enabled && job.target_version.is_empty());
        // It follows what is written.
        c.set("k", vec![b'x'; 100_000]).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let later = self::status(&mut c).await;
            assert!(later.raft_index > status.raft_index && later.raft_applied_index > status.raft_applied_index);
            assert_eq!(later.header.expect("a header").revision, 2);
            if later.db_size >= status.db_size + 100_000 && later.db_size_in_use > status.db_size_in_use {
                break;
            }
            assert!(Instant::now() < deadline, "{later:?}");
        }
    });
    for (flag, shown) in [("--quota-backend-bytes=-1", -1), ("--quota-backend-bytes=5000000", 5_000_000)] {
        with_client(&[flag], |mut c| async move {
            // M-4
            assert_eq!(status(&mut c).await.db_size_quota, shown);
        });
    }
}

#[test]
fn alarms_are_listed_raised_and_lifted() {
    let mut server = start(&[]);
    let raised = |member_id, alarm| AlarmMember { member_id, alarm };
    block_on(async {
        let mut c = Client::connect(&server).await;
        // M-6, M-7
        assert!(alarm(&mut c, GET, 0, NONE).await.expect("a list").is_empty());
        assert!(alarm(&mut c, ACTIVATE, 7, NONE).await.expect("nothing").is_empty());
        assert!(alarm(&mut c, GET, 0, NONE).await.expect("a list").is_empty());
        for _ in 0..2 {
            assert_eq!(alarm(&mut c, ACTIVATE, 7, NOSPACE).await.expect("raised"), [raised(7, NOSPACE)]);
        }
        alarm(&mut c, ACTIVATE, 9, CORRUPT).await.expect("raised");
        alarm(&mut c, ACTIVATE, 8, NOSPACE).await.expect("raised");
        let expected = [raised(7, NOSPACE), raised(8, NOSPACE), raised(9, CORRUPT)];
        assert_eq!(alarm(&mut c, GET, 0, NONE).await.expect("a list"), expected);
        // M-6: of a type, of any member.
        assert_eq!(alarm(&mut c, GET, 12, NOSPACE).await.expect("a list"), expected[..2]);
        // M-3, but for the spaces between its fields
        let errors = status(&mut c).await.errors;
        let mut errors: Vec<_> = errors.iter().map(|e| e.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        errors.sort_unstable();
        let texts = ["memberID:7 alarm:NOSPACE", "memberID:8 alarm:NOSPACE", "memberID:9 alarm:CORRUPT"];
        assert_eq!(errors, texts);
        // M-8
        assert!(alarm(&mut c, DEACTIVATE, 9, NOSPACE).await.expect("another one's").is_empty());
        assert!(alarm(&mut c, DEACTIVATE, 1, CORRUPT).await.expect("another one's").is_empty());
        assert_eq!(alarm(&mut c, DEACTIVATE, 7, NOSPACE).await.expect("lifted"), [raised(7, NOSPACE)]);
        // M-11: CORRUPT goes over NOSPACE.
        assert_eq!(refusal(c.put(put("k", "v")).await), corrupt());
        assert_eq!(c.revision().await, 1);
    });
    server.restart_unhealthy();
    block_on(async {
        let mut c = Client::connect(&server).await;
        // M-10: in force at once.
        assert_eq!(refusal(c.put(put("k", "v")).await), corrupt());
        let expected = [raised(8, NOSPACE), raised(9, CORRUPT)];
        assert_eq!(alarm(&mut c, GET, 0, NONE).await.expect("a list"), expected);
        alarm(&mut c, DEACTIVATE, 9, CORRUPT).await.expect("lifted");
        // M-11
        assert_eq!(refusal(c.put(put("k", "v")).await), no_space());
        assert_eq!(alarm(&mut c, DEACTIVATE, 8, NOSPACE).await.expect("lifted"), [raised(8, NOSPACE)]);
        assert_eq!(c.set("k", "v").await, 2);
        assert!(status(&mut c).await.errors.is_empty());
    });
}

#[test]
fn unknown_alarm_action_is_refused() {
    if std::env::var_os("ACTD_UNDER_TEST").is_some() {
        return common::left_out("such a request crashes etcd 3.7.1's handler");
    }
    with_client(&[], |mut c| async move {
        // M-9
        for action in [3, -1, i32::MAX] {
            assert_eq!(refusal(alarm(&mut c, action, 0, NONE).await).0, Code::InvalidArgument);
        }
        c.set("k", "v").await;
    });
}

#[test]
fn nospace_alarm_refuses_what_takes_space_and_nothing_else() {
    with_client(&[], |mut c| async move {
        for key in ["a", "b", "c"] {
            c.set(key, "v").await;
        }
        let id = c.grant(60).await;
        let other = c.grant(60).await;
        alarm(&mut c, ACTIVATE, 7, NOSPACE).await.expect("raised");
        // M-12
        let grant = LeaseGrantRequest { ttl: 60, id: 0 };
        assert_eq!(refusal(c.lease.lease_grant(grant).await), no_space());
        assert_eq!(refusal(c.put(put("a", "v")).await), no_space());
        let never = [compare("a", CompareResult::Equal, TargetUnion::Version(99))];
        let puts = [
            all([put("a", "v").op()]),
            branch([], [], [put("a", "v").op()]),
            branch(never.clone(), [put("a", "v").op()], [get("a").op()]),
            all([all([put("a", "v").op()]).op()]),
            branch([], [], [branch([], [], [put("a", "v").op()]).op()]),
        ];
        for request in puts {
            assert_eq!(refusal(c.txn(request.clone()).await), no_space(), "{request:?}");
        }
        assert_eq!(c.revision().await, 4);
        c.delete(delete("a")).await.expect("a delete");
        c.txn(all([delete("b").op(), get("c").op(), all([delete("x").op()]).op()])).await.expect("without puts");
        let create = WatchCreateRequest { key: "a".into(), start_revision: 5, ..Default::default() };
        assert!(Watching::on(&c, create).await.events(1).await[0].is_delete());
        assert_eq!(c.compact(5, true).await.expect("a compaction"), 6);
        c.maintenance.defragment(DefragmentRequest {}).await.expect("defragmented");
        c.lease.lease_revoke(LeaseRevokeRequest { id: other }).await.expect("revoked");
        let request = LeaseTimeToLiveRequest { id, keys: true };
        assert_eq!(c.lease.lease_time_to_live(request).await.expect("an answer").into_inner().granted_ttl, 60);
        let renewals = tokio_stream::iter([LeaseKeepAliveRequest { id }]);
        let mut renewed = c.lease.lease_keep_alive(renewals).await.expect("a stream").into_inner();
        assert_eq!(renewed.message().await.expect("no error").expect("an answer").ttl, 60);
    });
}

#[test]
fn corrupt_alarm_refuses_every_replicated_change() {
    with_client(&[], |mut c| async move {
        c.set("a", "v").await;
        let id = c.grant(60).await;
        alarm(&mut c, ACTIVATE, 7, CORRUPT).await.expect("raised");
        // M-13, KV-84
        assert_eq!(refusal(c.put(put("a", "v")).await), corrupt());
        assert_eq!(refusal(c.delete(delete("x")).await), corrupt());
        assert_eq!(refusal(c.txn(all([delete("x").op()])).await), corrupt());
        assert_eq!(refusal(c.txn(all([all([get("a").op()]).op()])).await), corrupt());
        assert_eq!(refusal(c.compact(2, false).await), corrupt());
        assert_eq!(refusal(c.lease.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await), corrupt());
        assert_eq!(refusal(c.lease.lease_revoke(LeaseRevokeRequest { id }).await), corrupt());
        assert_eq!(c.range(get("a")).await.expect("a read").count, 1);
        c.txn(all([get("a").op()])).await.expect("a read");
        let create = WatchCreateRequest { key: "a".into(), start_revision: 2, ..Default::default() };
        Watching::on(&c, create).await.events(1).await;
        assert_eq!(status(&mut c).await.header.expect("a header").revision, 2);
        hash_kv(&mut c, 0).await.expect("a hash");
        c.cluster.member_list(MemberListRequest { linearizable: true }).await.expect("a list");
    });
}

#[test]
fn quota_is_exact_about_the_cost_of_a_request() {
    let quota = MIB as i64;
    with_client(&[&format!("--quota-backend-bytes={quota}")], |mut c| async move {
        let before = settled(&mut c).await;
        // M-16: refused from the quota on; a put costs its key, its value and 256.
        let room = usize::try_from(quota - before.db_size).expect("room") - 256 - 1;
        let filling = |bytes: usize| put("k", vec![b'x'; bytes]);
        let half = room / 2;
        // The larger branch counts, nested puts included (H-58).
        let nested = |bytes: usize| {
            branch([], [put("o", "").op()], [filling(half).op(), all([put("n", vec![b'x'; bytes]).op()]).op()])
        };
        for (at_quota, name) in [(all([filling(room).op()]), "a put"), (nested(room - half - 257), "nested")] {
            assert_eq!(refusal(c.txn(at_quota).await), no_space(), "{name}");
            lift(&mut c).await;
        }
        assert_eq!(refusal(c.put(filling(room)).await), no_space());
        lift(&mut c).await;
        // One byte less passes; here in the branch that is not taken, so that nothing is filled.
        let spared = branch([], [get("k").op()], [filling(room - 1).op()]);
        assert!(c.txn(spared).await.expect("below the quota").succeeded);
        assert!(c.txn(nested(room - half - 258)).await.expect("below the quota").succeeded);
        assert_eq!(c.revision().await, 2);
    });
}

/// Waits for this member's alarm and lifts it.
async fn lift(c: &mut Client) {
    let member = status(c).await.leader;
    let deadline = Instant::now() + PATIENCE;
    // M-17
    while alarm(c, GET, 0, NONE).await.expect("a list") != [AlarmMember { member_id: member, alarm: NOSPACE }] {
        assert!(Instant::now() < deadline, "a refusal raises the alarm");
    }
    alarm(c, DEACTIVATE, member, NOSPACE).await.expect("lifted");
}

#[test]
fn full_member_recovers_by_compaction_and_defragmentation() {
    with_client(&[&format!("--quota-backend-bytes={}", 2 * MIB)], |mut c| async move {
        let mut writes = 0;
        let refused = loop {
            match c.put(put("k", vec![b'x'; 64 << 10])).await {
                Ok(_) => writes += 1,
                Err(status) => break status,
            }
            assert!(writes < 200, "the quota holds");
        };
        assert_eq!((refused.code(), refused.message().to_owned()), no_space());
        assert!(writes >= 10, "{writes} writes");
        let deadline = Instant::now() + PATIENCE;
        while alarm(&mut c, GET, 0, NOSPACE).await.expect("a list").is_empty() {
            assert!(Instant::now() < deadline, "M-17");
        }
        // M-12: whatever it costs
        assert_eq!(refusal(c.put(put("small", "")).await), no_space());
        assert_eq!(c.range(get("k")).await.expect("a read").count, 1);
        c.delete(delete("small")).await.expect("a delete");
        // M-19, KV-85
        let full = status(&mut c).await;
        let revision = c.revision().await;
        c.compact(revision, true).await.expect("a compaction");
        let deadline = Instant::now() + PATIENCE;
        let compacted = loop {
            let now = status(&mut c).await;
            if now.db_size_in_use < full.db_size_in_use / 2 {
                break now;
            }
            assert!(Instant::now() < deadline, "{now:?}");
        };
        let response = c.maintenance.defragment(DefragmentRequest {}).await.expect("defragmented").into_inner();
        assert!(response.header.is_none(), "G-6");
        let after = status(&mut c).await;
        assert!(after.db_size < full.db_size / 2 && after.db_size <= compacted.db_size, "{after:?}");
        // Still refused until the alarm is lifted.
        assert_eq!(refusal(c.put(put("small", "")).await), no_space());
        lift(&mut c).await;
        c.set("small", "").await;
        assert_eq!(c.revision().await, revision + 1);
    });
}

#[test]
fn alarm_lifted_too_early_comes_back() {
    with_client(&[&format!("--quota-backend-bytes={MIB}")], |mut c| async move {
        while c.put(put("k", vec![b'x'; 128 << 10])).await.is_ok() {}
        for _ in 0..3 {
            lift(&mut c).await;
            // M-19
            assert_eq!(refusal(c.put(put("k", vec![b'x'; 512 << 10])).await), no_space());
        }
        // G-15: with the quota reached and no alarm, validation comes after the quota.
        lift(&mut c).await;
        let invalid = PutRequest { ignore_value: true, ..put("", vec![b'x'; MIB]) };
        assert_eq!(refusal(c.put(invalid).await), no_space());
    });
}

#[test]
fn defragmentation_changes_nothing_that_is_read() {
    with_client(&[], |mut c| async move {
        for n in 0..300 {
            c.set(format!("k{}", n % 30), vec![b'x'; 1_000]).await;
        }
        c.delete(delete_span("k1", "k2")).await.expect("a delete");
        c.compact(200, true).await.expect("a compaction");
        let id = c.grant(600).await;
        c.put(PutRequest { lease: id, ..put("leased", "v") }).await.expect("a put");
        let read = c.range(everything()).await.expect("a read").kvs;
        let (hash, revision) = (hash_kv(&mut c, 0).await.expect("a hash"), c.revision().await);
        let old = RangeRequest { revision: 250, ..everything() };
        let pinned = c.range(old.clone()).await.expect("a read").kvs;
        for _ in 0..2 {
            // M-20, M-28, KV-9
            c.maintenance.defragment(DefragmentRequest {}).await.expect("defragmented");
            assert_eq!(hash_kv(&mut c, 0).await.expect("a hash"), hash);
            assert_eq!(c.range(everything()).await.expect("a read").kvs, read);
            assert_eq!(c.range(old.clone()).await.expect("a read").kvs, pinned);
            assert_eq!(c.revision().await, revision);
            let request = LeaseTimeToLiveRequest { id, keys: true };
            let lease = c.lease.lease_time_to_live(request).await.expect("an answer").into_inner();
            assert_eq!(lease.keys, ["leased"]);
        }
    });
}

#[test]
fn writes_go_on_around_defragmentation() {
    with_client(&[], |mut c| async move {
        // M-20, M-24, H-20
        let mut other = c.clone();
        let writes = async {
            for n in 0..300 {
                c.set(format!("k{n:03}"), vec![b'x'; 2_000]).await;
            }
        };
        let defragments = async {
            for _ in 0..5 {
                other.maintenance.defragment(DefragmentRequest {}).await.expect("defragmented");
            }
        };
        tokio::join!(writes, defragments);
        let found = c.range(everything()).await.expect("a read");
        assert_eq!((found.count, found.header.expect("a header").revision), (300, 301));
    });
}

#[test]
fn defragmentation_killed_at_any_moment_loses_nothing() {
    // M-21
    const KEYS: i64 = 60;
    let mut server = start(&[]);
    for pause in [0, 1, 5, 20, 60] {
        block_on(async {
            let mut c = Client::connect(&server).await;
            for n in 0..KEYS {
                c.set(format!("k{n:02}"), vec![b'x'; 20_000]).await;
            }
            let defragment = tokio::spawn(async move { c.maintenance.defragment(DefragmentRequest {}).await });
            // Wherever it is by then.
            tokio::time::sleep(Duration::from_millis(pause)).await;
            server.kill();
            let _ = defragment.await;
        });
        server.restart();
        block_on(async {
            let mut c = Client::connect(&server).await;
            let found = c.range(everything()).await.expect("a read");
            assert_eq!(found.count, KEYS, "killed after {pause} ms");
            assert!(common::calls::records(&found.kvs).iter().all(|kv| kv.value.len() == 20_000));
        });
    }
}

#[test]
fn reads_and_writes_go_on_during_a_compaction() {
    // KV-83: in slices of five keys, with pauses between them.
    const KEYS: i64 = 1_000;
    let flags = ["--compaction-batch-limit=5", "--compaction-sleep-interval=10ms"];
    with_client(&flags, |mut c| async move {
        for n in 0..2 * KEYS {
            c.set(format!("k{:04}", n % KEYS), "v").await;
        }
        let mut other = c.clone();
        let compaction = tokio::spawn(async move { other.compact(2 * KEYS, true).await });
        for n in 0..50 {
            c.set(format!("beside-{n}"), "v").await;
            assert_eq!(c.range(get("k0007")).await.expect("a read").count, 1);
        }
        assert!(!compaction.is_finished(), "the compaction was over before the writes");
        compaction.await.expect("no panic").expect("a compaction");
        assert_eq!(c.range(everything()).await.expect("a read").count, KEYS + 50);
    });
}

#[test]
fn hashes_are_of_a_revision_and_know_its_bounds() {
    with_client(&[], |mut c| async move {
        for n in 0..20 {
            c.set(format!("k{}", n % 5), format!("{n}")).await;
        }
        c.delete(delete("k0")).await.expect("a delete");
        // M-26, M-27
        assert_eq!(
            refusal(hash_kv(&mut c, 23).await),
            etcd(Code::OutOfRange, "mvcc: required revision is a future revision")
        );
        let now = hash_kv(&mut c, 0).await.expect("a hash");
        assert_eq!((now.compact_revision, now.hash_revision, now.header.expect("a header").revision), (-1, 22, 22));
        assert_eq!(hash_kv(&mut c, 22).await.expect("a hash"), now);
        let before = hash_kv(&mut c, 10).await.expect("a hash");
        assert_eq!((before.hash_revision, before.header.expect("a header").revision), (10, 22));
        assert_ne!(before.hash, now.hash);
        // M-28: later writes change nothing at a revision.
        c.set("k1", "later").await;
        assert_eq!(hash_kv(&mut c, 22).await.expect("a hash").hash, now.hash);
        assert_ne!(hash_kv(&mut c, 0).await.expect("a hash").hash, now.hash);

        c.compact(15, true).await.expect("a compaction");
        let compacted = etcd(Code::OutOfRange, "mvcc: required revision has been compacted");
        assert_eq!(refusal(hash_kv(&mut c, 14).await), compacted);
        assert_eq!(refusal(hash_kv(&mut c, 1).await), compacted);
        hash_kv(&mut c, 15).await.expect("the compact revision itself");
        let after = hash_kv(&mut c, 22).await.expect("a hash");
        assert_eq!((after.compact_revision, after.hash_revision), (15, 22));
        // M-25: of all there is, and it changes with it.
        let all = c.maintenance.hash(HashRequest {}).await.expect("a hash").into_inner();
        assert_eq!(all.header.expect("a header").revision, 23);
        c.set("k2", "changed").await;
        assert_ne!(c.maintenance.hash(HashRequest {}).await.expect("a hash").into_inner().hash, all.hash);
    });
}

#[test]
fn lone_member_moves_leadership_to_itself_only() {
    with_client(&[], |mut c| async move {
        let id = status(&mut c).await.leader;
        // M-38
        let unknown = MoveLeaderRequest { target_id: id ^ 1 };
        let refused = etcd(Code::FailedPrecondition, "bad leader transferee");
        assert_eq!(refusal(c.maintenance.move_leader(unknown).await), refused);
        assert_eq!(refusal(c.maintenance.move_leader(MoveLeaderRequest { target_id: 0 }).await), refused);
        let own = c.maintenance.move_leader(MoveLeaderRequest { target_id: id }).await.expect("at once");
        assert!(own.into_inner().header.is_none(), "G-6");
    });
}

/// What is said to the one target that is possible, before and after the leader has lowered the cluster's version.
async fn refusals(c: &mut Client, action: i32) -> [(Code, String); 2] {
    [refusal(downgrade(c, action, "3.6").await), refusal(downgrade(c, action, "3.5").await)]
}

#[test]
fn downgrades_are_checked_enabled_and_cancelled() {
    let mut server = start(&[]);
    let in_process = etcd(Code::FailedPrecondition, "cluster has a downgrade job in progress");
    block_on(async {
        let mut c = Client::connect(&server).await;
        settled(&mut c).await;
        // C-37, C-38
        assert_eq!(refusal(downgrade(&mut c, 9, "3.6").await), etcd(Code::Unknown, "unknown method"));
        let format = etcd(Code::InvalidArgument, "wrong downgrade target version format");
        let target = etcd(Code::InvalidArgument, "invalid downgrade target version");
        for action in [VALIDATE, ENABLE] {
            for text in ["", "three", "3", "3.6.0.1", "v3.6"] {
                assert_eq!(refusal(downgrade(&mut c, action, text).await), format, "{text:?}");
            }
            for text in ["3.5", "3.7", "3.7.0", "3.8.0", "2.6", "4.6"] {
                assert_eq!(refusal(downgrade(&mut c, action, text).await), target, "{text:?}");
            }
        }
        // C-39, C-41: nothing changes.
        for text in ["3.6", "3.6.0", "3.6.9"] {
            assert_eq!(downgrade(&mut c, VALIDATE, text).await.expect("possible"), "3.7");
        }
        assert!(!status(&mut c).await.downgrade_info.expect("always there").enabled);
        // C-40
        assert_eq!(downgrade(&mut c, CANCEL, "").await.expect("also without a job"), "3.7");
        assert_eq!(downgrade(&mut c, ENABLE, "3.6").await.expect("enabled"), "3.7");
        // C-42
        let job = status(&mut c).await.downgrade_info.expect("always there");
        assert_eq!((job.enabled, job.target_version.as_str()), (true, "3.6.0"));
        for action in [ENABLE, VALIDATE] {
            assert!(refusals(&mut c, action).await.contains(&in_process));
        }
    });
    server.restart();
    block_on(async {
        let mut c = Client::connect(&server).await;
        // C-43
        assert!(status(&mut c).await.downgrade_info.expect("always there").enabled);
        assert!(refusals(&mut c, VALIDATE).await.contains(&in_process));
        downgrade(&mut c, CANCEL, "").await.expect("cancelled");
        let job = status(&mut c).await.downgrade_info.expect("always there");
        assert_eq!((job.enabled, job.target_version.as_str()), (false, ""));
        // C-32: the cluster is of 3.7 again, and then a downgrade is possible again.
        let deadline = Instant::now() + PATIENCE;
        while downgrade(&mut c, VALIDATE, "3.6").await.is_err() {
            assert!(Instant::now() < deadline, "the cluster stays at the target of a cancelled downgrade");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}

/// By revisions the schedule is of 5 minutes, which `mvcc::auto_compaction` tests with a clock of its own.
#[test]
fn periodic_auto_compaction_keeps_one_retention() {
    let flags = ["--auto-compaction-mode=periodic", "--auto-compaction-retention=2s"];
    with_client(&flags, |mut c| async move {
        let began = Instant::now();
        for value in ["1", "2", "3"] {
            c.set("k", value).await;
        }
        let first = |c: &Client| {
            let mut c = c.clone();
            async move { c.range(RangeRequest { revision: 2, ..get("k") }).await }
        };
        // KV-86: nothing goes before one whole retention is over.
        let deadline = Instant::now() + PATIENCE;
        let refused = loop {
            match first(&c).await {
                Ok(_) => {}
                Err(status) => break status,
            }
            assert!(Instant::now() < deadline, "never compacted");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert!(began.elapsed() >= Duration::from_millis(1_900), "after {:?}", began.elapsed());
        assert_eq!(refused.message(), "etcdserver: mvcc: required revision has been compacted");
        // What was current then is readable, and so is what came since.
        assert_eq!(c.range(RangeRequest { revision: 4, ..get("k") }).await.expect("readable").count, 1);
        assert_eq!(c.set("k", "4").await, 5);
        assert_eq!(c.range(RangeRequest { revision: 4, ..get("k") }).await.expect("readable").count, 1);
    });
}
