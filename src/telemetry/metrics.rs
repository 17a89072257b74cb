//! The numbers that no actor keeps: plain atomics, rendered by `http::metrics`.
//!
//! Written by hand rather than through a metrics facade: the hot path adds to an atomic it holds, no registry is looked up
//! and no sample is kept until somebody reads.

use std::collections::HashMap;
use std::sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed};
use std::time::Duration;

use prost::Message;
use prost_types::FileDescriptorSet;

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
        let seconds = value.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[bucket].fetch_add(1, Relaxed);
        self.sum_nanos.fetch_add(value.as_nanos() as u64, Relaxed);
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
    /// By gRPC code; streams are counted here only if they were refused at their start.
    pub handled: [AtomicU64; 17],
}

impl RpcCounters {
    fn new() -> Self {
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
                    });
                }
            }
        }
        Self { methods, by_path }
    }

    /// The counters of a path, if such a method exists.
    pub fn find(&self, path: &str) -> Option<&RpcMethod> {
        self.by_path.get(path).map(|i| &self.methods[*i])
    }

    pub fn iter(&self) -> impl Iterator<Item = &RpcMethod> {
        self.methods.iter()
    }
}

impl RpcMethod {
    pub fn handled(&self, code: tonic::Code) {
        self.handled[code as usize].fetch_add(1, Relaxed);
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
}

impl Default for Metrics {
    fn default() -> Self {
        Self(Arc::new(Numbers {
            rpcs: RpcCounters::new(),
            health_ok: 0.into(),
            health_failed: 0.into(),
            puts: 0.into(),
            put_bytes: 0.into(),
            deletes: 0.into(),
            ranges: 0.into(),
            leases_granted: 0.into(),
            leases_gone: 0.into(),
            leases_renewed: 0.into(),
            leases_expired: 0.into(),
            hubs: (0..HUBS_MAX).map(|_| HubNumbers::default()).collect(),
            wal_write: Histogram::new(SYNC_BOUNDS),
            wal_bytes: 0.into(),
            wal_sync: Histogram::new(SYNC_BOUNDS),
            store_sync: Histogram::new(SYNC_BOUNDS),
        }))
    }
}

impl std::ops::Deref for Metrics {
    type Target = Numbers;

    fn deref(&self) -> &Numbers {
        &self.0
    }
}
