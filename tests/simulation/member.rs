//! One member: its disk and its store, which survive, and its process, which does not. Built from the actors that the
//! server runs, each with its own lanes, and moved by the scheduler in `world.rs` instead of threads.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    path::Path,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use actd::{
    actor::{
        Actor, Gate, Inbox, Sender, Turn,
        shell::{Flow, Stepped},
    },
    apply::{self, ApplyActor, ApplySender, Deliveries, Outcome, Replies, ViewCell, Work},
    cluster::Members,
    lease::{
        Expirer,
        actor::{Ask, Control as LeaseControl, LeaseActor, Proposer, Renewed},
    },
    mvcc::{
        hash::{CompactionJob, scan_kv},
        view::Sizes,
    },
    pb::{
        etcdserverpb::{LeaseCheckpoint, Metadata},
        raftpb,
    },
    raft::{self, Append, Install, RaftActor, RaftSender, Reading, Recovered},
    server,
    sim::{self, Bug},
    snapshot::{
        self, Checkpointer,
        export::Export,
        import::{self, Expected},
    },
    storage::{self, Bucket, MemStorage, Snapshot, Storage, StoreInUse, WriteBatch},
    telemetry::Metrics,
    wal::{self, Wal, sim::SimDisk},
    watch::{self, Ends, Hub, HubConfig, StoreHistory, StreamId},
};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::{
    faults::REMOVED,
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
            let kept = if power { keep(unsynced) } else { unsynced };
            if kept < unsynced {
                sim::mark("a power loss took what a store had not synced");
            }
            store.crash(kept);
        }
    }

    pub fn current(&self) -> Option<&MemStorage> {
        self.complete.get(&self.current?)
    }

    /// As `import::settle`: the newest snapshot record decides; what is left over goes.
    fn settle(&mut self, begin: u64) -> Result<MemStorage, String> {
        if begin > 0 && self.current.is_none() {
            return Err("the store is gone".to_owned());
        }
        if self.current.is_some_and(|current| current != begin) && self.complete.contains_key(&begin) {
            sim::mark("an interrupted installation is completed at start");
            self.current = Some(begin);
        }
        let current = *self.current.get_or_insert(0);
        let store = self.complete.entry(current).or_default().clone();
        self.complete.retain(|name, _| *name == current);
        self.building = None;
        Ok(store)
    }

    /// As `import::prepare`, in two steps: a store is built beside the one in use, then it is synced and complete.
    pub fn build(&mut self, file: Bytes, expected: &Expected) -> Result<(), String> {
        let store = MemStorage::new();
        self.building = Some(store.clone());
        import::fill(Box::new(file), &store, Some(expected)).map(drop).map_err(|e| {
            self.building = None;
            e.to_string()
        })
    }

    pub fn complete(&mut self, index: u64) {
        let store = self.building.take().expect("it was built");
        store.sync().expect("memory fails only when told to");
        assert!(self.current != Some(index), "the store in use is not replaced");
        self.complete.insert(index, store);
    }

    /// As `import::discard`.
    pub fn discard(&mut self, index: u64) {
        assert!(self.current != Some(index), "the store in use is not deleted");
        self.complete.remove(&index);
    }
}

/// What others count on as long as a log holds it: its last entry, the term and its vote in it. And where a start begins.
#[derive(Clone, Copy, PartialEq)]
pub struct Held {
    pub begin: u64,
    pub last: u64,
    state: (u64, u64),
}

impl Held {
    fn of(found: &wal::Recovered) -> Self {
        let begin = found.snapshot.index();
        let last = found.entries.last().map_or(begin, raftpb::Entry::index);
        Self { begin, last, state: (found.hard_state.term(), found.hard_state.vote()) }
    }
}

/// Why a member with a damaged log is replaced without a start.
pub const TOOK_BACK: &str = "its disk took back what was synced";

pub struct Member {
    pub id: u64,
    pub disk: SimDisk,
    stores: Arc<Mutex<Stores>>,
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
    /// Unix milliseconds of its clock at time 0, and whether it was set since the last start.
    pub clock_ms: u64,
    pub is_clock_set: bool,
    /// Somebody asks it to defragment once there is something to do.
    pub defragments_later: bool,
    /// The leader of this term told it to stand.
    pub told_to_lead: Option<u64>,
    /// Why it does not start any more, and must be replaced.
    pub lost: Option<String>,
    /// Who takes its place.
    pub replaced_by: Option<usize>,
    /// Its data was damaged on purpose, so it may refuse to start.
    pub may_refuse: bool,
    /// A bit of its log was flipped since it ran last.
    pub is_flipped: bool,
    /// Its store fails at the next write or sync.
    pub is_store_broken: bool,
    /// What a tick takes by its clock, in hundredths.
    pub skew: u64,
    /// What its log held before it was damaged.
    pub had_synced: Option<Held>,
    /// It begins as part of a running cluster.
    pub joins: bool,
    pub restart_at: Option<u64>,
}

