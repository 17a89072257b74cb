//! What one seed means: a cluster's settings, its clients, and the faults with their times. Drawn as a whole before the
//! run, so that a run without some of the faults is a run like any other: that is how a failure is made small.
//!
//! Each seed draws which kinds of faults there are at all and how often (swarm testing): a run with few kinds reaches
//! further than one with a bit of everything.

use std::fmt;

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};

pub const MS: u64 = 1_000;
pub const SECOND: u64 = 1_000_000;

/// Length of a raft tick, as by default.
pub const TICK: u64 = 100 * MS;
pub const ELECTION_TICKS: usize = 10;
pub const ELECTION: u64 = ELECTION_TICKS as u64 * TICK;
/// What a late message takes.
pub const LATE: (u64, u64) = (100 * MS, 1_500 * MS);
/// How long a server works on a request.
pub const REQUEST_TIMEOUT: u64 = 5 * SECOND + 2 * ELECTION;

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub config: Config,
    /// In order of time.
    pub faults: Vec<Timed>,
    /// When faults end.
    pub until: u64,
}

#[derive(Clone, Debug)]
pub struct Timed {
    pub at: u64,
    pub fault: Fault,
}

#[derive(Clone, Debug)]
pub struct Config {
    pub members: usize,
    pub clients: usize,
    pub watchers: usize,
    pub keys: usize,
    pub pre_vote: bool,
    /// Entries between two checkpoints, and kept behind one.
    pub snapshot_count: u64,
    pub catch_up_entries: u64,
    pub sync_interval: u64,
    pub segment_bytes: u64,
    pub segments_kept: usize,
    /// Of a message from member to member.
    pub latency: (u64, u64),
    pub loss: f64,
    pub repeat: f64,
    /// Messages that take far longer than others, and what they take.
    pub late: f64,
    /// Of a write with its sync.
    pub disk: (u64, u64),
    /// Of a batch in apply.
    pub apply: (u64, u64),
    /// Entries in one batch of apply, at most.
    pub batch: usize,
    /// Entries that may wait for apply, about.
    pub apply_queue: usize,
    /// Keys looked at in one slice of clean-up, and the time between two slices.
    pub clean: usize,
    pub clean_pause: u64,
    pub snapshot_transfer: (u64, u64),
    pub snapshot_loss: f64,
    /// Watch streams: budget of one, how fast clients take, views a hub may lag, interval of progress reports.
    pub stream_budget: usize,
    pub take: (u64, u64),
    pub hub_queue: usize,
    pub hub_delay: (u64, u64),
    pub progress_ms: u64,
    /// How many of 100 operations are of each kind.
    pub mix: Mix,
    pub think: (u64, u64),
    pub value_bytes: usize,
    /// Of an actor that has something to do: what comes meanwhile is in the same turn.
    pub turn: (u64, u64),
    /// Remaining times of leases are written to the log.
    pub checkpoints: bool,
}

#[derive(Clone, Debug)]
pub struct Mix {
    pub put: u32,
    pub get: u32,
    pub delete: u32,
    pub txn: u32,
    pub compact: u32,
    pub lease: u32,
}

#[derive(Clone, Debug)]
pub enum Fault {
    /// The process is killed; with `power` what was not synced is lost or torn.
    Crash {
        member: usize,
        power: bool,
        down: u64,
    },
    CrashAll {
        power: bool,
        down: u64,
    },
    Pause {
        member: usize,
        for_: u64,
    },
    /// From, to: nothing arrives.
    Cut {
        links: Vec<(usize, usize)>,
        for_: u64,
    },
    Lossy {
        loss: f64,
        for_: u64,
    },
    SlowDisk {
        member: usize,
        each: u64,
        for_: u64,
    },
    SlowApply {
        member: usize,
        each: u64,
        for_: u64,
    },
    /// A write or sync fails.
    DiskError {
        member: usize,
        sync: bool,
    },
    DiskFull {
        member: usize,
        for_: u64,
    },
    /// The power goes, and a bit of the log flips.
    FlipLog {
        member: usize,
        place: u64,
        down: u64,
    },
    /// The power goes, and the log's last sectors are as if they had never been written, though they were synced.
    LoseSyncs {
        member: usize,
        sectors: usize,
        down: u64,
    },
    Transfer {
        to: usize,
    },
    /// The process ends in order: it hands over, and finishes what it has in hand.
    Stop {
        member: usize,
    },
    /// A commit or sync of the store fails.
    StoreError {
        member: usize,
        sync: bool,
    },
    /// Somebody asks to be told when no condemned row is left: now, and while the next clean-up is under way.
    Defragment {
        member: usize,
    },
    AddLearner,
    Promote,
    Remove {
        member: usize,
    },
    /// All other voters leave, one after the other.
    Shrink {
        to: usize,
    },
    /// The process is killed, and starts with a clock that was set forward or back: it seeds request ids.
    Clock {
        member: usize,
        by_ms: i64,
        down: u64,
    },
}

