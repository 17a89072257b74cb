//! Lost disks: a cluster that has lost its majority begins again from the data of one member, and a member that has lost
//! what it acknowledged does not come back under its old id.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

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

/// Waits until it has ended with the one line that says why.
async fn ends_for_what_it_lost(cluster: &mut Cluster, at: usize, code: i32) {
    assert_eq!(cluster.members[at].until_ended().await, Some(code));
    let log = cluster.members[at].log();
    assert_eq!(log.lines().filter(|line| line.contains("lost?")).count(), 1, "one line says what happened:\n{log}");
}

#[test]
fn a_wiped_member_elects_nobody_and_serves_under_a_new_id() {
    // D-26
    run(|| async {
        let mut cluster = Cluster::start(3, &[]).await;
        let leader = cluster.until_led().await;
        let (wiped, behind) = ((leader + 1) % 3, (leader + 2) % 3);
        put(&cluster, leader, "k-all".to_owned(), 0).await;
        cluster.until_equal().await;
        cluster.members[behind].kill();
        for i in 0..5 {
            put(&cluster, leader, format!("k{i}"), 0).await;
        }
        // Two of three have them, and one of the two loses them. It need not hear of a leader to know.
        cluster.members[wiped].kill();
        cluster.members[wiped].wipe();
        cluster.restart(wiped);
        ends_for_what_it_lost(&mut cluster, wiped, 1).await;
        cluster.restart(behind);
        let leader = cluster.until_led().await;
        assert_eq!(count(&cluster, leader).await, 6);
        cluster.remove(leader, wiped).await;
        let leader = cluster.until_led().await;
        let new = cluster.add(leader, false).await;
        cluster.until_equal().await;
        assert_eq!(count(&cluster, new).await, 6);
    });
}

#[test]
fn a_member_with_an_older_disk_elects_nobody_without_what_it_acknowledged() {
    run(|| async {
        // Long enough for the one to come back while its leader still leads.
        let mut cluster = Cluster::start(3, &["--election-timeout=3000"]).await;
        let leader = cluster.until_led().await;
        let (lost, behind) = ((leader + 1) % 3, (leader + 2) % 3);
        put(&cluster, leader, "k-all".to_owned(), 0).await;
        cluster.until_equal().await;
        cluster.members[behind].kill();
        cluster.members[lost].kill();
        let (data, image) = (cluster.members[lost].data_dir(), tempfile::tempdir().expect("a temporary folder"));
        let copy = |from: &std::path::Path, to: &std::path::Path| {
            let done = std::process::Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status();
            assert!(done.expect("cp runs").success());
        };
        copy(&data, image.path());
        cluster.restart(lost);
        for i in 0..5 {
            put(&cluster, leader, format!("k{i}"), 0).await;
        }
        // Two of three have them, and one of the two loses them.
        cluster.members[lost].kill();
        std::fs::remove_dir_all(&data).expect("its data is there");
        std::fs::create_dir(&data).expect("a folder");
        copy(image.path(), &data);
        cluster.restart(lost);
        ends_for_what_it_lost(&mut cluster, lost, 2).await;
        // Nobody is left to elect the one that never had them.
        let elections = |cluster: &Cluster| cluster.members[behind].log().matches("starting a new election").count();
        let before = elections(&cluster);
        cluster.members[leader].kill();
        cluster.restart(behind);
        let deadline = Instant::now() + PATIENCE;
        while elections(&cluster) == before {
            assert!(Instant::now() < deadline, "a member that was away stands for no election");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        cluster.restart(leader);
        let leader = cluster.until_led().await;
        assert_eq!(count(&cluster, leader).await, 6);
    });
}
