//! What the key index costs at 1 M keys of one revision: bytes per key, put, get, count, page, put under snapshots,
//! clean-up. `cargo bench --bench index`; with `--test` a tiny run that checks itself.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use actd::mvcc::{KeyRange, Revision, index::Index};

/// The system's allocator, counting what is asked for and what glibc makes of it.
struct Counting;

static ASKED: AtomicUsize = AtomicUsize::new(0);
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// A glibc block: 8 bytes of header, a multiple of 16, at least 32.
fn block(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call goes to `System` unchanged, whose promises are those of the trait; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(layout.size(), Ordering::Relaxed);
        TAKEN.fetch_add(block(layout.size()), Ordering::Relaxed);
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ASKED.fetch_sub(layout.size(), Ordering::Relaxed);
        TAKEN.fetch_sub(block(layout.size()), Ordering::Relaxed);
        // SAFETY: `pointer` came from `System` by `alloc` with this `layout`, as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Pseudo-random without a dependency; the same in every run.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

type Key = [u8; 20];

fn key(i: usize) -> Key {
    format!("/bench/keys/{i:08}").into_bytes().try_into().expect("20 bytes")
}

/// Runs `work`, which does `count` operations, and prints the nanoseconds of one.
fn measure<T>(name: &str, count: usize, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    println!("{name:<52} {:>10.0} ns", start.elapsed().as_nanos() as f64 / count as f64);
    result
}

fn main() {
    let tiny = std::env::args().any(|arg| arg == "--test");
    let keys: usize = if tiny { 2_000 } else { 1_000_000 };
    let rounds = keys / 5;
    let mut rng = Lcg(7);
    let mut order: Vec<usize> = (0..keys).collect();
    for i in (1..keys).rev() {
        order.swap(i, rng.below(i + 1));
    }
    // Each measurement takes its keys from a buffer in the order of use: fetching the question is not counted.
    let names: Vec<Key> = (0..keys).map(key).collect();
    let shuffled: Vec<Key> = order.iter().map(|&i| key(i)).collect();
    println!("{keys} keys of {} bytes", names[0].len());

    for (name, sorted) in [("ascending", true), ("random", false)] {
        let before = (ASKED.load(Ordering::Relaxed), TAKEN.load(Ordering::Relaxed));
        let mut index = Index::default();
        let mut revision = 1;
        measure(&format!("restore/{name}"), keys, || {
            for key in if sorted { &names } else { &shuffled } {
                revision += 1;
                index.restore_put(key, Revision::new(revision, 0), revision, 1, 300);
            }
        });
        let per_key = |now: usize, before: usize| (now - before) as f64 / keys as f64 - names[0].len() as f64;
        let asked = per_key(ASKED.load(Ordering::Relaxed), before.0);
        let taken = per_key(TAKEN.load(Ordering::Relaxed), before.1);
        println!(
            "{:<52} {asked:>10.1} B (with malloc overhead {taken:.1} B)",
            format!("bytes per key beside the key/{name}")
        );
        assert_eq!(index.len(), keys);
    }

    let mut index = Index::default();
    let mut revision = 1;
    measure("put/new key/no snapshots", keys, || {
        for key in &shuffled {
            revision += 1;
            index.put(key, Revision::new(revision, 0), 300);
        }
    });
    let loaded = revision;

    let asked: Vec<Key> = (0..rounds).map(|_| key(rng.below(keys))).collect();
    measure("get/current", rounds, || {
        for key in &asked {
            assert!(index.get(key, loaded).is_some());
        }
    });
    let map: std::collections::BTreeMap<&[u8], u64> = shuffled.iter().map(|key| (&key[..], 1)).collect();
    measure("get/std BTreeMap", rounds, || {
        for key in &asked {
            assert!(map.contains_key(&key[..]));
        }
    });
    drop(map);
    measure("count/random range/current", rounds, || {
        for _ in 0..rounds {
            let (a, b) = (rng.below(keys), rng.below(keys));
            let count = index.count(KeyRange::new(&names[a], &names[b]), loaded);
            assert_eq!(count, b.saturating_sub(a));
        }
    });
    let page = 500.min(keys);
    let pages = rounds / page + 1;
    measure("page of 500 with count/from a random key", pages, || {
        for _ in 0..pages {
            let range = KeyRange::new(&names[rng.below(keys - page + 1)], &[0]);
            assert!(index.count(range, loaded) >= page);
            let mut left = page;
            index.visit(range, loaded, &mut |key, meta| {
                black_box((key, meta));
                left -= 1;
                left > 0
            });
            assert_eq!(left, 0);
        }
    });

    // Readers hold the newest view and the one before while the owner goes on.
    let mut batch = |name: &str, index: &mut Index, size: usize, mut next: Box<dyn FnMut() -> Vec<u8>>| {
        let mut views = [index.clone(), index.clone()];
        let puts: Vec<Vec<u8>> = (0..rounds).map(|_| next()).collect();
        measure(&format!("put/{name}/snapshot per {size}"), rounds, || {
            for (n, key) in puts.iter().enumerate() {
                revision += 1;
                index.put(key, Revision::new(revision, 0), 300);
                if (n + 1) % size == 0 {
                    views.rotate_right(1);
                    views[0] = index.clone();
                }
            }
        });
    };
    let mut fresh = index.clone();
    let mut a = Lcg(11);
    batch("new key", &mut fresh, 50, Box::new(move || format!("{:x}", a.below(1 << 31)).into_bytes()));
    let mut fresh = index.clone();
    let mut a = Lcg(11);
    batch(
        "new key among the old",
        &mut fresh,
        50,
        Box::new(move || format!("/bench/keys/{:08}+{:x}", a.below(keys), a.below(1 << 31)).into_bytes()),
    );
    drop(fresh);
    let view = index.clone();
    let mut a = Lcg(12);
    batch("10 k hot keys", &mut index, 50, Box::new(move || key(a.below(keys.min(10_000))).to_vec()));
    let mut a = Lcg(13);
    batch("10 k hot keys", &mut index, 1, Box::new(move || key(a.below(keys.min(10_000))).to_vec()));
    let mut a = Lcg(14);
    batch("any key", &mut index, 50, Box::new(move || key(a.below(keys)).to_vec()));
    let mut a = Lcg(15);
    batch("any key", &mut index, 1, Box::new(move || key(a.below(keys)).to_vec()));
    batch("one key", &mut index, 50, Box::new(move || key(7).to_vec()));

    assert_eq!(view.count(KeyRange::ALL, loaded), keys);
    measure("count/all/pinned before all that", 1, || assert_eq!(index.count(KeyRange::ALL, loaded), keys));
    measure("count/all/pinned 1,000 puts ago", 20, || {
        for _ in 0..20 {
            assert_eq!(index.count(KeyRange::ALL, revision - 1_000), keys);
        }
    });
    measure("changes/all/of the last 1,000 revisions", 1, || {
        assert_eq!(index.changes(KeyRange::ALL, revision - 999, revision).len(), 1_000);
    });
    measure("keep/all", 1, || assert_eq!(index.keep(revision).len(), keys));

    let (mut removed, mut slices, mut longest) = (Vec::new(), 0, 0);
    let mut cursor = bytes::Bytes::new();
    measure("clean-up/all of it", 1, || {
        loop {
            let start = Instant::now();
            let next = index.compact_slice(revision, &cursor, 500, &mut removed);
            longest = longest.max(start.elapsed().as_micros());
            slices += 1;
            let Some(next) = next else { break };
            cursor = next;
        }
    });
    println!("{slices} slices of 500 keys, the longest {longest} µs, {} rows removed", removed.len());
    assert_eq!(removed.len(), 5 * rounds);
    assert_eq!((index.len(), index.count(KeyRange::ALL, revision)), (keys, keys));
}
