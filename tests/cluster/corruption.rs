//! A member whose data was changed under it is found.

use std::time::Instant;

use actd::{
    mvcc::record::KeyValue,
    pb::etcdserverpb::{PutRequest, RangeRequest, StatusRequest},
    storage::{Bucket, Options, Storage, StoreDir, WriteBatch},
};
use prost::Message;
use tonic::Code;

use crate::{
    members::{Cluster, PATIENCE},
    run,
};

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
        {
            let dir = StoreDir::open(&cluster.members[victim].data_dir()).expect("nobody has it");
            let store = dir.open_current(&Options::default()).expect("a store");
            let mut rows = Vec::new();
            let mut visit = |key: &[u8], value| {
                rows.push((key.to_vec(), value));
                true
            };
            store.scan(Bucket::Key, &[], &[], &mut visit).expect("rows");
            let (key, value) = rows.pop().expect("a row");
            let mut row = KeyValue::decode(value).expect("a row");
            row.value = "wrong".into();
            let mut batch = WriteBatch::default();
            batch.put(Bucket::Key, key, row.encode_to_vec());
            store.commit(batch).expect("a commit");
            store.sync().expect("a sync");
        }
        // The gate finds it before it serves.
        cluster.restart(victim);
        cluster.members[victim].until_ended().await;
        // Without it, the leader's next look does.
        cluster.members[victim].drop_flag("--feature-gates=InitialCorruptCheck=true");
        cluster.restart(victim);
        let deadline = Instant::now() + PATIENCE;
        let wanted = format!("memberID:{} alarm:CORRUPT", cluster.members[victim].id);
        loop {
            let leader = cluster.until_led().await;
            let status = cluster.members[leader].client().maintenance.status(StatusRequest {}).await;
            if status.is_ok_and(|status| status.into_inner().errors.contains(&wanted)) {
                break;
            }
            assert!(Instant::now() < deadline, "nobody says {wanted}");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let leader = cluster.until_led().await;
        let mut kv = cluster.members[leader].client().kv;
        let refused = kv.put(put).await.expect_err("no writes any more");
        assert_eq!((refused.code(), refused.message()), (Code::DataLoss, "etcdserver: corrupt cluster"));
        kv.range(RangeRequest { key: "k".into(), ..Default::default() }).await.expect("reads go on");
        assert!(crate::common::http_get(cluster.members[leader].client_port, "/health").is_none(), "it is not healthy");
        assert!(crate::common::http_get(cluster.members[leader].client_port, "/readyz").is_none(), "nor ready");
    });
}
