//! Power loss: the log's files are cut back to what their last sync covered, the store loses unsynced batches, and then
//! the member starts again. Nothing acknowledged is lost, of history neither, which has each revision once and in order
//! (D-1, D-5, D-6, H-2, KV-9).
//!
//! The shipped cores and the shipped log writer, driven by hand over a disk that notes what was synced: kill -9 alone says
//! nothing about fsync, because the system keeps what a process wrote.
//!
//! Environment: `POWER_LOSS_ROUNDS` (60), `POWER_LOSS_SEED` (1).

use std::{
    collections::{BTreeMap, VecDeque},
    env,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use actd::{
    actor::Gate,
    apply::{self, Reply, Response, Ticket},
    cluster::bootstrap::InitialCluster,
    mvcc::{KeyRange, range, replay},
    pb::etcdserverpb::{InternalRaftRequest, Metadata, PutRequest, RangeRequest, RequestHeader},
    raft::{self, Append, Committed, Output, Proposal},
    storage::{Storage, mem::MemStorage},
    wal::{
        Options, Wal,
        disk::{Disk, RealDisk},
        sim::RecordingDisk,
    },
};
use prost::Message;
use rand::{RngExt, SeedableRng, rngs::StdRng};

const MEMBER: &str = "m=http://127.0.0.1:1";

struct Member {
    wal: Wal,
    raft: raft::Core,
    apply: apply::Core,
    output: Output,
    /// Log writes raft has asked for and the writer has not taken yet.
    appends: VecDeque<Append>,
    /// Written without a sync, so raft has not been told.
    number: u64,
    committed: VecDeque<Committed>,
    /// Proposed and not answered, in order.
    asked: VecDeque<(String, String)>,
}

struct World {
    rng: StdRng,
    disk: Arc<RecordingDisk>,
    storage: Arc<MemStorage>,
    acknowledged: BTreeMap<String, String>,
    /// Every acknowledged put: revision → key and value.
    history: BTreeMap<i64, (String, String)>,
    /// Asked for by a life of the member that ended: may be there or not.
    unknown: BTreeMap<String, Vec<String>>,
    sequence: u64,
    acknowledgements: u64,
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

fn options(world: &World, dir: &Path) -> Options {
    let mut options = Options::new(dir.join("wal"));
    options.disk = world.disk.clone();
    // Small segments, so that cuts happen between the crashes.
    options.segment_bytes = 16 << 10;
    options
}

fn start(world: &World, dir: &Path) -> Member {
    let founding = InitialCluster::parse(MEMBER, |url| Ok(url.to_owned())).expect("a cluster").found("token");
    let id = founding.member_id("m").expect("the member");
    let disk: Arc<dyn Disk> = world.disk.clone();
    if !Wal::exists(&*disk, &dir.join("wal")).expect("a look at the folder") {
        let metadata = Metadata { node_id: Some(id), cluster_id: Some(founding.cluster_id) };
        let wal = Wal::create(options(world, dir), &metadata, &founding.entries(), Some(&founding.hard_state()));
        wal.expect("a new log").close().expect("it closes");
    }
    let (wal, found) = Wal::open(options(world, dir)).expect("the log opens after power loss");
    let storage: Arc<dyn Storage> = world.storage.clone();
    let settings = apply::Settings {
        member_id: id,
        release: actd::cluster::Version::new(3, 7, 1),
        min_lease_ttl: 2,
        max_learners: 1,
        persist_lease_checkpoints: false,
        quota_bytes: None,
    };
    let apply = apply::Core::open(storage, settings).expect("the store opens");
    let last = found.entries.last().and_then(|e| e.index).unwrap_or(0).max(found.snapshot.index.unwrap_or(0));
    assert!(apply.applied_index() <= last, "the store is ahead of its log: an entry was applied before it was durable");
    let recovered = raft::Recovered {
        compacted: (found.snapshot.index.unwrap_or(0), found.snapshot.term.unwrap_or(0)),
        entries: found.entries,
        hard_state: found.hard_state,
        conf_state: apply.members().conf_state(),
        applied: apply.applied_index(),
    };
    let options = raft::Options {
        id,
        election_ticks: 10,
        heartbeat_ticks: 1,
        pre_vote: true,
        apply_lag_max: 5_000,
        revoke_lag_max: 5_000,
        catch_up_entries: 10,
        seed: 1,
        catch_up_bytes: 1 << 20,
    };
    let mut raft = raft::Core::new(options, recovered).expect("raft takes the log");
    raft.campaign_alone();
    Member {
        wal,
        raft,
        apply,
        output: Output::default(),
        appends: VecDeque::new(),
        number: 0,
        committed: VecDeque::new(),
        asked: VecDeque::new(),
    }
}

impl Member {
    fn poll(&mut self) {
        self.raft.poll(self.apply.applied_index(), actd::raft::Room::EVERYWHERE, &mut self.output);
        self.appends.extend(self.output.appends.drain(..));
        self.committed.extend(self.output.committed.drain(..));
        self.output.messages.clear();
        assert!(self.output.answers.is_empty(), "raft refuses nothing here: {:?}", self.output.answers);
    }

    fn propose(&mut self, world: &mut World, gate: &Gate) {
        world.sequence += 1;
        let key = format!("k{}", world.rng.random_range(0..8));
        let value = format!("{}-{}", world.sequence, "x".repeat(world.rng.random_range(0..600)));
        let put = PutRequest { key: key.clone().into(), value: value.clone().into(), ..Default::default() };
        let header = Some(RequestHeader { id: world.sequence, ..Default::default() });
        let request = InternalRaftRequest { header, put: Some(put), ..Default::default() };
        let data = request.encode_to_vec().into();
        let permit = gate.try_enter(1).expect("room");
        let (reply, _) = Reply::new(0);
        let deadline = Instant::now() + Duration::from_secs(600);
        self.raft.propose(Proposal {
            data,
            conf_change: false,
            id: world.sequence,
            as_leader_of: None,
            ticket: Ticket { request: Box::new(request), reply, deadline, permit },
        });
        self.asked.push_back((key, value));
        self.poll();
    }

    /// The log writer takes some of what is queued, as one write and one sync.
    fn write(&mut self, take: usize) {
        let mut entries = Vec::new();
        let (mut hard_state, mut sync) = (None, false);
        for append in self.appends.drain(..take.min(self.appends.len())) {
            entries.extend(append.entries);
            hard_state = append.hard_state.or(hard_state);
            sync |= append.sync;
            self.number = append.number;
        }
        self.wal.append(&entries, hard_state.as_ref(), sync).expect("the log is written");
    }

    fn persisted(&mut self) {
        self.raft.persisted(self.number, &mut self.output);
        self.poll();
    }

    /// The applier takes some of what is committed, as one batch, and answers.
    fn apply(&mut self, world: &mut World, take: usize) {
        for entry in self.committed.drain(..take.min(self.committed.len())) {
            self.apply.apply(entry);
        }
        let Some(effects) = self.apply.commit().expect("the store is written") else { return };
        for (_, outcome) in &effects.answers {
            let Ok(Response::Put(put)) = outcome else { panic!("a put succeeds: {outcome:?}") };
            let (key, value) = self.asked.pop_front().expect("answers come in the order of the questions");
            world.unknown.remove(&key);
            let revision = put.header.as_ref().expect("a header").revision;
            world.acknowledged.insert(key.clone(), value.clone());
            world.history.insert(revision, (key, value));
            world.acknowledgements += 1;
        }
        if let Some(done) = effects.conf_changed {
            self.raft.conf_changed(done, &mut self.output);
            self.poll();
        }
    }

    fn checkpoint(&mut self, world: &World) {
        let synced = self.apply.applied_index();
        world.storage.sync().expect("the store syncs");
        if let Some(record) = self.raft.checkpoint(synced) {
            let index = record.index.expect("an index");
            self.wal.append_snapshot(&record).expect("the record is written");
            self.wal.purge(index, 1).expect("old segments go");
            self.raft.compact(index);
        }
    }

    /// Until nothing is left to do.
    fn settle(&mut self, world: &mut World) {
        self.poll();
        while !self.appends.is_empty() || !self.committed.is_empty() {
            self.write(usize::MAX);
            self.persisted();
            self.apply(world, usize::MAX);
        }
    }
}

fn check(world: &World, member: &Member) {
    let view = member.apply.view();
    for (key, value) in &world.acknowledged {
        let request = RangeRequest { key: key.clone().into(), ..Default::default() };
        let found = range::range(&view.kv, &*world.storage, &request).expect("a read").kvs;
        let now = found.first().map(|kv| kv.decode_record().expect("a record").value);
        let now = now.map(|v| String::from_utf8(v.to_vec()).expect("UTF-8")).unwrap_or_default();
        let maybe = world.unknown.get(key).is_some_and(|values| values.contains(&now));
        assert!(now == *value || maybe, "{key}: {value:.12} was acknowledged, {now:.12} is there");
    }
    // As a watch from the beginning reads it.
    let all = replay::Limit { changes: usize::MAX, bytes: usize::MAX };
    let found = replay::changes(&view.kv, &*world.storage, KeyRange::ALL, 1, view.kv.revision, all).expect("history");
    let revisions: Vec<i64> = found.changes.iter().map(|change| change.revision.main).collect();
    assert_eq!(revisions, (2..=view.kv.revision).collect::<Vec<_>>(), "each revision once, in order (KV-9)");
    for (revision, (key, value)) in &world.history {
        let change = usize::try_from(revision - 2).ok().and_then(|at| found.changes.get(at));
        let change = change.unwrap_or_else(|| panic!("{key} was acknowledged at {revision} and is not in the history"));
        let record = change.kv.decode_record().expect("a record");
        let is_same = (&record.key[..], &record.value[..]) == (key.as_bytes(), value.as_bytes());
        assert!(is_same, "{key} = {value:.12} was acknowledged at {revision}, {record:?} is there");
    }
}

#[test]
fn nothing_acknowledged_is_lost_when_unsynced_bytes_are() {
    let rounds = number("POWER_LOSS_ROUNDS", 60);
    let seed = number("POWER_LOSS_SEED", 1);
    println!("seed {seed}");
    let folder = tempfile::tempdir().expect("a folder");
    let gate = Gate::new("proposals", 100_000, 1 << 30);
    let mut world = World {
        rng: StdRng::seed_from_u64(seed),
        disk: Arc::new(RecordingDisk::new(Arc::new(RealDisk))),
        storage: Arc::new(MemStorage::new()),
        acknowledged: BTreeMap::new(),
        history: BTreeMap::new(),
        unknown: BTreeMap::new(),
        sequence: 0,
        acknowledgements: 0,
    };
    let mut lost_batches = 0;
    for _ in 0..rounds {
        let mut member = start(&world, folder.path());
        member.settle(&mut world);
        check(&world, &member);
        // Each step of the pipeline by itself, so that the crash finds it between any two.
        for _ in 0..world.rng.random_range(20..200) {
            let some = world.rng.random_range(1..6);
            match world.rng.random_range(0..12) {
                0..6 => member.propose(&mut world, &gate),
                6 | 7 => member.write(some),
                8 => member.persisted(),
                9 | 10 => member.apply(&mut world, some),
                _ if world.rng.random_bool(0.3) => member.checkpoint(&world),
                _ => {}
            }
        }
        for (key, value) in member.asked.drain(..) {
            world.unknown.entry(key).or_default().push(value);
        }
        drop(member);
        world.disk.cut_to_synced().expect("the files are cut");
        let unsynced = world.storage.unsynced_batches();
        let keep = world.rng.random_range(0..=unsynced);
        lost_batches += unsynced - keep;
        world.storage.crash(keep);
    }
    println!(
        "{rounds} power losses, {} acknowledged, {lost_batches} batches of the store lost",
        world.acknowledgements
    );
    assert!(world.acknowledgements > rounds * 5 && lost_batches > 0, "too little happened to mean anything");
}
