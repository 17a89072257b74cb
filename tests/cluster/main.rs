//! Clusters of real processes on loopback, under load and faults. `README.md` beside this file says how to run more of it.

#[path = "../common/mod.rs"]
mod common;
mod corruption;
mod disaster;
mod five;
mod history;
mod load;
mod members;
mod membership;
mod mixed;
mod relay;
mod snapshots;
mod sockets;
mod stopped;

use std::time::{Duration, Instant};

use actd::pb::etcdserverpb::{LeaseGrantRequest, LeaseKeepAliveRequest, MoveLeaderRequest, PutRequest, RangeRequest};
use load::Load;
use members::Cluster;
use relay::Link;

/// Rounds of each kind of fault: few in CI, `CLUSTER_ROUNDS` in a long run.
fn rounds(short: usize) -> usize {
    std::env::var("CLUSTER_ROUNDS").ok().map_or(short, |n| n.parse().expect("CLUSTER_ROUNDS is a number"))
}

/// One test at a time: each starts several servers and load, and waits for elections.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn run<F: Future<Output = ()>>(test: impl FnOnce() -> F) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test());
}

const WRITERS: usize = 4;
/// Calls answered between two faults.
const STEP: usize = 60;
/// Small, so that logs are cut and followers that were away get snapshots.
const SHORT_LOG: [&str; 2] = ["--snapshot-count=50", "--snapshot-catchup-entries=20"];

/// Writes go on within this time after a leader is gone: two election timeouts and a second, with room for a slow box.
const RESUME: Duration = Duration::from_secs(6);

/// Load without a fault: whoever leads when all agree goes on leading. Answers who that is.
async fn calm(cluster: &Cluster, load: &Load, calls: usize) -> usize {
    let agreed = cluster.until_agreed().await;
    load.progress(calls).await;
    assert_eq!(cluster.until_agreed().await, agreed, "another leader or term without a fault");
    agreed.0
}

