//! A member whose data was changed under it is found.

use std::time::{Duration, Instant};

use actd::{
    mvcc::record::KeyValue,
    pb::etcdserverpb::{CompactionRequest, HashKvRequest, PutRequest, RangeRequest, StatusRequest},
    storage::{Bucket, Options, Storage, StoreDir, WriteBatch},
};
use prost::Message;
use tonic::Code;

use crate::{
    members::{Cluster, Member, PATIENCE},
    run,
};

/// Changes the newest key's value in the store of a member that does not run.
fn change_newest_row(member: &Member) {
    let dir = StoreDir::open(&member.data_dir()).expect("nobody has it");
    let store = dir.open_current(&Options::default()).expect("a store");
    let mut rows = Vec::new();
    let mut visit = |key: &[u8], value| {
        rows.push((key.to_vec(), value));
        true
    };
    store.scan(Bucket::Key, &[], &[], &mut visit).expect("rows");
    let (key, value) = rows.pop().expect("a row");
    let mut row = KeyValue::decode(value).expect("a row");
    row.value = format!("wrong on {}", member.name).into();
    let mut batch = WriteBatch::default();
    batch.put(Bucket::Key, key, row.encode_to_vec());
    store.commit(batch).expect("a commit");
    store.sync().expect("a sync");
}

async fn change_at_rest(cluster: &mut Cluster, which: usize) {
    cluster.members[which].terminate().await;
    change_newest_row(&cluster.members[which]);
    cluster.restart(which);
}

async fn compact(cluster: &Cluster, by: usize, revision: i64) {
    let compaction = CompactionRequest { revision, physical: true };
    cluster.members[by].client().kv.compact(compaction).await.expect("a compaction");
}

async fn until_alarm(cluster: &Cluster, member: u64) {
    let deadline = Instant::now() + PATIENCE;
    let wanted = format!("memberID:{member} alarm:CORRUPT");
    loop {
        let leader = cluster.until_led().await;
        let status = cluster.members[leader].client().maintenance.status(StatusRequest {}).await;
        if status.is_ok_and(|status| status.into_inner().errors.contains(&wanted)) {
            return;
        }
        assert!(Instant::now() < deadline, "nobody says {wanted}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn changed_data_raise_the_alarm_and_stop_writes() {
    // limits 12, M-11 to M-13
    run(|| async {
        let mut cluster =
            Cluster::start(3, &["--corrupt-check-time=1s", "--feature-gates=InitialCorruptCheck=true"]).await;
        let put = PutRequest { key: "k".into(), value: "right".into(), ..Default::default() };
        let leader = cluster.until_led().await;
        cluster.members[leader].client().kv.put(put.clone()).await.expect("a put");
        cluster.until_equal().await;
        // While it is stopped, so that it has nothing in memory.
        let victim = (leader + 1) % 3;
        cluster.members[victim].terminate().await;
        change_newest_row(&cluster.members[victim]);
        // The gate finds it before it serves.
        cluster.restart(victim);
        cluster.members[victim].until_ended().await;
        // Without it, the leader's next look does.
        cluster.members[victim].drop_flag("--feature-gates=InitialCorruptCheck=true");
        cluster.restart(victim);
        until_alarm(&cluster, cluster.members[victim].id).await;
        let leader = cluster.until_led().await;
        let mut kv = cluster.members[leader].client().kv;
        let refused = kv.put(put).await.expect_err("no writes any more");
        assert_eq!((refused.code(), refused.message()), (Code::DataLoss, "etcdserver: corrupt cluster"));
        kv.range(RangeRequest { key: "k".into(), ..Default::default() }).await.expect("reads go on");
        assert!(crate::common::http_get(cluster.members[leader].client_port, "/health").is_none(), "it is not healthy");
        assert!(crate::common::http_get(cluster.members[leader].client_port, "/readyz").is_none(), "nor ready");
    });
}

const CHECK_COMPACTIONS: [&str; 2] = ["--compact-hash-check-time=1s", "--feature-gates=CompactHashCheck=true"];

#[test]
fn compactions_show_changed_data() {
    // limits 12, M-30, M-31
    run(|| async {
        let mut cluster = Cluster::start(3, &CHECK_COMPACTIONS).await;
        let leader = cluster.until_led().await;
        let put = PutRequest { key: "k".into(), value: "right".into(), ..Default::default() };
        cluster.members[leader].client().kv.put(put.clone()).await.expect("a put");
        compact(&cluster, leader, 2).await;
        // All have the same to say, and keep saying it.
        let mut said = Vec::new();
        for member in &cluster.members {
            let deadline = Instant::now() + PATIENCE;
            let hash = loop {
                let mut maintenance = member.client().maintenance;
                let hash = maintenance.hash_kv(HashKvRequest { revision: 2 }).await.expect("a hash").into_inner();
                // Others than the one asked compact a little later.
                if hash.compact_revision == -1 {
                    break hash;
                }
                assert!(Instant::now() < deadline, "{} keeps no hash: {hash:?}", member.name);
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            said.push((hash.hash, hash.compact_revision, hash.hash_revision));
        }
        assert!(said.iter().all(|hash| *hash == said[0]), "{said:?}");

        cluster.members[leader].client().kv.put(put).await.expect("a put");
        cluster.until_equal().await;
        let victim = (leader + 1) % 3;
        change_at_rest(&mut cluster, victim).await;
        let leader = cluster.until_led().await;
        compact(&cluster, leader, 3).await;
        until_alarm(&cluster, cluster.members[victim].id).await;
    });
}

#[test]
fn compactions_of_three_kinds_of_data_blame_nobody() {
    // limits 12, M-31
    run(|| async {
        let mut cluster = Cluster::start(3, &CHECK_COMPACTIONS).await;
        let leader = cluster.until_led().await;
        let put = PutRequest { key: "k".into(), value: "right".into(), ..Default::default() };
        cluster.members[leader].client().kv.put(put).await.expect("a put");
        cluster.until_equal().await;
        change_at_rest(&mut cluster, (leader + 1) % 3).await;
        cluster.until_led().await;
        change_at_rest(&mut cluster, (leader + 2) % 3).await;
        let leader = cluster.until_led().await;
        compact(&cluster, leader, 2).await;
        until_alarm(&cluster, 0).await;
    });
}