impl Fault {
    /// Members that a plan names are drawn from more than there are at first: those that come later have their share.
    pub fn of(mut self, members: usize) -> Self {
        match &mut self {
            Fault::Crash { member, .. }
            | Fault::Pause { member, .. }
            | Fault::SlowDisk { member, .. }
            | Fault::SlowApply { member, .. }
            | Fault::DiskError { member, .. }
            | Fault::DiskFull { member, .. }
            | Fault::FlipLog { member, .. }
            | Fault::LoseSyncs { member, .. }
            | Fault::Transfer { to: member }
            | Fault::Shrink { to: member }
            | Fault::Stop { member, .. }
            | Fault::StoreError { member, .. }
            | Fault::Defragment { member }
            | Fault::Remove { member }
            | Fault::Clock { member, .. } => *member %= members,
            Fault::CrashAll { .. } | Fault::Cut { .. } | Fault::Lossy { .. } | Fault::AddLearner | Fault::Promote => {}
        }
        self
    }
}

impl fmt::Display for Timed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9.3} s  {:?}", self.at as f64 / SECOND as f64, self.fault)
    }
}

fn span(rng: &mut StdRng, choices: &[(u64, u64)]) -> (u64, u64) {
    *choices.choose(rng).expect("there are choices")
}

impl Plan {
    pub fn new(seed: u64) -> Self {
        Self::with_focus(seed, None)
    }

    /// A plan that goes after one thing, or what the seed says.
    pub fn with_focus(seed: u64, wanted: Option<Focus>) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let rng = &mut rng;
        let members = *[1, 3, 3, 3, 3, 3, 5].choose(rng).expect("there are choices");
        let kind = |rng: &mut StdRng, of_100: u32| if rng.random_bool(0.8) { rng.random_range(1..=of_100) } else { 0 };
        let mix = Mix {
            put: rng.random_range(20..60),
            get: rng.random_range(10..40),
            delete: kind(rng, 20),
            txn: kind(rng, 30),
            compact: kind(rng, 8),
            lease: kind(rng, 25),
        };
        let config = Config {
            members,
            clients: rng.random_range(3..=8),
            watchers: rng.random_range(1..=5),
            keys: rng.random_range(2..=30),
            pre_vote: rng.random_bool(0.8),
            snapshot_count: *[1, 5, 20, 100, 10_000].choose(rng).expect("there are choices"),
            catch_up_entries: *[0, 1, 10, 50].choose(rng).expect("there are choices"),
            sync_interval: rng.random_range(100..1_000) * MS,
            segment_bytes: *[2_000, 8_000, 64_000].choose(rng).expect("there are choices"),
            segments_kept: rng.random_range(1..=5),
            latency: span(rng, &[(100, MS), (MS, 10 * MS), (100, 60 * MS)]),
            loss: *[0.0, 0.0, 0.01, 0.1].choose(rng).expect("there are choices"),
            repeat: *[0.0, 0.0, 0.02, 0.1].choose(rng).expect("there are choices"),
            late: *[0.0, 0.0, 0.02, 0.15].choose(rng).expect("there are choices"),
            disk: span(rng, &[(50, 500), (500, 5 * MS), (100, 40 * MS)]),
            apply: span(rng, &[(10, 100), (100, 3 * MS), (10, 30 * MS)]),
            batch: *[1, 3, 1_000].choose(rng).expect("there are choices"),
            apply_queue: *[1, 20, 10_000].choose(rng).expect("there are choices"),
            clean: *[1, 5, 200].choose(rng).expect("there are choices"),
            clean_pause: *[0, 0, MS, 20 * MS].choose(rng).expect("there are choices"),
            snapshot_transfer: span(rng, &[(MS, 20 * MS), (50 * MS, 800 * MS)]),
            snapshot_loss: *[0.0, 0.0, 0.3].choose(rng).expect("there are choices"),
            stream_budget: *[300, 2_000, 1 << 20].choose(rng).expect("there are choices"),
            take: span(rng, &[(100, MS), (MS, 50 * MS), (20 * MS, 400 * MS)]),
            hub_queue: *[1, 8, 256].choose(rng).expect("there are choices"),
            hub_delay: span(rng, &[(10, 100), (10, 20 * MS)]),
            progress_ms: *[300, 1_000, 600_000].choose(rng).expect("there are choices"),
            mix,
            think: span(rng, &[(MS, 60 * MS), (10 * MS, 150 * MS)]),
            value_bytes: *[4, 30, 400].choose(rng).expect("there are choices"),
            turn: span(rng, &[(0, 2), (5, 50), (10, 3 * MS)]),
            checkpoints: rng.random_bool(0.3),
        };
        let until = rng.random_range(14..18) * SECOND;
        let mut plan = Self { seed, config, faults: Vec::new(), until };
        let drawn = rng.random_range(0..8);
        let focus = wanted.unwrap_or(match drawn {
            0 => Focus::Reads,
            1 => Focus::Snapshots,
            2 => Focus::Leases,
            3 => Focus::Compaction,
            _ => Focus::Nothing,
        });
        focus.set(&mut plan.config);
        plan.faults = faults(rng, plan.config.members, until, focus);
        plan
    }
}

