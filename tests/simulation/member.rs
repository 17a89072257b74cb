//! One member: its disk and its store, which survive, and its process, which does not. Built from the cores that the
//! server runs; what the server's shells do around them is done here and in `world.rs`.

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use actd::{
    actor::Gate,
    apply::{self, Outcome, ViewCell},
    cluster::Members,
    lease::Expirer,
    pb::{etcdserverpb::Metadata, raftpb},
    raft::{self, Install, Output, Recovered},
    server,
    sim::{self, Bug},
    snapshot::{
        export::Export,
        import::{self, Expected},
    },
    storage::{self, Bucket, MemStorage, Snapshot, Storage, StoreInUse, WriteBatch},
    wal::{self, Wal, sim::SimDisk},
    watch::{Hub, HubConfig, Published, StoreHistory, StreamId},
};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::{
    plan::{Config, ELECTION, ELECTION_TICKS, MS, REQUEST_TIMEOUT, TICK},
    world::OpId,
};

pub const CLUSTER_ID: u64 = 0xc1;
pub const MIN_TTL: i64 = 2;
const WAL_DIR: &str = "/member/wal";

/// The stores of one member, as their directory has them. `CURRENT` is replaced durably.
#[derive(Default)]
pub struct Stores {
    complete: BTreeMap<u64, MemStorage>,
    building: Option<MemStorage>,
    current: Option<u64>,
}

impl Stores {
    /// What a crash leaves: of each store what was synced and some of the batches since, in their order.
    pub fn crash(&mut self, power: bool, mut keep: impl FnMut(usize) -> usize) {
        for store in self.complete.values().chain(&self.building) {
            let unsynced = store.unsynced_batches();
            store.crash(if power { keep(unsynced) } else { unsynced });
        }
    }

    pub fn current(&self) -> Option<&MemStorage> {
        self.complete.get(&self.current?)
    }
}

pub struct Member {
    pub id: u64,
    pub disk: SimDisk,
    pub stores: Stores,
    pub process: Option<Box<Process>>,
    /// Counts starts: events of an earlier process mean nothing to a later one.
    pub epoch: u64,
    /// The process stands still until then.
    pub paused_until: u64,
    /// Each write takes this much longer until then.
    pub slow: (u64, u64),
    /// Each turn of the applier, too.
    pub slow_apply: (u64, u64),
    pub full_until: u64,
    /// Unix milliseconds of its clock at time 0.
    pub clock_ms: u64,
    /// Why it does not start any more, and must be replaced.
    pub lost: Option<String>,
    /// Its data was damaged on purpose, so it may refuse to start.
    pub may_refuse: bool,
    /// Its log lost what it had synced, up to this index.
    pub had_synced: Option<u64>,
    /// It begins as part of a running cluster.
    pub joins: bool,
    pub restart_at: Option<u64>,
}

impl Member {
    pub fn new(id: u64, joins: bool) -> Self {
        Self {
            id,
            disk: SimDisk::default(),
            stores: Stores::default(),
            process: None,
            epoch: 0,
            paused_until: 0,
            slow: (0, 0),
            slow_apply: (0, 0),
            full_until: 0,
            clock_ms: 1_800_000_000_000,
            lost: None,
            may_refuse: false,
            had_synced: None,
            joins,
            restart_at: None,
        }
    }

    fn wal_options(&self, config: &Config) -> wal::Options {
        let mut options = wal::Options::new(WAL_DIR);
        options.segment_bytes = config.segment_bytes;
        options.disk = Arc::new(self.disk.clone());
        options
    }

