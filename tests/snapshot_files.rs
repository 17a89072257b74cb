//! Database files between actd and a real etcd: each reads what the other wrote, and both then say the same (M-28,
//! M-32 to M-37). Without etcd and etcdctl the tests that need them say so and do nothing; in CI they fail.

mod common;

use std::{
    collections::BTreeMap,
    env,
    fs::{self, File},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use actd::{
    lease::Leases,
    mvcc::{
        hash::{self, HashKv},
        range::range,
        record::KeyValue,
        store::Store,
    },
    pb::etcdserverpb::{
        CompactionRequest, DeleteRangeRequest, HashKvRequest, LeaseGrantRequest, LeaseTimeToLiveRequest, PutRequest,
        RangeRequest, RangeResponse, RequestOp, SnapshotRequest, TxnRequest, request_op::Request,
    },
    snapshot::import,
    storage::{FjallStorage, Options, StoreDir},
};
use common::{Client, Server, pause, require_tool, server_under_test};
use prost::Message;

const PATIENCE: Duration = Duration::from_secs(30);
const LEASE: i64 = 0x1234_5678_9abc;

fn actd() -> std::path::PathBuf {
    server_under_test(env!("CARGO_BIN_EXE_actd"))
}

fn put(key: impl Into<String>, value: Vec<u8>, lease: i64) -> PutRequest {
    PutRequest { key: key.into().into(), value: value.into(), lease, ..Default::default() }
}

/// Keys with histories, deletions, transactions, a leased key, a value of many pages, a compaction. Answers
/// the revision it ends at.
async fn write_history(client: &mut Client) -> i64 {
    let grant = LeaseGrantRequest { ttl: 3600, id: LEASE };
    client.lease.lease_grant(grant).await.expect("granted");
    for n in 0..600_usize {
        client.kv.put(put(format!("k/{:03}", n * 7 % 200), vec![n as u8; n], 0)).await.expect("put");
        if n % 9 == 0 {
            let delete = DeleteRangeRequest { key: format!("k/{:03}", n % 200).into(), ..Default::default() };
            client.kv.delete_range(delete).await.expect("deleted");
        }
        if n % 50 == 0 {
            let ops =
                (0..10).map(|i| RequestOp { request: Some(Request::RequestPut(put(format!("t/{i}"), vec![i; n], 0))) });
            client.kv.txn(TxnRequest { success: ops.collect(), ..Default::default() }).await.expect("txn");
        }
    }
    client.kv.put(put("leased", b"x".to_vec(), LEASE)).await.expect("put");
    client.kv.put(put("large", vec![9; 1_000_000], 0)).await.expect("put");
    let revision =
        client.kv.put(put("last", Vec::new(), 0)).await.expect("put").into_inner().header.expect("h").revision;
    let compaction = CompactionRequest { revision: revision / 2, physical: true };
    client.kv.compact(compaction).await.expect("compacted");
    revision
}

/// What two servers with the same history agree on, at three revisions.
#[derive(Debug, PartialEq)]
struct Said {
    hashes: Vec<(u32, i64)>,
    keys: Vec<Vec<(KeyValue, i64)>>,
}

/// From the first that every version hashes: 3.4 refuses the compact revision itself.
fn revisions(newest: i64) -> [i64; 3] {
    [newest / 2 + 1, newest * 3 / 4, newest]
}

fn all_keys(revision: i64) -> RangeRequest {
    RangeRequest { key: "\0".into(), range_end: "\0".into(), revision, serializable: true, ..Default::default() }
}

fn keys_of(response: RangeResponse) -> Vec<(KeyValue, i64)> {
    let decode = |raw: &actd::mvcc::record::RawKeyValue| KeyValue::decode(raw.0.clone()).expect("a record");
    response.kvs.iter().map(|raw| (decode(raw), response.count)).collect()
}

async fn said_by(client: &mut Client, newest: i64) -> Said {
    let mut said = Said { hashes: Vec::new(), keys: Vec::new() };
    for revision in revisions(newest) {
        let hash = client.maintenance.hash_kv(HashKvRequest { revision }).await.expect("a hash").into_inner();
        said.hashes.push((hash.hash, hash.compact_revision));
        said.keys.push(keys_of(client.kv.range(all_keys(revision)).await.expect("a range").into_inner()));
    }
    said
}

fn said_by_store(store: &Store, storage: &FjallStorage, newest: i64) -> Said {
    let view = store.view();
    let mut said = Said { hashes: Vec::new(), keys: Vec::new() };
    for revision in revisions(newest) {
        let HashKv { hash, compact_revision, .. } = hash::hash_kv(&view, storage, revision).expect("a hash");
        said.hashes.push((hash, compact_revision));
        said.keys.push(keys_of(range(&view, storage, &all_keys(revision)).expect("a range")));
    }
    said
}

/// Imports a file as a new store and opens it.
fn opened(file: &Path, data_dir: &Path) -> (Store, Arc<FjallStorage>, import::Prepared) {
    fs::create_dir_all(data_dir).expect("a folder");
    let stores = StoreDir::open(data_dir).expect("the folder of stores");
    drop(stores.open_current(&Options::default()).expect("a first store"));
    let prepared = import::prepare(Box::new(File::open(file).expect("the file")), &stores, None).expect("imported");
    import::switch(&stores, prepared.index).expect("switched");
    let storage = Arc::new(stores.open_current(&Options::default()).expect("the imported store"));
    let mut leases = Leases::load(&*storage, 1).expect("leases");
    let store = Store::open(storage.clone(), &mut leases).expect("a store");
    (store, storage, prepared)
}

fn run(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program).env("ETCDCTL_API", "3").args(args).output().expect("the tool runs");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{args:?}: {out}{err}");
    out.into_owned()
}