/// Half of the seeds go after one thing, where mistakes have been most frequent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Focus {
    Nothing,
    /// Late answers to read rounds.
    Reads,
    /// Members that lag, and get snapshots again and again.
    Snapshots,
    /// Leaders that stand still while leases run out.
    Leases,
    /// Compactions that crashes interrupt.
    Compaction,
}

impl Focus {
    fn set(self, config: &mut Config) {
        match self {
            Focus::Reads => {
                config.members = 3;
                config.mix = Mix { put: 30, get: 60, delete: 0, txn: 0, compact: 0, lease: 0 };
                (config.late, config.loss, config.latency) = (0.2, 0.02, (MS, 60 * MS));
                config.think = (MS, 20 * MS);
            }
            Focus::Snapshots => {
                config.members = 3;
                (config.snapshot_count, config.catch_up_entries, config.sync_interval) = (1, 0, 100 * MS);
                (config.snapshot_transfer, config.apply_queue, config.batch) = ((MS, 20 * MS), 1, 1);
                config.think = (MS, 30 * MS);
            }
            Focus::Leases => {
                config.members = 3;
                config.mix = Mix { put: 20, get: 5, delete: 0, txn: 0, compact: 0, lease: 75 };
                config.late = 0.0;
            }
            Focus::Compaction => {
                config.mix = Mix { put: 40, get: 20, delete: 20, txn: 10, compact: 20, lease: 0 };
                (config.clean, config.apply, config.keys) = (1, (MS, 20 * MS), 30);
            }
            Focus::Nothing => {}
        }
    }
}