#[test]
fn killed_leaders_lose_nothing() {
    run(|| async {
        let mut cluster = Cluster::start(3, &[]).await;
        let load = Load::start(&cluster, WRITERS, 1);
        let mut longest = Duration::ZERO;
        for _ in 0..rounds(3) {
            let leader = calm(&cluster, &load, STEP).await;
            load.reset_gap();
            cluster.members[leader].kill();
            load.progress(STEP).await;
            longest = longest.max(load.longest_gap());
            cluster.restart(leader);
        }
        calm(&cluster, &load, STEP).await;
        println!("longest pause of writes after a leader was killed: {longest:?}");
        assert!(longest < RESUME, "writes paused for {longest:?}");
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn killed_followers_disturb_nobody() {
    run(|| async {
        let mut cluster = Cluster::start(3, &SHORT_LOG).await;
        let load = Load::start(&cluster, WRITERS, 2);
        let leader = cluster.until_led().await;
        let term = cluster.term().await;
        for round in 0..rounds(3) {
            let follower = (leader + 1 + round % 2) % 3;
            load.progress(STEP).await;
            cluster.members[follower].kill();
            load.progress(3 * STEP).await;
            cluster.restart(follower);
            load.progress(STEP).await;
        }
        println!("{:?}", load.finish(&cluster).await);
        assert_eq!(cluster.term().await, term, "no election without a fault of the leader");
    });
}

#[test]
fn all_killed_at_once_keep_what_was_acknowledged() {
    run(|| async {
        let mut cluster = Cluster::start(3, &SHORT_LOG).await;
        let load = Load::start(&cluster, WRITERS, 3);
        for _ in 0..rounds(3) {
            load.progress(2 * STEP).await;
            for member in &mut cluster.members {
                member.kill();
            }
            for i in 0..3 {
                cluster.restart(i);
            }
            calm(&cluster, &load, STEP).await;
        }
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn paused_leader_serves_nothing_stale() {
    // L-11, L-18, H-40 among them: the lease holder goes on.
    run(|| async {
        let cluster = Cluster::start(3, &[]).await;
        let load = Load::start(&cluster, WRITERS, 4);
        for _ in 0..rounds(3) {
            let leader = calm(&cluster, &load, STEP).await;
            cluster.members[leader].pause();
            load.progress(STEP).await;
            cluster.members[leader].resume();
        }
        calm(&cluster, &load, STEP).await;
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn partitions_of_every_shape_heal() {
    run(|| async {
        let cluster = Cluster::start(3, &SHORT_LOG).await;
        let ids = cluster.ids();
        let load = Load::start(&cluster, WRITERS, 5);
        for round in 0..rounds(4) {
            let leader = calm(&cluster, &load, STEP).await;
            let term = cluster.term().await;
            let (l, f, g) = (ids[leader], ids[(leader + 1) % 3], ids[(leader + 2) % 3]);
            match round % 4 {
                0 => cluster.network.split(&[l], &[f, g]),
                1 => cluster.network.split(&[f], &[l, g]),
                2 => cluster.network.cut(l, f),
                _ => {
                    cluster.network.cut(f, l);
                    cluster.network.cut(l, g);
                }
            }
            // One-way cuts may leave nobody who can lead; then only healing helps.
            tokio::time::sleep(Duration::from_secs(3)).await;
            cluster.network.heal();
            if matches!(round % 4, 1 | 2) {
                // Whoever hears of no leader asks before it stands, and the others have one.
                assert_eq!(cluster.until_agreed().await, (leader, term), "a follower alone unseats nobody");
            }
        }
        calm(&cluster, &load, STEP).await;
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn cut_follower_passes_nothing_on() {
    // L-10: renewals go to the leader by requests that do not say whose they are.
    run(|| async {
        let cluster = Cluster::start(3, &[]).await;
        let ids = cluster.ids();
        let (leader, _) = cluster.until_agreed().await;
        let follower = (leader + 1) % 3;
        let mut client = cluster.members[follower].client().lease;
        let grant = LeaseGrantRequest { ttl: 60, id: 0 };
        let id = client.lease_grant(grant).await.expect("a lease").into_inner().id;
        let renew = async |within| {
            let mut client = cluster.members[follower].client().lease;
            let (sender, requests) = tokio::sync::mpsc::channel(1);
            sender.send(LeaseKeepAliveRequest { id }).await.expect("room");
            let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
            let answer = async { client.lease_keep_alive(requests).await?.into_inner().message().await };
            matches!(tokio::time::timeout(within, answer).await, Ok(Ok(Some(answer))) if answer.ttl == 60)
        };
        assert!(renew(members::PATIENCE).await);
        cluster.network.split(&[ids[follower]], &[ids[leader], ids[(leader + 2) % 3]]);
        assert!(!renew(Duration::from_millis(700)).await, "a renewal goes through the cut");
        cluster.network.heal();
        cluster.until_agreed().await;
        assert!(renew(members::PATIENCE).await);
    });
}

#[test]
fn minority_of_five_serves_no_linearizable_call() {
    // D-18
    run(|| async {
        let cluster = Cluster::start(5, &[]).await;
        let ids = cluster.ids();
        let load = Load::start(&cluster, WRITERS, 6);
        load.progress(STEP).await;
        let leader = cluster.until_led().await;
        let two: Vec<usize> = vec![leader, (leader + 1) % 5];
        let (inside, outside): (Vec<u64>, Vec<u64>) = ids.iter().partition(|id| two.iter().any(|i| ids[*i] == **id));
        cluster.network.split(&inside, &outside);
        load.progress(STEP).await;
        for i in two {
            let mut kv = cluster.members[i].client().kv;
            let range = RangeRequest { key: "k00".into(), ..Default::default() };
            let read = tokio::time::timeout(Duration::from_secs(3), kv.range(range.clone())).await;
            assert!(!matches!(read, Ok(Ok(_))), "a member of the minority answered {read:?}");
            let put = PutRequest { key: "minority".into(), value: "x".into(), ..Default::default() };
            let put = tokio::time::timeout(Duration::from_secs(1), kv.put(put)).await;
            assert!(!matches!(put, Ok(Ok(_))));
            let range = RangeRequest { serializable: true, ..range };
            kv.range(range).await.expect("a serializable read works");
        }
        cluster.network.heal();
        calm(&cluster, &load, STEP).await;
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn slow_and_lossy_links_only_cost_time() {
    run(|| async {
        let cluster = Cluster::start(3, &[]).await;
        let ids = cluster.ids();
        let load = Load::start(&cluster, WRITERS, 7);
        for round in 0..rounds(2) {
            let agreed = cluster.until_agreed().await;
            for a in &ids {
                for b in ids.iter().filter(|b| *b != a) {
                    let link = match round % 2 {
                        0 => Link { cut: false, delay: Duration::from_millis(30), reset: 0.0 },
                        _ => Link { cut: false, delay: Duration::from_millis(2), reset: 0.02 },
                    };
                    cluster.network.set(*a, *b, link);
                }
            }
            load.progress(2 * STEP).await;
            if round % 2 == 0 {
                assert_eq!(cluster.until_agreed().await, agreed, "slow links unseat nobody");
            }
            cluster.network.heal();
            calm(&cluster, &load, STEP).await;
        }
        println!("{:?}", load.finish(&cluster).await);
    });
}

/// Stops and starts each of `n` members.
async fn roll(n: usize, seed: u64) {
    let mut cluster = Cluster::start(n, &SHORT_LOG).await;
    let load = Load::start(&cluster, WRITERS, seed);
    let mut longest = Duration::ZERO;
    for round in 0..rounds(1) * n {
        let leader = calm(&cluster, &load, STEP).await;
        let term = cluster.term().await;
        // The leader first: that is the hard one.
        let which = if round % n == 0 { leader } else { round % n };
        load.reset_gap();
        cluster.members[which].terminate().await;
        load.progress(STEP).await;
        longest = longest.max(load.longest_gap());
        if which != leader {
            assert_eq!(cluster.term().await, term, "no election without a fault of the leader");
        }
        cluster.restart(which);
    }
    calm(&cluster, &load, STEP).await;
    println!("longest pause of writes when a member was stopped: {longest:?}");
    assert!(longest < Duration::from_secs(5), "writes paused for {longest:?}");
    println!("{:?}", load.finish(&cluster).await);
}

#[test]
fn rolling_restart_hands_leadership_over() {
    // C-44
    run(|| roll(3, 8));
}

#[test]
fn leadership_moves_under_load() {
    // M-38 to M-40
    run(|| async {
        let cluster = Cluster::start(3, &[]).await;
        let load = Load::start(&cluster, WRITERS, 9);
        for _ in 0..rounds(4) {
            let leader = calm(&cluster, &load, STEP).await;
            let term = cluster.term().await;
            let to = (leader + 1) % 3;
            let target_id = cluster.members[to].id;
            let mut client = cluster.members[leader].client().maintenance;
            client.move_leader(MoveLeaderRequest { target_id }).await.expect("leadership moves");
            assert_eq!(cluster.until_agreed().await, (to, term + 1), "one election for one move");
        }
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn members_are_replaced_under_load() {
    // C-7 to C-23
    run(|| async {
        let mut cluster = Cluster::start(3, &SHORT_LOG).await;
        let load = Load::start(&cluster, WRITERS, 10);
        let leader = calm(&cluster, &load, 4 * STEP).await;
        let led = cluster.members[leader].id;
        let term = cluster.term().await;
        // A learner first, as careful operators do.
        let new = cluster.add(leader, true).await;
        // A token goes on to the leader, and without auth means nothing to it.
        cluster.promote(leader, new, Some("abc.1")).await;
        let old = (leader + 1) % 3;
        cluster.remove(leader, old).await;
        load.use_members(&cluster);
        load.progress(2 * STEP).await;
        // And one whose member is dead, by a voter at once.
        let leader = cluster.until_led().await;
        let dead = (leader + 1) % 3;
        cluster.members[dead].kill();
        cluster.remove(leader, dead).await;
        load.use_members(&cluster);
        let leader = cluster.until_led().await;
        cluster.add(leader, false).await;
        load.use_members(&cluster);
        let leader = calm(&cluster, &load, 2 * STEP).await;
        let now = (cluster.members[leader].id, cluster.term().await);
        assert_eq!(now, (led, term), "the leader stayed, and nobody stood against it");
        println!("{:?}", load.finish(&cluster).await);
    });
}

#[test]
fn wiped_follower_comes_back_by_snapshot() {
    // D-26, C-17: under a new id, as its log is gone.
    run(|| async {
        let mut cluster = Cluster::start(3, &SHORT_LOG).await;
        let load = Load::start(&cluster, WRITERS, 11);
        for _ in 0..rounds(1) {
            let leader = calm(&cluster, &load, 5 * STEP).await;
            let (led, term) = (cluster.members[leader].id, cluster.term().await);
            let follower = (leader + 1) % 3;
            cluster.members[follower].kill();
            cluster.remove(leader, follower).await;
            load.use_members(&cluster);
            let leader = cluster.until_led().await;
            load.reset_gap();
            let (began, before) = (Instant::now(), load.acknowledged());
            let new = cluster.add(leader, false).await;
            let deadline = Instant::now() + members::PATIENCE;
            while !cluster.members[new].log().contains("received a database snapshot") {
                assert!(Instant::now() < deadline, "no snapshot comes");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let (meanwhile, gap) = (load.acknowledged() - before, load.longest_gap());
            assert!(meanwhile > 0, "no call was answered while the snapshot was sent");
            load.use_members(&cluster);
            load.progress(STEP).await;
            while cluster.members[new].status().await.is_none() {
                assert!(began.elapsed() < members::PATIENCE);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            println!("a new member answers after {:?}", began.elapsed());
            println!("until it had its snapshot, {meanwhile} calls were answered; longest pause of writes: {gap:?}");
            let metrics = common::http_get(cluster.members[new].client_port, "/metrics").expect("metrics");
            let received = metrics.lines().filter(|line| line.starts_with("etcd_network_snapshot_receive_success{"));
            assert_eq!(received.filter(|line| line.ends_with(" 1")).count(), 1, "one snapshot, of one member");
            let (leader, now) = cluster.until_agreed().await;
            assert_eq!((cluster.members[leader].id, now), (led, term), "nobody stood against the leader");
        }
        println!("{:?}", load.finish(&cluster).await);
    });
}
