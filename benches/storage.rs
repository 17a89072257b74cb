//! Costs of the store on disk: commits (time, and CPU with fjall's threads), point reads, scans, reopening.
//!
//! `cargo bench --profile ci --bench storage`

use actd::storage::{Bucket, FjallStorage, Options, Storage, WriteBatch};
use bytes::Bytes;
use std::path::Path;
use std::time::{Duration, Instant};

const VALUE_BYTES: usize = 300;

fn main() {
    let rows = std::env::var("BENCH_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(1_000_000u64);
    let mut options = Options::default();
    if let Some(mib) = std::env::var("BENCH_MEMTABLE_MIB").ok().and_then(|mib| mib.parse::<u64>().ok()) {
        options.memtable_bytes = mib << 20;
    }
    if let Some(mib) = std::env::var("BENCH_CACHE_MIB").ok().and_then(|mib| mib.parse::<u64>().ok()) {
        options.value_cache_bytes = mib << 20;
    }
    println!("{VALUE_BYTES}-byte values, {options:?}");
    for batch_rows in [1, 10, 50] {
        let dir = tempfile::tempdir().expect("a directory for the store");
        let store = FjallStorage::create(&dir.path().join("s"), &options).expect("a store");
        commits(&store, (rows / 5).max(batch_rows), batch_rows);
        last_sync(&store);
    }
    let dir = tempfile::tempdir().expect("a directory for the store");
    let path = dir.path().join("s");
    {
        let store = FjallStorage::create(&path, &options).expect("a store");
        commits(&store, rows, 50);
        reads(&store, rows);
    }
    reopen(&path, &options, rows);
}

fn row_key(revision: u64) -> Vec<u8> {
    let mut key = revision.to_be_bytes().to_vec();
    key.push(b'_');
    key.extend(0u64.to_be_bytes());
    key
}

/// Half random, half the same in every value: what a compressor may find in real ones.
fn value(revision: u64) -> Bytes {
    let mut state = revision.wrapping_add(1);
    let mut value = vec![b'x'; VALUE_BYTES];
    for chunk in value[..VALUE_BYTES / 2].chunks_mut(8) {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        chunk.copy_from_slice(&(state ^ state >> 29).to_be_bytes()[..chunk.len()]);
    }
    value.into()
}

fn commits(store: &FjallStorage, rows: u64, batch_rows: u64) {
    let batches: u64 = rows / batch_rows;
    let mut slowest = Duration::ZERO;
    let mut inside = Duration::ZERO;
    let batch = |n: u64| {
        let mut batch = WriteBatch::default();
        for revision in n * batch_rows..(n + 1) * batch_rows {
            batch.put(Bucket::Key, row_key(revision), value(revision));
        }
        batch.put(Bucket::Meta, &b"consistent_index"[..], n.to_be_bytes().to_vec());
        batch
    };
    let before = cpu();
    (0..batches).for_each(|n| drop(std::hint::black_box(batch(n))));
    let building = cpu() - before;
    let (before, start) = (cpu(), Instant::now());
    let mut synced = start;
    for n in 0..batches {
        let batch = batch(n);
        let committed = Instant::now();
        store.commit(batch).expect("a commit");
        let took = committed.elapsed();
        slowest = slowest.max(took);
        inside += took;
        if synced.elapsed() > Duration::from_millis(500) {
            store.sync().expect("a sync");
            synced = Instant::now();
        }
    }
    let wall = start.elapsed();
    let cpu = (cpu() - before).saturating_sub(building);
    let micros = |time: Duration, count: u64| time.as_secs_f64() * 1e6 / count as f64;
    println!(
        "commit {batch_rows:2} rows: {:6.1} µs a batch, slowest {:.1} ms, blocked {:.0} ms; CPU {:.2} µs a row, {:.0} k rows/s, disk {} MiB",
        micros(inside, batches),
        slowest.as_secs_f64() * 1e3,
        store.blocked().as_secs_f64() * 1e3,
        micros(cpu, rows),
        rows as f64 / wall.as_secs_f64() / 1e3,
        store.disk_bytes() >> 20,
    );
}

fn last_sync(store: &FjallStorage) {
    let start = Instant::now();
    store.sync().expect("a sync");
    println!("    sync of what was left: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
}

fn reads(store: &FjallStorage, rows: u64) {
    const READS: u64 = 100_000;
    let pick = |n: u64, among: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % among;
    // CPU, which a busy machine does not blur.
    let per_read = |start: Duration| (cpu() - start).as_secs_f64() * 1e9 / READS as f64;
    let recent = |n| row_key(rows - 1 - pick(n, 10_000.min(rows)));
    let start = cpu();
    for n in 0..READS {
        assert!(store.get(Bucket::Key, &recent(n)).expect("a read").is_some());
    }
    println!("get, in the value cache: {:.0} ns of CPU", per_read(start));
    let start = cpu();
    for n in 0..READS {
        assert!(store.get(Bucket::Key, &row_key(pick(n, rows / 2))).expect("a read").is_some());
    }
    println!("get, mostly not in the value cache: {:.0} ns of CPU", per_read(start));
    let start = Instant::now();
    let mut bytes = 0;
    let mut visit = |key: &[u8], value: Bytes| {
        bytes += key.len() + value.len();
        true
    };
    store.scan(Bucket::Key, b"", b"", &mut visit).expect("a scan");
    let took = start.elapsed().as_secs_f64();
    println!("scan: {:.2} M rows/s, {:.0} MB/s", rows as f64 / took / 1e6, bytes as f64 / took / 1e6);
    println!("value cache {} MiB", store.value_cache_bytes() >> 20);
}

fn reopen(path: &Path, options: &Options, rows: u64) {
    let start = Instant::now();
    let store = FjallStorage::open(path, options).expect("the store");
    let took = start.elapsed();
    assert!(store.get(Bucket::Key, &row_key(rows - 1)).expect("a read").is_some());
    println!("reopen with {rows} rows: {:.0} ms", took.as_secs_f64() * 1e3);
    let start = Instant::now();
    store.major_compact().expect("a compaction");
    println!("major compaction: {:.0} ms, disk {} MiB", start.elapsed().as_secs_f64() * 1e3, store.disk_bytes() >> 20);
}

/// CPU time of all threads of this process.
fn cpu() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux");
    let nanos = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}
