//! The numbers that no actor keeps: plain atomics, rendered by `http::metrics`.
//!
//! Written by hand rather than through a metrics facade: the hot path adds to an atomic it holds, no registry is looked up
//! and no sample is kept until somebody reads.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, atomic::AtomicU64, atomic::Ordering::Relaxed};
use std::time::Duration;

use prost::Message;
use prost_types::FileDescriptorSet;

use super::requests::Requests;

/// A histogram with fixed bucket bounds in seconds.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds: the last has no bound.
    counts: Vec<AtomicU64>,
    sum_nanos: AtomicU64,
}

impl Histogram {
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect(), sum_nanos: 0.into() }
    }

    pub fn record(&self, value: Duration) {
        self.count(value.as_secs_f64(), value);
    }

    /// Where the bounds are in milliseconds.
    pub fn record_ms(&self, value: Duration) {
        // The sum is told in the unit of the bounds.
        self.count(value.as_secs_f64() * 1e3, value * 1000);
    }

    fn count(&self, value: f64, sum: Duration) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum_nanos.fetch_add(sum.as_nanos() as u64, Relaxed);
    }

    /// (bound, values up to it) for each bound, then the count of all values, and their sum in seconds.
    pub fn read(&self) -> (Vec<(f64, u64)>, u64, f64) {
        let mut total = 0;
        let mut buckets = Vec::with_capacity(self.bounds.len());
        for (i, count) in self.counts.iter().enumerate() {
            total += count.load(Relaxed);
            if let Some(bound) = self.bounds.get(i) {
                buckets.push((*bound, total));
            }
        }
        (buckets, total, self.sum_nanos.load(Relaxed) as f64 / 1e9)
    }
}

/// 1 ms to 8.192 s, doubling: etcd's bounds for the log's syncs.
const SYNC_BOUNDS: &[f64] =
    &[0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192];

/// 0.1 ms to 52.4288 s, doubling: etcd's bounds for applying and for ranges.
const APPLY_BOUNDS: &[f64] = &[
    0.0001, 0.0002, 0.0004, 0.0008, 0.0016, 0.0032, 0.0064, 0.0128, 0.0256, 0.0512, 0.1024, 0.2048, 0.4096, 0.8192,
    1.6384, 3.2768, 6.5536, 13.1072, 26.2144, 52.4288,
];
/// 10 ms to 163.84 s, doubling: hashes; two more for backups.
const HASH_BOUNDS: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84];
const BACKUP_BOUNDS: &[f64] =
    &[0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36];
/// The usual bounds of a call's time.
const HANDLING_BOUNDS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const DEFRAG_BOUNDS: &[f64] = &[0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 409.6];
const SNAPSHOT_BOUNDS: &[f64] = &[0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2];
/// 1 s to 97 days, doubling.
const TTL_BOUNDS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0, 131072.0, 262144.0, 524288.0, 1048576.0, 2097152.0, 4194304.0, 8388608.0,
];
/// Milliseconds.
const COMPACTION_BOUNDS: &[f64] = &[
    100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0, 6400.0, 12800.0, 25600.0, 51200.0, 102400.0, 204800.0, 409600.0,
    819200.0,
];
const PAUSE_BOUNDS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];

/// RPC runtimes beyond this share the last hub's numbers.
const HUBS_MAX: usize = 256;

/// What a watch hub tells after each of its turns.
#[derive(Debug, Default)]
pub struct HubNumbers {
    pub streams: AtomicU64,
    pub watchers: AtomicU64,
    pub behind: AtomicU64,
    pub queued_bytes: AtomicU64,
    pub events_sent: AtomicU64,
}

impl HubNumbers {
    pub fn set(&self, now: &crate::watch::Stats) {
        self.streams.store(now.streams as u64, Relaxed);
        self.watchers.store(now.watchers as u64, Relaxed);
        self.behind.store(now.behind as u64, Relaxed);
        self.queued_bytes.store(now.queued_bytes as u64, Relaxed);
        self.events_sent.store(now.events_sent, Relaxed);
    }
}

/// Calls by method, from the compiled services.
#[derive(Debug)]
pub struct RpcCounters {
    methods: Vec<RpcMethod>,
    by_path: HashMap<String, usize>,
}

#[derive(Debug)]
pub struct RpcMethod {
    pub service: String,
    pub method: String,
    /// `unary`, `server_stream`, `bidi_stream`.
    pub kind: &'static str,
    pub started: AtomicU64,
    /// By gRPC code, at the end of the call.
    pub handled: [AtomicU64; 17],
    pub received: Traffic,
    pub sent: Traffic,
    /// Times of whole calls, where they are asked for.
    pub handling: Option<Histogram>,
}

/// Messages one way, and their bytes.
#[derive(Debug, Default)]
pub struct Traffic {
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
}