    /// As the server opens its data: the first log if there is none, log and store checked against each other.
    pub fn start(
        &mut self,
        config: &Config,
        first: &[raftpb::Entry],
        now: u64,
        seed: u64,
    ) -> Result<Box<Process>, String> {
        let options = self.wal_options(config);
        if !Wal::exists(&self.disk, Path::new(WAL_DIR)).map_err(|e| e.to_string())? {
            let metadata = Metadata { node_id: Some(self.id), cluster_id: Some(CLUSTER_ID) };
            let commit = Some(first.len() as u64);
            let state = (!self.joins).then_some(raftpb::HardState { term: Some(1), vote: Some(0), commit });
            let entries = if self.joins { &[] } else { first };
            let log = Wal::create(options.clone(), &metadata, entries, state.as_ref());
            log.and_then(Wal::close).map_err(|e| e.to_string())?;
        }
        let (log, found) = Wal::open(options).map_err(|e| e.to_string())?;
        let begin = found.snapshot.index();
        let stores = &mut self.stores;
        if begin > 0 && stores.current.is_none() {
            return Err("the store is gone".to_owned());
        }
        // `import::settle`: the newest snapshot record decides.
        if stores.current.is_some_and(|current| current != begin) && stores.complete.contains_key(&begin) {
            sim::mark("an interrupted installation is completed at start");
            stores.current = Some(begin);
        }
        let current = *stores.current.get_or_insert(0);
        let store = stores.complete.entry(current).or_default().clone();
        stores.complete.retain(|name, _| *name == current);
        stores.building = None;

        let in_use = Arc::new(StoreInUse::new(Rows::new(store.clone(), store)));
        let settings = apply::Settings {
            member_id: self.id,
            min_lease_ttl: MIN_TTL,
            max_learners: 2,
            persist_lease_checkpoints: false,
            quota_bytes: None,
            release: "3.7.0".parse().expect("a version"),
        };
        let core = apply::Core::open(in_use.clone(), settings.clone()).map_err(|e| e.to_string())?;
        server::fit(&found, core.applied_index()).map_err(|e| e.to_string())?;
        // No log can notice that its disk took back what it had promised, unless the store knows of it. What becomes of a
        // cluster then is not promised, so whoever runs it is taken to know his disk.
        let last = found.entries.last().map_or(found.snapshot.index(), raftpb::Entry::index);
        if self.had_synced.take().is_some_and(|synced| last < synced) {
            return Err("its disk took back what was synced".to_owned());
        }
        if core.members().is_removed(self.id) {
            return Err("removed".to_owned());
        }
        let applied = core.applied_index();
        let recovered = Recovered {
            compacted: (begin, found.snapshot.term()),
            entries: found.entries,
            hard_state: found.hard_state,
            conf_state: core.members().conf_state(),
            applied,
        };
        let options = raft::Options {
            id: self.id,
            election_ticks: ELECTION_TICKS,
            heartbeat_ticks: 1,
            pre_vote: config.pre_vote,
            apply_lag_max: 5_000,
            catch_up_entries: config.catch_up_entries,
            catch_up_bytes: 64 << 10,
            seed: (self.clock_ms + now / MS) << 8 ^ self.id << 48 ^ seed,
        };
        let raft = raft::Core::new(options, recovered)?;
        let view = ViewCell::new(core.view());
        let hub_config = HubConfig {
            cluster_id: CLUSTER_ID,
            member_id: self.id,
            progress_interval_ms: config.progress_ms,
            stream_budget_bytes: config.stream_budget,
            catch_up_bytes: 500,
            ..HubConfig::default()
        };
        self.epoch += 1;
        Ok(Box::new(Process {
            raft,
            output: Output::default(),
            writer: wal::Writer::new(log, config.segments_kept, Arc::new(|_| {})),
            wal_queue: VecDeque::new(),
            in_hand: Vec::new(),
            history: StoreHistory::new(view.clone(), in_use.clone()),
            hub: Hub::new(hub_config, seed),
            view,
            in_use,
            settings,
            core,
            applied,
            installs: VecDeque::new(),
            work: VecDeque::new(),
            is_applying: false,
            synced: 0,
            checkpointed: applied,
            gate: Gate::new("proposals", 10_000, 64 << 20),
            request_counter: (self.clock_ms + now / MS) << 8,
            expirer: Expirer::new(ELECTION / MS, REQUEST_TIMEOUT / MS, false),
            lease_term: None,
            revocations: Vec::new(),
            status: raft::Status::new(Duration::from_micros(TICK)),
            confirmed_pauses: 0,
            waiters: Vec::new(),
            readers: Vec::new(),
            renewals: Vec::new(),
            published: VecDeque::new(),
            skipped: false,
            is_hub_awake: false,
            streams: BTreeMap::new(),
            incoming: VecDeque::new(),
            is_receiving: false,
        }))
    }

    /// As `import::prepare`: a complete, synced store beside the one in use.
    pub fn prepare(&mut self, file: Bytes, expected: &Expected) -> Result<(), String> {
        let store = MemStorage::new();
        self.stores.building = Some(store.clone());
        import::fill(Box::new(file), &store, Some(expected)).map_err(|e| e.to_string())?;
        store.sync().map_err(|e| e.to_string())?;
        self.stores.building = None;
        if self.stores.current != Some(expected.index) {
            self.stores.complete.insert(expected.index, store);
        }
        Ok(())
    }

    /// As the server installs: `CURRENT`, then the state.
    pub fn install(&mut self, install: Install) {
        let process = self.process.as_mut().expect("a process installs");
        let old = self.stores.current().expect("there is a store in use").clone();
        self.stores.current = Some(install.index);
        let new = self.stores.current().expect("the store was prepared before the record").clone();
        let write = if sim::has(Bug::InstallKeepsOldStore) { old } else { new.clone() };
        let rows = Arc::new(Rows::new(new, write));
        let mut core = apply::Core::open(rows.clone(), process.settings.clone()).expect("a prepared store opens");
        assert_eq!(core.applied_index(), install.index, "the store is of another index");
        process.in_use.replace(rows);
        core.use_storage(process.in_use.clone());
        core.follow(&process.core);
        for (reply, outcome) in std::mem::replace(&mut process.core, core).abandon() {
            reply.answer(outcome);
        }
        self.stores.complete.retain(|name, _| *name == install.index);
    }