impl Member {
    pub fn new(id: u64, joins: bool) -> Self {
        Self {
            id,
            disk: SimDisk::default(),
            stores: Arc::default(),
            process: None,
            epoch: 0,
            paused_until: 0,
            slow: (0, 0),
            slow_apply: (0, 0),
            full_until: 0,
            clock_ms: 1_800_000_000_000,
            is_clock_set: false,
            defragments_later: false,
            told_to_lead: None,
            lost: None,
            replaced_by: None,
            may_refuse: false,
            is_flipped: false,
            is_store_broken: false,
            skew: 100,
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

    /// What a start would find in the log of a member that is down.
    pub fn held(&self, config: &Config) -> Option<Held> {
        let (log, found) = Wal::open(self.wal_options(config)).ok()?;
        log.close().ok()?;
        Some(Held::of(&found))
    }

    pub fn stores(&self) -> MutexGuard<'_, Stores> {
        self.stores.lock().expect("no holder of this lock panics")
    }

    /// As the server opens its data: the first log if there is none, log and store checked against each other. If the others
    /// hold what its log may have lost it may start without.
    pub fn start(
        &mut self,
        config: &Config,
        first: &[raftpb::Entry],
        now: u64,
        instant: Instant,
        others_hold: bool,
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
        let store = self.stores().settle(begin)?;

        let in_use = Arc::new(StoreInUse::new(Rows::new(store.clone(), store)));
        let settings = apply::Settings {
            member_id: self.id,
            min_lease_ttl: MIN_TTL,
            max_learners: 2,
            persist_lease_checkpoints: config.checkpoints,
            quota_bytes: None,
            release: "3.7.0".parse().expect("a version"),
        };
        let core = apply::Core::open(in_use.clone(), settings.clone()).map_err(|e| e.to_string())?;
        server::fit(&found, core.applied_index()).map_err(|e| e.to_string())?;
        // No log can notice that its disk took back what it had promised, unless the store knows of it. As long as others hold
        // the entries its vote elects nobody wrong, and it is for the leader to notice. If not, or if its own vote is lost,
        // what becomes of a cluster is not promised, so whoever runs it is taken to know his disk.
        let holds = Held::of(&found);
        if let Some(held) = self.had_synced.take() {
            let has_lost = holds.last < held.last;
            if holds.state != held.state || has_lost && !others_hold {
                return Err(TOOK_BACK.to_owned());
            }
            if has_lost {
                sim::mark("a member starts with a log that lost its end");
            }
        }
        if core.members().is_removed(self.id) {
            return Err(REMOVED.to_owned());
        }
        let applied_index = core.applied_index();
        let recovered_entries = found.entries.clone();
        let recovered = Recovered {
            compacted: (begin, found.snapshot.term()),
            entries: found.entries,
            hard_state: found.hard_state,
            conf_state: core.members().conf_state(),
            applied: applied_index,
        };
        let options = raft::Options {
            id: self.id,
            election_ticks: ELECTION_TICKS,
            heartbeat_ticks: 1,
            pre_vote: config.pre_vote,
            apply_lag_max: 5_000,
            revoke_lag_max: 5_000,
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

        // Wired as `server.rs` does it.
        let applied = Arc::new(AtomicU64::new(applied_index));
        let status = Arc::new(raft::Status::new(Duration::from_micros(TICK)));
        let is_removed = Arc::new(AtomicBool::new(false));
        let (replies, mut deliveries) = Replies::new(1);
        let (raft_tx, raft_rx) = Inbox::new("raft", 100_000, 1 << 30);
        let (wal_tx, wal) = Inbox::new("wal", 64, 64 << 20);
        let (apply_tx, apply_rx) = Inbox::new("apply", config.apply_queue, 64 << 20);
        let (lease_tx, lease_rx) = Inbox::new("leases", 10_000, usize::MAX);
        let (checkpoint_tx, checkpoint_rx) = Inbox::new("checkpointer", 1, usize::MAX);
        let (send, outgoing) = mpsc::channel();
        let (jobs, hash_jobs) = mpsc::channel();
        let (asked, lease_asks) = mpsc::channel();
        let (wakes, apply_wakes) = mpsc::channel();
        let (port, _, ends) = watch::connect(config.stream_budget, config.hub_queue);
        let raft_wiring = raft::Wiring {
            wal: wal_tx,
            apply: apply_tx.clone(),
            send: Box::new(move |messages| drop(send.send(messages))),
            replies: replies.clone(),
            status: status.clone(),
            applied: applied.clone(),
        };
        let apply_wiring = apply::Wiring {
            raft: raft_tx.clone(),
            replies,
            view: view.clone(),
            applied: applied.clone(),
            hubs: vec![port],
            lease_notices: Box::new({
                let leases = lease_tx.clone();
                move |notices| {
                    leases.control(LeaseControl::Notices(notices));
                }
            }),
            ask_alarm: Box::new(|| {}),
            metrics: metrics(),
            install: Box::new({
                let (stores, in_use, settings) = (self.stores.clone(), in_use.clone(), settings.clone());
                move |taken| install(taken, &stores, &in_use, &settings)
            }),
            hash: Box::new(move |job| drop(jobs.send(job))),
            slow_apply: Duration::ZERO,
            clean_up: apply::CleanUp {
                keys: config.clean,
                pause: Duration::from_micros(config.clean_pause),
                wake_after: Box::new(move |pause| _ = wakes.send(pause.as_micros() as u64)),
            },
            on_members: Box::new({
                let (id, is_removed) = (self.id, is_removed.clone());
                move |members| is_removed.store(members.is_removed(id), Ordering::Relaxed)
            }),
        };
        let checkpoint_wiring = snapshot::Wiring {
            storage: in_use.clone(),
            raft: raft_tx.clone(),
            applied: applied.clone(),
            entries_between: config.snapshot_count,
            metrics: metrics(),
        };
        let next_deadline = Arc::new(AtomicU64::new(u64::MAX));
        let newest = view.clone();
        // Far more often than the server does it: leases of the simulation live for seconds.
        let checkpoint_interval = config.checkpoints.then_some(300 + seed % 8 * 100);
        let expirer = Expirer::new(ELECTION / MS, REQUEST_TIMEOUT / MS, checkpoint_interval);
        let leases: Box<dyn Fn() -> _> = Box::new(move || newest.load().leases.clone());
        let lease_actor = LeaseActor::new(expirer, Proposals(asked), leases, next_deadline.clone(), instant);
        let seen = Rc::new(RefCell::new(Vec::new()));
        let observed = Observed {
            actor: ApplyActor::new(core, apply_wiring),
            batch: config.batch,
            in_batch: 0,
            view: view.clone(),
            in_use: in_use.clone(),
            seen: seen.clone(),
            defragments: Vec::new(),
        };
        raft_tx.control(raft::Control::Tick);
        self.epoch += 1;
        Ok(Box::new(Process {
            id: self.id,
            raft: Due::new(Stepped::new(raft_rx, RaftActor::new(raft, raft_wiring))),
            apply: Due::new(Stepped::new(apply_rx, observed)),
            leases: Due::new(Stepped::new(lease_rx, lease_actor)),
            checkpointer: Due::new(Stepped::new(checkpoint_rx, Checkpointer::new(checkpoint_wiring))),
            raft_tx,
            apply_tx,
            lease_tx,
            checkpoint_tx,
            deliveries: deliveries.remove(0),
            outgoing,
            hash_jobs,
            lease_asks,
            apply_wakes,
            seen,
            status,
            view: view.clone(),
            applied,
            is_removed,
            writer: wal::Writer::new(log, config.segments_kept, Arc::new(|_| {})),
            wal,
            in_hand: Vec::new(),
            recovered: recovered_entries,
            history: StoreHistory::new(view, in_use.clone()),
            hub: Hub::new(hub_config, seed),
            ends,
            skipped_seen: 0,
            in_use,
            proposals: Gate::new("proposals", 10_000, 64 << 20),
            reads: Gate::new("reads", 20_000, 64 << 20),
            messages: Gate::new("messages", 8_192, 64 << 20),
            request_counter: (self.clock_ms + now / MS) << 8,
            led: None,
            started: instant,
            next_deadline,
            revocations: Vec::new(),
            confirmed_pauses: 0,
            waiters: Vec::new(),
            readers: Vec::new(),
            renewals: Vec::new(),
            hub_due: None,
            streams: BTreeMap::new(),
            incoming: VecDeque::new(),
            receiving: None,
            defragments: Vec::new(),
        }))
    }

    /// The database of this moment, as it goes to another member.
    pub fn export(&self) -> (Bytes, Expected) {
        let stores = self.stores();
        let store = stores.current().expect("a member that sends has a store");
        let export = Export::take(store).expect("memory is read");
        let layout = export.measure(&mut || true).expect("memory is read");
        let mut file = Vec::new();
        let sent = export.send(&layout, &mut |chunk| {
            file.extend_from_slice(&chunk);
            Ok(())
        });
        sent.expect("memory is written");
        let expected = Expected {
            index: export.index(),
            term: export.term(),
            conf_state: export.members().conf_state(),
            checksum: Some(layout.checksum),
        };
        (file.into(), expected)
    }
}

fn metrics() -> Metrics {
    static ONE: OnceLock<Metrics> = OnceLock::new();
    ONE.get_or_init(|| Metrics::new(false)).clone()
}

/// As the server installs: `CURRENT`, then the state.
fn install(
    install: Install,
    stores: &Mutex<Stores>,
    in_use: &Arc<StoreInUse<Rows>>,
    settings: &apply::Settings,
) -> anyhow::Result<apply::Core> {
    let mut stores = stores.lock().expect("no holder of this lock panics");
    let old = stores.current().expect("there is a store in use").clone();
    stores.current = Some(install.index);
    let new = stores.current().expect("the store was prepared before the record").clone();
    let write = if sim::has(Bug::InstallKeepsOldStore) { old } else { new.clone() };
    let rows = Arc::new(Rows::new(new, write));
    let mut core = apply::Core::open(rows.clone(), settings.clone())?;
    anyhow::ensure!(core.applied_index() == install.index, "the store is of another index");
    in_use.replace(rows);
    core.use_storage(in_use.clone());
    stores.complete.retain(|name, _| *name == install.index);
    Ok(core)
}

/// What the lease expirer wants in the log.
pub enum LeaseAsk {
    Revoke { id: i64, term: u64 },
    Checkpoint { checkpoints: Vec<LeaseCheckpoint>, term: u64 },
}

pub struct Proposals(mpsc::Sender<LeaseAsk>);

impl Proposer for Proposals {
    fn revoke(&mut self, id: i64, term: u64) {
        let _ = self.0.send(LeaseAsk::Revoke { id, term });
    }

    fn checkpoint(&mut self, checkpoints: Vec<LeaseCheckpoint>, term: u64) {
        let _ = self.0.send(LeaseAsk::Checkpoint { checkpoints, term });
    }
}

/// What a member has applied, and its state at some places.
pub enum Seen {
    Entry { index: u64, term: u64, data: Bytes, conf_change: bool },
    State { index: u64, hash: u64, members: Members },
}

/// The applier, looked at over its shoulder.
pub struct Observed {
    actor: ApplyActor,
    /// Entries after which a batch ends.
    batch: usize,
    in_batch: usize,
    view: ViewCell,
    in_use: Arc<StoreInUse<Rows>>,
    seen: Rc<RefCell<Vec<Seen>>>,
    defragments: Vec<Defragment>,
}

/// Somebody waits until no row is left that a compaction has condemned.
struct Defragment {
    done: oneshot::Receiver<()>,
    answer: oneshot::Sender<()>,
    /// There were such rows when he asked.
    has_to_wait: bool,
}

impl Observed {
    /// What is told must be true at that moment: later entries may condemn more in the same turn.
    fn look_at_defragments(&mut self) {
        let mut at = 0;
        while at < self.defragments.len() {
            if self.defragments[at].done.try_recv().is_err() {
                at += 1;
                continue;
            }
            let Defragment { answer, has_to_wait, .. } = self.defragments.swap_remove(at);
            let view = self.view.load();
            let is_done = !is_cleaning(&view) && view.kv.sizes.total == rows_size(&*self.in_use);
            assert!(is_done, "a defragmentation is answered, and condemned rows are left");
            if has_to_wait {
                sim::mark("a defragmentation waited for clean-up");
            }
            let _ = answer.send(());
        }
    }
}

/// Whether rows that a compaction has condemned are still there.
fn is_cleaning(view: &apply::View) -> bool {
    let at = view.kv.compact_revision;
    at > 0 && !view.kv.index.condemned(at, at).is_empty()
}

/// What the rows of keys count, as they stand.
pub fn rows_size(rows: &dyn Storage) -> u64 {
    let mut sum = Sizes::EMPTY.total;
    let mut visit = |key: &[u8], value: Bytes| {
        sum += (key.len() + value.len()) as u64 + Sizes::ROW_OVERHEAD;
        true
    };
    rows.scan(Bucket::Key, &[], &[], &mut visit).expect("memory is read");
    sum
}

impl Actor for Observed {
    type Message = Work;
    type Control = apply::Control;

    fn on_message(&mut self, work: Work, turn: &Turn) {
        for entry in work.entries {
            let (index, term, conf_change) = (entry.index, entry.term, entry.conf_change);
            self.seen.borrow_mut().push(Seen::Entry { index, term, data: entry.data.clone(), conf_change });
            self.actor.on_message(Work { entries: vec![entry] }, turn);
            self.in_batch += 1;
            // Compared with the other members at these places, so a batch ends there.
            let is_place = index % 16 == 0 || conf_change;
            if is_place || self.in_batch >= self.batch {
                self.on_turn_end(turn);
            }
            let view = self.view.load_full();
            if is_place && view.applied_index == index {
                let (hash, members) = (state_hash(&view, &*self.in_use), view.members.clone());
                self.seen.borrow_mut().push(Seen::State { index, hash, members });
            }
        }
    }

    fn on_control(&mut self, mut message: apply::Control, turn: &Turn) -> Flow {
        if let apply::Control::Defragment(answer) = message {
            let (ask, done) = oneshot::channel();
            let has_to_wait = is_cleaning(&self.view.load());
            self.defragments.push(Defragment { done, answer, has_to_wait });
            message = apply::Control::Defragment(ask);
        }
        self.actor.on_control(message, turn)
    }

    fn on_turn_end(&mut self, turn: &Turn) {
        self.in_batch = 0;
        self.actor.on_turn_end(turn);
        self.look_at_defragments();
    }

    fn has_work(&self) -> bool {
        self.actor.has_work()
    }
}

/// Everything that members must have in common.
pub fn state_hash(view: &apply::View, rows: &dyn Storage) -> u64 {
    let hash = scan_kv(&view.kv, rows, 0).expect("the newest view can be hashed");
    let mut hash_all = u64::from(hash.hash) ^ (hash.compact_revision as u64) << 40 ^ (hash.hash_revision as u64) << 20;
    let mut add = |word: u64| hash_all = (hash_all ^ word).wrapping_mul(0x0000_0100_0000_01b3);
    for (id, ttl, remaining) in view.leases.iter() {
        [id as u64, ttl as u64, remaining as u64].into_iter().for_each(&mut add);
    }
    for member in view.members.iter() {
        [member.id, u64::from(member.is_learner)].into_iter().for_each(&mut add);
    }
    view.members.removed().for_each(&mut add);
    hash_all
}

/// An actor, and whether its turn is on its way.
pub struct Due<A: Actor> {
    pub stepped: Stepped<A>,
    pub is_scheduled: bool,
}

impl<A: Actor> Due<A> {
    fn new(stepped: Stepped<A>) -> Self {
        Self { stepped, is_scheduled: false }
    }

    /// True if a turn must be put on its way.
    pub fn wants_turn(&mut self) -> bool {
        !self.is_scheduled && self.stepped.is_due() && {
            self.is_scheduled = true;
            true
        }
    }

    pub fn turn(&mut self, now: Instant) -> Flow {
        self.is_scheduled = false;
        self.stepped.turn(now)
    }
}

/// A write for the log's writer.
pub enum Job {
    Append(Append),
    Snapshot(actd::pb::walpb::Snapshot),
}

/// Somebody who waits for an answer of this process.
pub struct Waiter {
    pub answer: oneshot::Receiver<Outcome>,
    pub op: OpId,
}

/// How far a keepalive has come, as `api/lease.rs` goes through it.
pub struct Renewal {
    pub op: OpId,
    pub deadline: u64,
    pub step: Renewing,
}

pub enum Renewing {
    /// It begins, again perhaps, at this time.
    At(u64),
    /// What is committed must be applied, for some time at most.
    Applies {
        commit: u64,
        until: u64,
    },
    Asked {
        answer: oneshot::Receiver<Renewed>,
        is_applied: bool,
    },
    /// The term it leads in, the pauses so far.
    Confirms {
        answer: oneshot::Receiver<Outcome>,
        term: u64,
        pauses: Option<u64>,
        renewed: Renewed,
        is_applied: bool,
    },
    /// A round says that this must be applied.
    Reads {
        index: u64,
        term: u64,
        pauses: Option<u64>,
        renewed: Renewed,
        is_applied: bool,
    },
    Clears {
        answer: oneshot::Receiver<Outcome>,
        ttl: i64,
    },
}

/// A database on its way to the store in use.
pub struct Receiving {
    /// Who sends it, if he still hears.
    pub from: Option<(usize, u64)>,
    pub index: u64,
    /// A store is made of it.
    pub is_news: bool,
    /// Asked raft for its answer.
    pub taken: Option<oneshot::Receiver<bool>>,
    /// Raft goes on from it.
    pub is_taken: bool,
    /// Asked raft with it once its store is complete.
    pub message: Option<raftpb::Message>,
}

/// What arrived: from whom, in which life of his, and the database.
pub struct Arrived {
    pub from: Option<(usize, u64)>,
    pub message: raftpb::Message,
    pub file: Bytes,
    pub expected: Expected,
    /// It broke off.
    pub is_cut: bool,
    /// A bit of it flipped.
    pub is_flipped: bool,
}

pub struct Process {
    pub id: u64,
    pub raft: Due<RaftActor>,
    pub apply: Due<Observed>,
    pub leases: Due<LeaseActor<Proposals>>,
    pub checkpointer: Due<Checkpointer>,
    pub raft_tx: RaftSender,
    pub apply_tx: ApplySender,
    pub lease_tx: Sender<Ask, LeaseControl>,
    pub checkpoint_tx: Sender<snapshot::Tick, ()>,
    pub deliveries: Deliveries,
    pub outgoing: mpsc::Receiver<Vec<raftpb::Message>>,
    pub hash_jobs: mpsc::Receiver<CompactionJob>,
    pub lease_asks: mpsc::Receiver<LeaseAsk>,
    /// Clean-up goes on after so long.
    pub apply_wakes: mpsc::Receiver<u64>,
    pub seen: Rc<RefCell<Vec<Seen>>>,
    pub status: Arc<raft::Status>,
    pub view: ViewCell,
    pub applied: Arc<AtomicU64>,
    pub is_removed: Arc<AtomicBool>,
    pub writer: wal::Writer,
    pub wal: Inbox<Append, wal::Control>,
    /// What the disk works on.
    pub in_hand: Vec<Job>,
    /// What was in the log at its start.
    pub recovered: Vec<raftpb::Entry>,
    pub in_use: Arc<StoreInUse<Rows>>,
    pub proposals: Gate,
    pub reads: Gate,
    pub messages: Gate,
    pub request_counter: u64,
    /// The term it leads in, and whether the expirer has been told.
    pub led: Option<(u64, bool)>,
    pub started: Instant,
    pub next_deadline: Arc<AtomicU64>,
    /// Revocations the expirer has asked for.
    pub revocations: Vec<(i64, oneshot::Receiver<Outcome>)>,
    /// After so many pauses its leadership was confirmed (L-11).
    pub confirmed_pauses: u64,
    pub waiters: Vec<Waiter>,
    /// Linearizable reads that wait for an index.
    pub readers: Vec<(u64, OpId)>,
    pub renewals: Vec<Renewal>,
    pub hub: Hub,
    pub history: StoreHistory,
    pub ends: Ends,
    pub skipped_seen: u64,
    /// When the hub works next.
    pub hub_due: Option<u64>,
    /// Whose stream it is.
    pub streams: BTreeMap<StreamId, usize>,
    /// Databases that came in.
    pub incoming: VecDeque<Arrived>,
    pub receiving: Option<Receiving>,
    /// Who waits until clean-up is done.
    pub defragments: Vec<oneshot::Receiver<()>>,
}

impl Process {
    /// Rows that a compaction has condemned are still there.
    pub fn is_cleaning(&self) -> bool {
        is_cleaning(&self.view.load())
    }

    pub fn next_id(&mut self) -> u64 {
        self.request_counter += 1;
        self.id << 48 | self.request_counter & ((1 << 48) - 1)
    }

    pub fn reading(&self) -> Reading {
        self.status.read()
    }

    pub fn applied(&self) -> u64 {
        self.applied.load(Ordering::Relaxed)
    }

    /// What raft has in force.
    pub fn raft_conf_state(&self) -> raftpb::ConfState {
        self.raft.stepped.core().core().conf_state()
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