/// Calls by what their client says its version is.
#[derive(Debug, Default)]
pub struct Clients([OnceLock<(String, [AtomicU64; 2])>; VERSIONS_MAX]);

/// Clients may say anything; versions beyond these are counted with the last.
const VERSIONS_MAX: usize = 32;

impl Clients {
    pub fn called(&self, version: &str, is_stream: bool) {
        for (n, slot) in self.0.iter().enumerate() {
            let (name, counts) = slot.get_or_init(|| (version.to_owned(), Default::default()));
            if name == version || n + 1 == VERSIONS_MAX {
                counts[usize::from(is_stream)].fetch_add(1, Relaxed);
                return;
            }
        }
    }

    /// Kind, version and calls.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str, u64)> {
        let versions = self.0.iter().filter_map(OnceLock::get);
        versions.flat_map(|(version, counts)| {
            ["unary", "stream"].iter().zip(counts).map(|(kind, count)| (*kind, version.as_str(), count.load(Relaxed)))
        })
    }
}

impl RpcCounters {
    fn new(timed: bool) -> Self {
        let files = FileDescriptorSet::decode(crate::pb::DESCRIPTORS).expect("compiled by the build");
        let mut methods = Vec::new();
        let mut by_path = HashMap::new();
        for file in &files.file {
            for service in &file.service {
                let name = format!("{}.{}", file.package(), service.name());
                for method in &service.method {
                    by_path.insert(format!("/{name}/{}", method.name()), methods.len());
                    methods.push(RpcMethod {
                        service: name.clone(),
                        method: method.name().to_owned(),
                        kind: match (method.client_streaming(), method.server_streaming()) {
                            (false, false) => "unary",
                            (false, true) => "server_stream",
                            (true, false) => "client_stream",
                            (true, true) => "bidi_stream",
                        },
                        started: 0.into(),
                        handled: Default::default(),
                        received: Traffic::default(),
                        sent: Traffic::default(),
                        handling: timed.then(|| Histogram::new(HANDLING_BOUNDS)),
                    });
                }
            }
        }
        Self { methods, by_path }
    }

    /// The place of a path's counters, if such a method exists.
    pub fn find(&self, path: &str) -> Option<usize> {
        self.by_path.get(path).copied()
    }

    pub fn of(&self, place: usize) -> &RpcMethod {
        &self.methods[place]
    }

    pub fn iter(&self) -> impl Iterator<Item = &RpcMethod> {
        self.methods.iter()
    }
}

impl RpcMethod {
    pub fn is_stream(&self) -> bool {
        self.kind != "unary"
    }

    pub fn handled(&self, code: tonic::Code, took: Duration) {
        self.handled[code as usize].fetch_add(1, Relaxed);
        if let Some(times) = &self.handling {
            times.record(took);
        }
    }
}

impl Traffic {
    pub fn add(&self, messages: u64, bytes: u64) {
        if messages + bytes > 0 {
            self.messages.fetch_add(messages, Relaxed);
            self.bytes.fetch_add(bytes, Relaxed);
        }
    }
}

#[derive(Clone, Debug)]
pub struct Metrics(Arc<Numbers>);

#[derive(Debug)]
pub struct Numbers {
    pub rpcs: RpcCounters,
    pub health_ok: AtomicU64,
    pub health_failed: AtomicU64,
    pub puts: AtomicU64,
    pub put_bytes: AtomicU64,
    pub deletes: AtomicU64,
    pub ranges: AtomicU64,
    pub txns: AtomicU64,
    pub cleaned_rows: AtomicU64,
    pub leases_granted: AtomicU64,
    pub leases_gone: AtomicU64,
    pub leases_renewed: AtomicU64,
    pub leases_expired: AtomicU64,
    pub wal_write: Histogram,
    /// Bytes written to the log.
    pub wal_bytes: AtomicU64,
    pub wal_sync: Histogram,
    /// One for each watch hub.
    pub hubs: Vec<HubNumbers>,
    pub store_sync: Histogram,
    pub store_commit: Histogram,
    /// From a handler's start to its answer.
    pub requests: Requests,
    pub applies: Requests,
    pub slow_applies: AtomicU64,
    /// Ranges in the store: failed, done.
    pub range_times: [Histogram; 2],
    pub lease_ttls: Histogram,
    pub compaction_pauses: Histogram,
    pub compactions: Histogram,
    /// Unix seconds of the newest end of a clean-up.
    pub compaction_last: AtomicU64,
    pub hashes: Histogram,
    pub hashes_at_revision: Histogram,
    pub defragments: Histogram,
    pub defragments_running: AtomicU64,
    pub backups: Histogram,
    pub backups_running: AtomicU64,
    pub installs_running: AtomicU64,
    pub snapshot_saves: Histogram,
    pub reads_slow: AtomicU64,
    pub reads_failed: AtomicU64,
    pub promotions: AtomicU64,
    /// Promotions that this leader refused, by the error's text. Rare, so a lock is fine.
    pub promotions_refused: Mutex<BTreeMap<String, u64>>,
    pub clients: Clients,
    /// Streams whose requests could not be read: watches, keepalives.
    pub streams_broken: [AtomicU64; 2],
    /// Name of a check, runs that failed, runs that went well, and the newest result.
    pub checks: [Check; 5],
    pub scrapes: AtomicU64,
}

