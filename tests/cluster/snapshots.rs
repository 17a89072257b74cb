//! Snapshots to followers that are far behind, while writes go on: receivers killed at every stage, several at once,
//! a second one on the heels of the first.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use actd::pb::etcdserverpb::{
    HashKvRequest, MoveLeaderRequest, PutRequest, RequestOp, TxnRequest, request_op::Request as OpRequest,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::task::JoinSet;

use crate::{
    members::{Cluster, Member, PATIENCE},
    rounds, run,
};

/// Logs are cut early, and ticks are short: the log is kept for 300 of them for whoever was sent a snapshot.
const FLAGS: [&str; 4] =
    ["--snapshot-count=50", "--snapshot-catchup-entries=20", "--heartbeat-interval=10", "--election-timeout=1000"];
const LOG_KEPT: Duration = Duration::from_millis(300 * 10);
/// Several syncs of the store, each of which may cut the log.
const CUT: Duration = Duration::from_millis(1_500);

/// What makes a snapshot take its time: 4 MB.
async fn fill(cluster: &Cluster) {
    let leader = cluster.until_led().await;
    let mut kv = cluster.members[leader].client().kv;
    for batch in 0..40 {
        let put = |i| {
            let key = format!("fill/{batch}/{i}");
            let put = PutRequest { key: key.into(), value: vec![b'x'; 1_000].into(), ..Default::default() };
            RequestOp { request: Some(OpRequest::RequestPut(put)) }
        };
        let txn = TxnRequest { success: (0..100).map(put).collect(), ..Default::default() };
        kv.txn(txn).await.expect("a transaction");
    }
}

/// Puts that never pause, through whichever member takes them.
struct Writers {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    tasks: JoinSet<()>,
}

impl Writers {
    fn start(cluster: &Cluster) -> Self {
        Self::start_with_pause(cluster, Duration::from_millis(3))
    }

