//! One member of ours beside two of etcd: it begins with them, or joins, leads, sends them its state, and hands leadership
//! back.

use std::time::{Duration, Instant};

use actd::pb::etcdserverpb::{LeaseGrantRequest, LeaseKeepAliveRequest, MoveLeaderRequest, PutRequest, RangeRequest};

use crate::{
    SHORT_LOG, STEP, WRITERS, common,
    load::Load,
    members::{Cluster, PATIENCE},
    run,
};

async fn put(cluster: &Cluster, at: usize, key: &str, value: &str) {
    let mut kv = cluster.members[at].client().kv;
    let request = PutRequest { key: key.to_owned().into(), value: value.to_owned().into(), ..Default::default() };
    let deadline = Instant::now() + PATIENCE;
    while let Err(e) = kv.put(request.clone()).await {
        assert!(Instant::now() < deadline, "{key} cannot be put at {at}: {e}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn everybody_serves(cluster: &Cluster, value: &str) {
    for at in 0..3 {
        let key = format!("by-{at}");
        put(cluster, at, &key, value).await;
        for reader in 0..3 {
            let mut kv = cluster.members[reader].client().kv;
            let range = RangeRequest { key: key.clone().into(), ..Default::default() };
            let found = kv.range(range).await.expect("a linearizable read").into_inner().kvs;
            let row: actd::mvcc::record::KeyValue = prost::Message::decode(found[0].0.clone()).expect("a row");
            assert_eq!(row.value, value, "put at {at}, read at {reader}");
        }
    }
    let mut lease = cluster.members[0].client().lease;
    let id = lease.lease_grant(LeaseGrantRequest { ttl: 60, id: 0 }).await.expect("a lease").into_inner().id;
    for at in 0..3 {
        let mut lease = cluster.members[at].client().lease;
        let (sender, requests) = tokio::sync::mpsc::channel(1);
        sender.send(LeaseKeepAliveRequest { id }).await.expect("room");
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let mut answers = lease.lease_keep_alive(requests).await.expect("a stream").into_inner();
        assert_eq!(answers.message().await.expect("an answer").map(|answer| answer.ttl), Some(60), "renewed at {at}");
    }
    cluster.until_equal().await;
}

async fn lead(cluster: &Cluster, to: usize) {
    let leader = cluster.until_led().await;
    let target_id = cluster.members[to].id;
    cluster.members[leader].client().maintenance.move_leader(MoveLeaderRequest { target_id }).await.expect("it moves");
    assert_eq!(cluster.until_led().await, to);
}

#[test]
fn actd_is_a_member_among_etcds() {
    let Some(etcd) = common::require_tool("etcd") else { return };
    run(|| async {
        let mut cluster = Cluster::start_of(etcd, 2, &["--snapshot-count=50"]).await;
        for i in 0..100 {
            put(&cluster, i % 2, &format!("early-{i}"), "x").await;
        }
        cluster.program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
        cluster.flags = SHORT_LOG.map(str::to_owned).to_vec();
        let ours = cluster.add(0, false).await;
        cluster.until_equal().await;
        everybody_serves(&cluster, "followed").await;
        lead(&cluster, ours).await;
        everybody_serves(&cluster, "led").await;
        // One of them falls behind and gets our state as a database file.
        cluster.members[1].kill();
        // Long enough for our log to be cut, which hangs on the background syncs of the store.
        let (began, mut i) = (Instant::now(), 0);
        while i < 300 || began.elapsed() < Duration::from_secs(3) {
            put(&cluster, ours, &format!("late-{i}"), "y").await;
            i += 1;
        }
        cluster.restart(1);
        cluster.until_equal().await;
        let metrics = common::http_get(cluster.members[ours].client_port, "/metrics").expect("metrics");
        let sent = metrics.lines().filter(|line| line.starts_with("etcd_network_snapshot_send_success{"));
        let sent: u64 = sent.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        assert!(sent > 0, "it came back by the log alone");
        lead(&cluster, 0).await;
        everybody_serves(&cluster, "followed again").await;
        // They start again on what our leader wrote into their logs.
        for at in [0, 1] {
            cluster.members[at].kill();
            cluster.restart(at);
            cluster.until_led().await;
        }
        everybody_serves(&cluster, "restarted").await;
    });
}

#[test]
fn actd_and_etcds_found_a_cluster() {
    // While no version is decided, they tell each other theirs: 3.4 ends at entries it does not know.
    let Some(etcd) = common::require_tool("etcd") else { return };
    let ours = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
    run(|| async {
        for ours_at in 0..3 {
            let mut programs = [etcd.clone(), etcd.clone(), etcd.clone()];
            programs[ours_at].clone_from(&ours);
            let mut cluster = Cluster::start_of_each(&programs, &[]).await;
            let deadline = Instant::now() + PATIENCE;
            loop {
                let told = common::http_get(cluster.members[ours_at].client_port, "/version").unwrap_or_default();
                // Below 3.6 nobody tells a storage version (C-36).
                if told.contains(r#""etcdcluster":"3.4.0","storage":"unknown""#) {
                    break;
                }
                assert!(Instant::now() < deadline, "no version is decided: {told}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            everybody_serves(&cluster, "founded").await;
            lead(&cluster, ours_at).await;
            everybody_serves(&cluster, "led").await;
            // Renewals count where they are made, at the leader.
            let metrics = common::http_get(cluster.members[ours_at].client_port, "/metrics").expect("metrics");
            let renewed = metrics.lines().find_map(|line| line.strip_prefix("etcd_debugging_lease_renewed_total "));
            let renewed: f64 = renewed.and_then(|n| n.parse().ok()).expect("a number");
            assert!(renewed >= 3.0, "{renewed}");
            // Their logs have what we wrote before anything was decided.
            for at in (0..3).filter(|at| *at != ours_at) {
                cluster.members[at].kill();
                cluster.restart(at);
                cluster.until_led().await;
            }
            everybody_serves(&cluster, "restarted").await;
        }
    });
}

/// More than etcd keeps behind a snapshot of its log.
const PAST_THE_LOG: usize = 6_000;

async fn write_past_the_log(cluster: &Cluster, leader: usize) {
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..40 {
        let mut kv = cluster.members[leader].client().kv;
        tasks.spawn(async move {
            for i in 0..PAST_THE_LOG / 40 {
                let key = format!("before/{writer}/{i}");
                let put = PutRequest { key: key.into(), value: "x".into(), ..Default::default() };
                kv.put(put).await.expect("a put");
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("a writer");
    }
}

#[test]
fn etcds_are_replaced_one_by_one_under_load() {
    let Some(etcd) = common::require_tool("etcd") else { return };
    run(|| async {
        let mut cluster = Cluster::start_of(etcd, 3, &["--snapshot-count=50"]).await;
        let leader = cluster.until_led().await;
        write_past_the_log(&cluster, leader).await;
        cluster.program = common::server_under_test(env!("CARGO_BIN_EXE_actd"));
        cluster.flags = SHORT_LOG.map(str::to_owned).to_vec();
        let load = Load::start_without_bookmarks(&cluster, WRITERS, 13);
        for round in 0..3 {
            load.progress(STEP).await;
            let leader = cluster.until_led().await;
            let ours = cluster.add(leader, true).await;
            cluster.promote(leader, ours, None).await;
            load.use_members(&cluster);
            load.progress(STEP).await;
            let log = cluster.members[ours].log();
            println!("{ours}: snapshots taken in: {}", log.matches("received a database snapshot").count());
            // etcd's log goes back no further.
            assert!(round > 0 || log.contains("received a database snapshot"), "it came up by the log alone");
            // The oldest goes; if it leads, it hands over first.
            if cluster.until_led().await == 0 {
                lead(&cluster, ours).await;
                load.progress(STEP).await;
            }
            // By whom has been there longest: files of etcd 3.5.1 leave out what members say of themselves, so that for who
            // came up by one they have not started.
            cluster.remove(1, 0).await;
            load.use_members(&cluster);
        }
        load.progress(2 * STEP).await;
        println!("{:?}", load.finish(&cluster).await);
        everybody_serves(&cluster, "alone").await;
    });
}