/// Runs of one health check.
#[derive(Debug)]
pub struct Check {
    pub family: &'static str,
    pub name: &'static str,
    pub failed: AtomicU64,
    pub passed: AtomicU64,
    pub newest: AtomicU64,
}

impl Check {
    const fn new(family: &'static str, name: &'static str) -> Self {
        Self { family, name, failed: AtomicU64::new(0), passed: AtomicU64::new(0), newest: AtomicU64::new(0) }
    }

    pub fn ran(&self, passed: bool) {
        if passed { &self.passed } else { &self.failed }.fetch_add(1, Relaxed);
        self.newest.store(u64::from(passed), Relaxed);
    }
}

impl Numbers {
    pub fn store_did(&self, tally: &crate::mvcc::store::Tally) {
        self.ranges.fetch_add(tally.ranges, Relaxed);
        self.puts.fetch_add(tally.puts, Relaxed);
        self.put_bytes.fetch_add(tally.put_bytes, Relaxed);
        self.deletes.fetch_add(tally.deletes, Relaxed);
        self.txns.fetch_add(tally.txns, Relaxed);
        self.cleaned_rows.fetch_add(tally.cleaned, Relaxed);
    }

    /// `why` is one of few texts.
    pub fn promotion_refused(&self, why: &str) {
        let mut refused = self.promotions_refused.lock().unwrap_or_else(PoisonError::into_inner);
        *refused.entry(why.to_owned()).or_default() += 1;
    }

    pub fn check(&self, family: &str, name: &str) -> Option<&Check> {
        self.checks.iter().find(|check| check.family == family && check.name == name)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(false)
    }
}

impl Metrics {
    /// `extensive`: times of calls as well.
    pub fn new(extensive: bool) -> Self {
        Self(Arc::new(Numbers {
            rpcs: RpcCounters::new(extensive),
            health_ok: 0.into(),
            health_failed: 0.into(),
            puts: 0.into(),
            put_bytes: 0.into(),
            deletes: 0.into(),
            ranges: 0.into(),
            txns: 0.into(),
            cleaned_rows: 0.into(),
            leases_granted: 0.into(),
            leases_gone: 0.into(),
            leases_renewed: 0.into(),
            leases_expired: 0.into(),
            hubs: (0..HUBS_MAX).map(|_| HubNumbers::default()).collect(),
            wal_write: Histogram::new(SYNC_BOUNDS),
            wal_bytes: 0.into(),
            wal_sync: Histogram::new(SYNC_BOUNDS),
            store_sync: Histogram::new(SYNC_BOUNDS),
            store_commit: Histogram::new(SYNC_BOUNDS),
            requests: Requests::new(SYNC_BOUNDS),
            applies: Requests::new(APPLY_BOUNDS),
            slow_applies: 0.into(),
            range_times: [Histogram::new(APPLY_BOUNDS), Histogram::new(APPLY_BOUNDS)],
            lease_ttls: Histogram::new(TTL_BOUNDS),
            compaction_pauses: Histogram::new(PAUSE_BOUNDS),
            compactions: Histogram::new(COMPACTION_BOUNDS),
            compaction_last: 0.into(),
            hashes: Histogram::new(HASH_BOUNDS),
            hashes_at_revision: Histogram::new(HASH_BOUNDS),
            defragments: Histogram::new(DEFRAG_BOUNDS),
            defragments_running: 0.into(),
            backups: Histogram::new(BACKUP_BOUNDS),
            backups_running: 0.into(),
            installs_running: 0.into(),
            snapshot_saves: Histogram::new(SNAPSHOT_BOUNDS),
            reads_slow: 0.into(),
            reads_failed: 0.into(),
            promotions: 0.into(),
            promotions_refused: Mutex::default(),
            clients: Clients::default(),
            streams_broken: Default::default(),
            checks: [
                Check::new("livez", "serializable_read"),
                Check::new("readyz", "data_corruption"),
                Check::new("readyz", "serializable_read"),
                Check::new("readyz", "linearizable_read"),
                Check::new("readyz", "non_learner"),
            ],
            scrapes: 0.into(),
        }))
    }
}

impl std::ops::Deref for Metrics {
    type Target = Numbers;

    fn deref(&self) -> &Numbers {
        &self.0
    }
}