    /// The database of this moment, as it goes to another member.
    pub fn export(&self) -> (Bytes, Expected) {
        let store = self.stores.current().expect("a member that sends has a store");
        let export = Export::take(store).expect("memory is read");
        let layout = export.measure(&mut || true).expect("memory is read");
        let mut file = Vec::new();
        let sent = export.send(&layout, &mut |chunk| {
            file.extend_from_slice(&chunk);
            Ok(())
        });
        sent.expect("memory is written");
        let expected =
            Expected { index: export.index(), term: export.term(), conf_state: export.members().conf_state() };
        (file.into(), expected)
    }
}

/// A write for the log's writer.
pub enum Job {
    Append(raft::Append),
    Snapshot(actd::pb::walpb::Snapshot),
}

/// Somebody who waits for an answer of this process.
pub struct Waiter {
    pub answer: oneshot::Receiver<Outcome>,
    pub op: OpId,
}

pub struct Renewal {
    pub op: OpId,
    /// Leadership is being confirmed first: the term, the pauses so far, and what will be answered.
    pub confirming: Option<(u64, Option<u64>, i64)>,
    pub deadline: u64,
}

pub struct Process {
    pub raft: raft::Core,
    pub output: Output,
    pub writer: wal::Writer,
    pub wal_queue: VecDeque<Job>,
    /// What the disk works on.
    pub in_hand: Vec<Job>,
    pub core: apply::Core,
    pub settings: apply::Settings,
    pub in_use: Arc<StoreInUse<Rows>>,
    pub view: ViewCell,
    pub applied: u64,
    pub installs: VecDeque<Install>,
    pub work: VecDeque<raft::Committed>,
    pub is_applying: bool,
    pub synced: u64,
    pub checkpointed: u64,
    pub gate: Gate,
    pub request_counter: u64,
    pub expirer: Expirer,
    /// The term the expirer's deadlines belong to.
    pub lease_term: Option<u64>,
    /// Revocations the expirer has proposed.
    pub revocations: Vec<(i64, oneshot::Receiver<Outcome>)>,
    pub status: raft::Status,
    /// After so many pauses its leadership was confirmed (L-11).
    pub confirmed_pauses: u64,
    pub waiters: Vec<Waiter>,
    /// Linearizable reads that wait for an index.
    pub readers: Vec<(u64, OpId)>,
    pub renewals: Vec<Renewal>,
    pub hub: Hub,
    pub history: StoreHistory,
    pub published: VecDeque<Published>,
    pub skipped: bool,
    pub is_hub_awake: bool,
    /// Whose stream it is.
    pub streams: BTreeMap<StreamId, usize>,
    /// Databases that came in.
    pub incoming: VecDeque<(raftpb::Message, Bytes, Expected)>,
    pub is_receiving: bool,
}

impl Process {
    pub fn next_id(&mut self) -> u64 {
        self.request_counter += 1;
        self.settings.member_id << 48 | self.request_counter & ((1 << 48) - 1)
    }

    pub fn members(&self) -> Members {
        self.view.load().members.clone()
    }
}

/// The rows in use. They are read where they are written, unless a seeded bug says otherwise.
pub struct Rows {
    read: MemStorage,
    write: MemStorage,
    misses: AtomicU64,
}

impl Rows {
    fn new(read: MemStorage, write: MemStorage) -> Self {
        Self { read, write, misses: AtomicU64::new(0) }
    }
}

impl Storage for Rows {
    fn get(&self, bucket: Bucket, key: &[u8]) -> Result<Option<Bytes>, storage::Error> {
        let row = self.read.get(bucket, key)?;
        if row.is_none() && bucket == Bucket::Key {
            // Readers ask again when clean-up took a row, with a newer view. That ends.
            let misses = self.misses.fetch_add(1, Ordering::Relaxed);
            assert!(misses < 100_000, "readers ask for ever for rows that are gone");
        }
        Ok(row)
    }

    fn scan(&self, bucket: Bucket, from: &[u8], to: &[u8], visit: storage::Visit<'_>) -> Result<(), storage::Error> {
        self.read.scan(bucket, from, to, visit)
    }

    fn commit(&self, batch: WriteBatch) -> Result<(), storage::Error> {
        self.write.commit(batch)
    }

    fn sync(&self) -> Result<(), storage::Error> {
        self.write.sync()
    }

    fn snapshot(&self) -> Box<dyn Snapshot> {
        self.read.snapshot()
    }

    fn disk_bytes(&self) -> u64 {
        self.read.disk_bytes()
    }
}