#[tokio::test]
async fn etcd_serves_what_actd_backed_up() {
    let (Some(etcd), Some(etcdctl)) = (require_tool("etcd"), require_tool("etcdctl")) else { return };
    let server = Server::start(&actd(), &[]);
    let mut client = Client::connect(&server).await;
    let newest = write_history(&mut client).await;
    let said = said_by(&mut client, newest).await;

    let backup = server.folder().join("backup.db");
    let backup = backup.to_str().expect("UTF-8");
    run(&etcdctl, &["--endpoints", &server.endpoint(), "snapshot", "save", backup]);
    let status = run(&etcdctl, &["snapshot", "status", backup, "-w", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON of the status");
    assert_eq!(status["revision"], newest);
    assert_eq!(fs::metadata(backup).expect("the backup").len(), status["totalSize"].as_u64().expect("a size") + 32);

    let mut restored = Server::stopped_in(&env::temp_dir(), &etcd, &[]);
    let peer = format!("http://127.0.0.1:{}", restored.peer_port);
    let data_dir = restored.data_dir();
    let (cluster, data_dir) = (format!("m0={peer}"), data_dir.to_str().expect("UTF-8"));
    let member = ["--name", "m0", "--initial-cluster", &cluster, "--initial-advertise-peer-urls", &peer];
    run(&etcdctl, &[&["snapshot", "restore", backup, "--data-dir", data_dir][..], &member].concat());
    restored.restart();
    let mut client = Client::connect(&restored).await;
    assert_eq!(said_by(&mut client, newest).await, said);
    let lease = LeaseTimeToLiveRequest { id: LEASE, keys: true };
    let lease = client.lease.lease_time_to_live(lease).await.expect("the lease").into_inner();
    assert_eq!((lease.granted_ttl, lease.keys), (3600, vec!["leased".into()]));
}

#[tokio::test]
async fn actd_takes_over_what_etcd_wrote() {
    let (Some(etcd), Some(etcdctl)) = (require_tool("etcd"), require_tool("etcdctl")) else { return };
    let mut server = Server::start(&etcd, &[]);
    let mut client = Client::connect(&server).await;
    let newest = write_history(&mut client).await;
    let said = said_by(&mut client, newest).await;
    let members =
        client.cluster.member_list(actd::pb::etcdserverpb::MemberListRequest::default()).await.expect("members");
    let member = members.into_inner().members.remove(0).id;

    let backup = server.folder().join("backup.db");
    run(&etcdctl, &["--endpoints", &server.endpoint(), "snapshot", "save", backup.to_str().expect("UTF-8")]);
    server.terminate();
    let database = server.data_dir().join("member/snap/db");
    for (name, file) in [("backup", backup), ("database", database)] {
        let (store, storage, prepared) = opened(&file, &server.folder().join(name));
        assert_eq!(said_by_store(&store, &storage, newest), said, "{name}");
        assert!(prepared.index as i64 > newest, "{name}");
        assert_eq!(prepared.members.conf_state().voters, [member], "{name}");
    }
}

/// The whole stream as a file.
async fn save(client: &mut Client, to: &Path) {
    let mut stream = client.maintenance.snapshot(SnapshotRequest {}).await.expect("a stream").into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = stream.message().await.expect("a part") {
        assert!(part.header.is_none() && part.version == "3.7.0", "M-33");
        bytes.extend_from_slice(&part.blob);
    }
    fs::write(to, bytes).expect("written");
}

/// M-35.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backup_under_load_holds_whole_writes_and_all_acknowledged_before() {
    let server = Server::start(&actd(), &[]);
    let mut client = Client::connect(&server).await;
    for n in 0..100 {
        client.kv.put(put(format!("ballast/{n}"), vec![1; 50_000], 0)).await.expect("put");
    }
    let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (mut client, stop, acknowledged) = (client.clone(), stop.clone(), acknowledged.clone());
            tokio::spawn(async move {
                let mut n = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    let pair = ["a", "b"].map(|side| {
                        let put = put(format!("pair/{writer}/{}/{side}", n % 50), n.to_be_bytes().to_vec(), 0);
                        RequestOp { request: Some(Request::RequestPut(put)) }
                    });
                    let answer = client.kv.txn(TxnRequest { success: pair.into(), ..Default::default() }).await;
                    let revision = answer.expect("a txn").into_inner().header.expect("a header").revision;
                    acknowledged.fetch_max(revision, Ordering::SeqCst);
                }
            })
        })
        .collect();

    for round in 0..5 {
        let before = acknowledged.load(Ordering::SeqCst);
        let file = server.folder().join(format!("backup{round}"));
        save(&mut client, &file).await;
        let deadline = Instant::now() + PATIENCE;
        while acknowledged.load(Ordering::SeqCst) <= before {
            assert!(Instant::now() < deadline, "writes stand still");
            tokio::task::yield_now().await;
        }
        let (store, storage, _) = opened(&file, &server.folder().join(format!("store{round}")));
        let at = store.revision();
        assert!(at >= before, "revision {at} misses acknowledged writes up to {before}");
        let mut pairs: BTreeMap<Vec<u8>, Vec<(i64, bytes::Bytes)>> = BTreeMap::new();
        for (kv, _) in keys_of(range(&store.view(), &*storage, &all_keys(0)).expect("a range")) {
            if kv.key.starts_with(b"pair/") {
                pairs.entry(kv.key[..kv.key.len() - 1].to_vec()).or_default().push((kv.mod_revision, kv.value));
            }
        }
        for (key, sides) in pairs {
            assert!(sides.len() == 2 && sides[0] == sides[1], "torn transaction: {key:?} {sides:?}");
        }
        let said = client.maintenance.hash_kv(HashKvRequest { revision: at }).await.expect("a hash").into_inner();
        assert_eq!(hash::hash_kv(&store.view(), &*storage, at).expect("a hash").hash, said.hash);
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("a writer ends well");
    }
}

/// Threads of the server that make backups.
fn backup_threads(server: &Server) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).expect("threads of our own child");
    let is_backup =
        |task: &fs::DirEntry| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "backup");
    tasks.filter_map(Result::ok).filter(is_backup).count()
}

/// M-36. The thread holds the engine's old rows; when it is gone, so are they.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_that_goes_away_ends_its_backup() {
    let server = Server::start(&actd(), &[]);
    let mut client = Client::connect(&server).await;
    for n in 0..20 {
        client.kv.put(put(format!("k{n}"), vec![1; 1_000_000], 0)).await.expect("put");
    }
    let mut stream = client.maintenance.snapshot(SnapshotRequest {}).await.expect("a stream").into_inner();
    stream.message().await.expect("a part").expect("the first of many");
    assert_eq!(backup_threads(&server), 1, "it waits for its client");
    drop(stream);
    let deadline = Instant::now() + PATIENCE;
    while backup_threads(&server) > 0 {
        assert!(Instant::now() < deadline, "the backup goes on for nobody");
        pause();
    }
    save(&mut client, &server.folder().join("backup")).await;
}
