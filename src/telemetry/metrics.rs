//! The numbers that no actor keeps: plain atomics, rendered by `http`.

use std::sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed};
use std::time::Duration;

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

#[derive(Clone, Debug)]
pub struct Metrics(Arc<Numbers>);

#[derive(Debug)]
pub struct Numbers {
    pub rpc_started: AtomicU64,
    pub rpc_handled: AtomicU64,
    /// Bytes written to the log.
    pub wal_bytes: AtomicU64,
    pub wal_sync: Histogram,
    pub store_sync: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self(Arc::new(Numbers {
            rpc_started: 0.into(),
            rpc_handled: 0.into(),
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