    fn start_with_pause(cluster: &Cluster, pause: Duration) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for writer in 0..4 {
            let clients: Vec<_> = cluster.members.iter().map(Member::client).collect();
            let (stop, written) = (stop.clone(), written.clone());
            tasks.spawn(async move {
                let mut through = 0;
                for i in 0.. {
                    if stop.load(Relaxed) {
                        return;
                    }
                    let key = format!("w{writer}/{}", i % 100);
                    let put = PutRequest { key: key.into(), value: vec![b'y'; 100].into(), ..Default::default() };
                    let mut kv = clients[through].kv.clone();
                    match tokio::time::timeout(Duration::from_secs(1), kv.put(put)).await {
                        Ok(Ok(_)) => _ = written.fetch_add(1, Relaxed),
                        _ => through = (through + 1) % clients.len(),
                    }
                    tokio::time::sleep(pause).await;
                }
            });
        }
        Self { stop, written, tasks }
    }

    /// Until whoever does not hear of it has to be sent a snapshot, for which no log was kept or for so long.
    async fn leave_behind(&self, kept: Duration) {
        let (began, before) = (Instant::now(), self.written.load(Relaxed));
        while began.elapsed() < kept + CUT || self.written.load(Relaxed) < before + 200 {
            assert!(began.elapsed() < PATIENCE, "the writers do not go on");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn rate(&self, since: (Instant, u64)) -> f64 {
        (self.written.load(Relaxed) - since.1) as f64 / since.0.elapsed().as_secs_f64()
    }

    fn mark(&self) -> (Instant, u64) {
        (Instant::now(), self.written.load(Relaxed))
    }

    async fn finish(mut self) {
        self.stop.store(true, Relaxed);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// How far a member's store directory is from one snapshot to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stores {
    current: String,
    complete: Vec<String>,
    building: Vec<String>,
    /// The next CURRENT is being written.
    switching: bool,
}

impl Stores {
    fn of(member: &Member) -> Self {
        let dir = member.data_dir().join("member/store");
        let current = std::fs::read_to_string(dir.join("CURRENT")).expect("CURRENT is always there");
        let names = std::fs::read_dir(&dir).expect("a directory").filter_map(|entry| {
            let entry = entry.ok()?;
            entry.path().is_dir().then(|| entry.file_name().into_string().expect("a name"))
        });
        let (mut building, mut complete): (Vec<_>, Vec<_>) = names.partition(|name| name.ends_with(".new"));
        let current = current.trim().to_owned();
        complete.retain(|name| *name != current);
        building.sort();
        Self { current, complete, building, switching: dir.join("CURRENT.new").exists() }
    }

    /// What a crash left, seen from `before`.
    fn since(&self, before: &str) -> &'static str {
        match (self.current != before, self.complete.is_empty(), self.building.is_empty()) {
            (false, true, true) => "the old store alone",
            (false, true, false) => "the new store unfinished",
            (false, false, _) => "the new store complete, but not in use",
            (true, false, _) => "the new store in use, the old one still there",
            (true, true, _) => "the new store alone",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Receiving,
    Building,
    /// The store is there, the log's record of it perhaps.
    Complete,
    /// The record is in the log, CURRENT is being written.
    Switching,
    Switched,
}

/// Waits until a member that was just started is this far. False: it has caught up without.
async fn reach(member: &mut Member, stage: Stage, log_before: usize, current_before: &str) -> bool {
    let deadline = Instant::now() + PATIENCE;
    for look in 1.. {
        assert!(!member.has_ended(), "{} ended by itself", member.name);
        assert!(Instant::now() < deadline, "{} does not get as far as {stage:?}", member.name);
        let stores = Stores::of(member);
        let is_complete = stores.current == current_before && !stores.complete.is_empty();
        let reached = match stage {
            Stage::Receiving => snapshots_received(member, log_before, "receiving") > 0,
            Stage::Building => !stores.building.is_empty(),
            Stage::Complete => is_complete,
            Stage::Switching => stores.switching || stores.current != current_before,
            Stage::Switched => stores.current != current_before,
        };
        if reached {
            return true;
        }
        if stage == Stage::Switching && is_complete {
            tokio::task::yield_now().await; // a matter of microseconds
            continue;
        }
        // Not by asking it: the question waits until it is ready.
        if look % 32 == 0 && member.log()[log_before..].contains("ready to serve client requests") {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    unreachable!("it looks for ever");
}

fn snapshots_received(member: &Member, log_from: usize, word: &str) -> usize {
    member.log()[log_from..].matches(&format!("{word} a database snapshot")).count()
}

async fn until_it_answers(member: &mut Member) {
    let deadline = Instant::now() + PATIENCE;
    while member.status().await.is_none() {
        assert!(!member.has_ended(), "{} ended by itself", member.name);
        assert!(Instant::now() < deadline, "{} does not come up", member.name);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// All have the same data, although writes go on, and nothing is left of what is over.
async fn until_whole(cluster: &Cluster) {
    let leader = cluster.until_led().await;
    let ask = HashKvRequest { revision: 0 };
    let wanted = cluster.members[leader].client().maintenance.hash_kv(ask).await.expect("a hash").into_inner();
    let deadline = Instant::now() + PATIENCE;
    for member in &cluster.members {
        loop {
            let ask = HashKvRequest { revision: wanted.hash_revision };
            let found = member.client().maintenance.hash_kv(ask).await.map(tonic::Response::into_inner);
            if let Ok(found) = &found {
                assert_eq!((found.hash, found.compact_revision), (wanted.hash, wanted.compact_revision));
            }
            let stores = Stores::of(member);
            if found.is_ok() && stores.complete.is_empty() && stores.building.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "{}: {found:?}, {stores:?}", member.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[test]
fn receiver_killed_at_any_stage_comes_back() {
    // D-26
    run(|| async {
        let mut cluster = Cluster::start(3, &FLAGS).await;
        fill(&cluster).await;
        let writers = Writers::start(&cluster);
        let leader = cluster.until_led().await;
        let follower = (leader + 1) % 3;
        let mut rng = StdRng::seed_from_u64(1);
        let mut left: BTreeMap<&str, usize> = BTreeMap::new();
        let stages = [Stage::Receiving, Stage::Building, Stage::Complete, Stage::Switching, Stage::Switched];
        for round in 0..rounds(1) {
            cluster.members[follower].kill();
            writers.leave_behind(if round == 0 { Duration::ZERO } else { LOG_KEPT }).await;
            // Each start goes on from what the kill before has left.
            for stage in stages {
                let member = &mut cluster.members[follower];
                let (log_before, before) = (member.log().len(), Stores::of(member).current);
                cluster.restart(follower);
                let member = &mut cluster.members[follower];
                let caught_up = !reach(member, stage, log_before, &before).await;
                // In the first round at once, later up to a long time after.
                let within_ms = if round == 0 { 0 } else { [0, 5, 50, 300][rng.random_range(0..4)] };
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..=within_ms))).await;
                member.kill();
                *left.entry(Stores::of(member).since(&before)).or_default() += 1;
                if caught_up {
                    writers.leave_behind(LOG_KEPT).await;
                }
            }
            cluster.restart(follower);
            until_it_answers(&mut cluster.members[follower]).await;
            until_whole(&cluster).await;
        }
        println!("kills left: {left:#?}");
        let log = cluster.members[follower].log();
        println!("completed at a start: {}", log.matches("completing the installation of a snapshot").count());
        writers.finish().await;
        cluster.until_equal().await;
        assert!(left.contains_key("the new store unfinished"), "no kill hit the building: {left:?}");
    });
}

#[test]
fn two_followers_of_five_take_snapshots_at_once() {
    run(|| async {
        let mut cluster = Cluster::start(5, &FLAGS).await;
        fill(&cluster).await;
        let leader = cluster.until_led().await;
        let away = [(leader + 1) % 5, (leader + 2) % 5];
        for i in away {
            cluster.members[i].kill();
        }
        let writers = Writers::start(&cluster);
        let mark = writers.mark();
        writers.leave_behind(Duration::ZERO).await;
        let before = writers.rate(mark);
        let log_before = away.map(|i| cluster.members[i].log().len());
        let mark = writers.mark();
        for i in away {
            cluster.restart(i);
        }
        for i in away {
            until_it_answers(&mut cluster.members[i]).await;
        }
        let (during, took) = (writers.rate(mark), mark.0.elapsed());
        println!("puts a second: {before:.0} before, {during:.0} while two snapshots were sent ({took:?})");
        for (i, log_before) in away.into_iter().zip(log_before) {
            assert!(snapshots_received(&cluster.members[i], log_before, "received") > 0, "by the log alone");
        }
        until_whole(&cluster).await;
        writers.finish().await;
        cluster.until_equal().await;
    });
}

#[test]
fn second_snapshot_may_come_while_the_first_is_taken_in() {
    run(|| async {
        let mut cluster = Cluster::start(3, &FLAGS).await;
        fill(&cluster).await;
        let writers = Writers::start(&cluster);
        let mut counts = Vec::new();
        for round in 0..rounds(1) {
            let leader = cluster.until_led().await;
            let (follower, other) = ((leader + 1) % 3, (leader + 2) % 3);
            cluster.members[follower].kill();
            writers.leave_behind(if round == 0 { Duration::ZERO } else { LOG_KEPT }).await;
            let member = &cluster.members[follower];
            let (log_before, before) = (member.log().len(), Stores::of(member).current);
            cluster.restart(follower);
            let stage = if round % 2 == 0 { Stage::Building } else { Stage::Receiving };
            assert!(reach(&mut cluster.members[follower], stage, log_before, &before).await, "by the log alone");
            // The next leader has kept no log for it.
            let target_id = cluster.members[other].id;
            let mut client = cluster.members[leader].client().maintenance;
            client.move_leader(MoveLeaderRequest { target_id }).await.expect("leadership moves");
            until_it_answers(&mut cluster.members[follower]).await;
            until_whole(&cluster).await;
            counts.push(snapshots_received(&cluster.members[follower], log_before, "received"));
        }
        println!("snapshots received: {counts:?}");
        writers.finish().await;
        cluster.until_equal().await;
    });
}

/// MB of the database in `puts_beside_a_snapshot`: few in CI, `CLUSTER_SNAPSHOT_MB` where somebody wants to know.
fn megabytes() -> usize {
    std::env::var("CLUSTER_SNAPSHOT_MB").map_or(8, |n| n.parse().expect("CLUSTER_SNAPSHOT_MB is a number"))
}

/// What puts cost in some span of time.
struct Span {
    began: (Instant, u64),
    cpu: Vec<Duration>,
}

impl Span {
    fn begin(cluster: &Cluster, writers: &Writers) -> Self {
        Self { began: writers.mark(), cpu: cluster.members.iter().map(Member::cpu_time).collect() }
    }

    fn end(self, what: &str, cluster: &Cluster, writers: &Writers) {
        let (took, puts) = (self.began.0.elapsed(), writers.written.load(Relaxed) - self.began.1);
        let rate = writers.rate(self.began);
        let each =
            cluster.members.iter().zip(self.cpu).map(|(member, before)| member.cpu_time().saturating_sub(before));
        let each: Vec<String> = each
            .map(|cpu| {
                format!(
                    "{:.0} µs ({:.0} %)",
                    cpu.as_secs_f64() * 1e6 / puts as f64,
                    100.0 * cpu.as_secs_f64() / took.as_secs_f64()
                )
            })
            .collect();
        println!("{what}: {rate:.0} puts a second for {took:.1?}; CPU of each member per put: {}", each.join(", "));
    }
}

/// Prints and judges nothing: what a snapshot to one member costs those who write beside it.
#[test]
fn puts_beside_a_snapshot() {
    run(|| async {
        let mut cluster = Cluster::start(3, &FLAGS).await;
        let leader = cluster.until_led().await;
        let mut kv = cluster.members[leader].client().kv;
        for i in 0..megabytes() * 8 {
            // Eight a MB: a transaction of 128 values of 1 kB.
            let put = |j| {
                let key = format!("big/{i}/{j}");
                let put = PutRequest { key: key.into(), value: vec![b'x'; 1_000].into(), ..Default::default() };
                RequestOp { request: Some(OpRequest::RequestPut(put)) }
            };
            kv.txn(TxnRequest { success: (0..128).map(put).collect(), ..Default::default() })
                .await
                .expect("a transaction");
        }
        cluster.until_equal().await;
        let writers = Writers::start_with_pause(&cluster, Duration::ZERO);
        let follower = (leader + 1) % 3;
        println!("{} MB; the leader is member {leader}, the one that gets a snapshot {follower}", megabytes());
        let span = Span::begin(&cluster, &writers);
        tokio::time::sleep(Duration::from_secs(3)).await;
        span.end("all up", &cluster, &writers);

        cluster.members[follower].kill();
        writers.leave_behind(Duration::ZERO).await;
        let (leader_log, log) = (cluster.members[leader].log().len(), cluster.members[follower].log().len());
        cluster.restart(follower);
        let deadline = Instant::now() + PATIENCE;
        let until = async |member: &Member, from: usize, word: &str| {
            while snapshots_received(member, from, word) == 0 {
                assert!(Instant::now() < deadline, "no member is {word} a snapshot");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        until(&cluster.members[leader], leader_log, "sending").await;
        let span = Span::begin(&cluster, &writers);
        until(&cluster.members[follower], log, "received").await;
        span.end("while it is sent", &cluster, &writers);
        until_it_answers(&mut cluster.members[follower]).await;
        let span = Span::begin(&cluster, &writers);
        tokio::time::sleep(Duration::from_secs(3)).await;
        span.end("all up again", &cluster, &writers);
        writers.finish().await;
        cluster.until_equal().await;
    });
}