fn faults(rng: &mut StdRng, members: usize, until: u64, focus: Focus) -> Vec<Timed> {
    // Which kinds there are, and their weights.
    let mut weights: Vec<u32> =
        (0..KINDS).map(|_| if rng.random_bool(0.45) { rng.random_range(1..10) } else { 0 }).collect();
    let kinds: &[usize] = match focus {
        Focus::Nothing => &[],
        Focus::Reads => &[PAUSE, CUT, SLOW_DISK, SLOW_APPLY],
        Focus::Snapshots => &[CUT, SLOW_APPLY, CRASH],
        Focus::Leases => &[PAUSE, CUT, TRANSFER],
        Focus::Compaction => &[CRASH, CRASH_ALL],
    };
    if focus != Focus::Nothing {
        weights = (0..KINDS).map(|kind| u32::from(kinds.contains(&kind))).collect();
    }
    let all: u32 = weights.iter().sum();
    let count = rng.random_range(8..=if focus == Focus::Nothing { 14 } else { 20 });
    let mut times: Vec<u64> = (0..count).map(|_| rng.random_range(SECOND..until)).collect();
    times.sort_unstable();
    let faults = times.into_iter().map(|at| {
        let mut draw = rng.random_range(0..all.max(1));
        let kind = weights.iter().position(|weight| {
            let hit = draw < *weight;
            draw = draw.saturating_sub(*weight);
            hit
        });
        let fault = fault(rng, kind.unwrap_or(0), members);
        Timed { at, fault }
    });
    faults.collect()
}

const KINDS: usize = 18;
const CRASH: usize = 0;
const CRASH_ALL: usize = 1;
const PAUSE: usize = 2;
const CUT: usize = 3;
const SLOW_DISK: usize = 5;
const TRANSFER: usize = 10;
const SLOW_APPLY: usize = 15;

fn fault(rng: &mut StdRng, kind: usize, members: usize) -> Fault {
    // Two more than there are at first.
    let member = rng.random_range(0..members + 2);
    let down = rng.random_range(10..3_000) * MS;
    let for_ = rng.random_range(50..4_000) * MS;
    match kind {
        CRASH_ALL => Fault::CrashAll { power: rng.random_bool(0.7), down: down / 3 },
        PAUSE => Fault::Pause { member, for_ },
        // Now and then also those who come later.
        CUT => {
            let count = if rng.random_bool(0.8) { members } else { members + 2 };
            Fault::Cut { links: links(rng, count), for_ }
        }
        4 => Fault::Lossy { loss: rng.random_range(0.1..0.7), for_ },
        SLOW_DISK => Fault::SlowDisk { member, each: rng.random_range(20..2_500) * MS, for_ },
        6 => Fault::DiskError { member, sync: rng.random_bool(0.5) },
        7 => Fault::DiskFull { member, for_ },
        8 if members >= 3 => Fault::FlipLog { member, place: rng.next_u64(), down },
        9 if members >= 3 => Fault::LoseSyncs { member, sectors: rng.random_range(1..=3), down },
        TRANSFER => Fault::Transfer { to: member },
        11 => Fault::Defragment { member },
        12 if rng.random_bool(0.6) => Fault::AddLearner,
        12 => Fault::Promote,
        13 if rng.random_bool(0.7) => Fault::Remove { member },
        13 => Fault::Shrink { to: member },
        SLOW_APPLY => Fault::SlowApply { member, each: rng.random_range(10..600) * MS, for_ },
        16 => Fault::Stop { member },
        17 => Fault::StoreError { member, sync: rng.random_bool(0.3) },
        14 => {
            let most = if rng.random_bool(0.5) { 10_000_000 } else { 20_000 };
            Fault::Clock { member, by_ms: rng.random_range(-most..most), down: down / 10 }
        }
        _ => Fault::Crash { member, power: rng.random_bool(0.7), down },
    }
}

/// Partitions of all shapes: one alone, two sides, a ring with a gap, one way only.
fn links(rng: &mut StdRng, members: usize) -> Vec<(usize, usize)> {
    let pairs = || (0..members).flat_map(move |a| (0..members).map(move |b| (a, b))).filter(|(a, b)| a != b);
    let side: Vec<bool> = (0..members).map(|_| rng.random_bool(0.5)).collect();
    let one = rng.random_range(0..members);
    match rng.random_range(0..5) {
        0 => pairs().filter(|(a, b)| *a == one || *b == one).collect(),
        1 => pairs().filter(|(a, b)| side[*a] != side[*b]).collect(),
        2 => pairs().filter(|(a, _)| *a == one).collect(),
        3 => pairs().filter(|(_, b)| *b == one).collect(),
        _ => {
            let kept: Vec<bool> = pairs().map(|_| rng.random_bool(0.6)).collect();
            pairs().zip(kept).filter(|(_, kept)| !kept).map(|(pair, _)| pair).collect()
        }
    }
}
