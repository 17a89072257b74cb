//! A cluster that has lost its majority begins again from the data of one member.

use std::{collections::BTreeSet, time::Instant};

use actd::pb::etcdserverpb::{HashKvRequest, LeaseGrantRequest, MemberListRequest, PutRequest, RangeRequest};

use crate::{
    SHORT_LOG,
    members::{Cluster, PATIENCE},
    run,
};

const KEYS: i64 = 200;

async fn put(cluster: &Cluster, at: usize, key: String, lease: i64) {
    let request = PutRequest { key: key.into(), value: vec![b'v'; 64].into(), lease, ..Default::default() };
    cluster.members[at].client().kv.put(request).await.expect("a put");
}

async fn count(cluster: &Cluster, at: usize) -> i64 {
    let range = RangeRequest { key: "k".into(), range_end: "l".into(), count_only: true, ..Default::default() };
    cluster.members[at].client().kv.range(range).await.expect("a linearizable read").into_inner().count
}

/// Its cluster's id and members, as one member tells them.
async fn members(cluster: &Cluster, at: usize) -> (u64, BTreeSet<u64>) {
    let mut client = cluster.members[at].client().cluster;
    let list = client.member_list(MemberListRequest { linearizable: true }).await.expect("a list").into_inner();
    (list.header.expect("a header").cluster_id, list.members.iter().map(|member| member.id).collect())
}

async fn hash(cluster: &Cluster, at: usize) -> (i64, u32) {
    let mut client = cluster.members[at].client().maintenance;
    let hash = client.hash_kv(HashKvRequest { revision: 0 }).await.expect("a hash").into_inner();
    (hash.hash_revision, hash.hash)
}

#[test]
fn data_of_one_member_becomes_a_cluster_of_three_again() {
    // limits.md 17
    run(|| async {
        let mut cluster = Cluster::start(3, &SHORT_LOG).await;
        let leader = cluster.until_led().await;
        let mut lease = cluster.members[leader].client().lease;
        let lease = lease.lease_grant(LeaseGrantRequest { ttl: 3_600, id: 0 }).await.expect("a lease").into_inner().id;
        for i in 0..KEYS {
            put(&cluster, leader, format!("k{i}"), if i % 10 == 0 { lease } else { 0 }).await;
        }
        cluster.until_equal().await;
        let ((cluster_id, all), data) = (members(&cluster, 0).await, hash(&cluster, 0).await);
        assert_eq!(all.len(), 3);

        // Two are lost with their disks.
        for member in &mut cluster.members {
            member.kill();
        }
        cluster.members.truncate(1);
        let own = cluster.members[0].id;
        cluster.members[0].add_flag("--force-new-cluster");
        cluster.restart(0);
        assert_eq!(cluster.until_led().await, 0);
        assert_eq!(members(&cluster, 0).await, (cluster_id, BTreeSet::from([own])), "the others' ids are gone");
        assert_eq!(hash(&cluster, 0).await, data);
        assert_eq!(count(&cluster, 0).await, KEYS);
        put(&cluster, 0, "k-forced".to_owned(), lease).await;

        // The flag is for one start.
        cluster.members[0].kill();
        cluster.members[0].drop_flag("--force-new-cluster");
        cluster.restart(0);
        assert_eq!(cluster.until_led().await, 0);
        assert_eq!(members(&cluster, 0).await, (cluster_id, BTreeSet::from([own])));
        assert_eq!(count(&cluster, 0).await, KEYS + 1);

        // New members, by snapshot or log, under new ids.
        for size in [2, 3] {
            let new = cluster.add(0, false).await;
            assert!(!all.contains(&cluster.members[new].id));
            cluster.until_led().await;
            cluster.until_equal().await;
            assert_eq!(members(&cluster, new).await.1.len(), size);
        }
        // L-32: one without the lease would refuse what the others apply.
        for at in 0..3 {
            put(&cluster, at, format!("k-again-{at}"), lease).await;
        }
        cluster.until_equal().await;
        assert_eq!(count(&cluster, 2).await, KEYS + 4);
        // Two of three are enough again.
        cluster.members[0].kill();
        let deadline = Instant::now() + PATIENCE;
        let mut kv = cluster.members[1].client().kv;
        while let Err(e) = kv.put(PutRequest { key: "k-last".into(), ..Default::default() }).await {
            assert!(Instant::now() < deadline, "{e}");
        }
    });
}
