//! What every [`Storage`] keeps, checked against both.

use super::*;

/// `reopen` closes the store and opens what power loss at this moment leaves at least: what was synced.
trait Subject {
    type Store: Storage;
    fn store(&self) -> &Self::Store;
    fn reopen(self) -> Self;
}

struct Mem(MemStorage);

impl Subject for Mem {
    type Store = MemStorage;

    fn store(&self) -> &MemStorage {
        &self.0
    }

    fn reopen(self) -> Self {
        self.0.crash(0);
        self
    }
}

struct Fjall {
    store: FjallStorage,
    options: Options,
    dir: tempfile::TempDir,
}

impl Fjall {
    fn new(value_cache_bytes: u64) -> Self {
        let options = Options { value_cache_bytes, ..Options::default() };
        let dir = tempfile::tempdir().unwrap();
        Self { store: FjallStorage::create(&dir.path().join("s"), &options).unwrap(), options, dir }
    }
}

impl Subject for Fjall {
    type Store = FjallStorage;

    fn store(&self) -> &FjallStorage {
        &self.store
    }

    fn reopen(self) -> Self {
        let Self { store, options, dir } = self;
        drop(store);
        Self { store: FjallStorage::open(&dir.path().join("s"), &options).unwrap(), options, dir }
    }
}

fn rows(store: &impl Storage, bucket: Bucket, from: &[u8], to: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut rows = Vec::new();
    store.scan(bucket, from, to, &mut collect(&mut rows)).unwrap();
    rows
}

fn collect(rows: &mut Vec<(Vec<u8>, Vec<u8>)>) -> impl FnMut(&[u8], Bytes) -> bool {
    |key, value| {
        rows.push((key.to_vec(), value.to_vec()));
        true
    }
}

fn keys(store: &impl Storage, bucket: Bucket, from: &[u8], to: &[u8]) -> Vec<Vec<u8>> {
    rows(store, bucket, from, to).into_iter().map(|(key, _)| key).collect()
}

fn contract(subject: impl Subject) {
    let store = subject.store();
    store.commit(WriteBatch::default()).unwrap();
    one_batch_reaches_every_bucket(store);
    later_write_in_a_batch_wins(store);
    scan_keeps_its_bounds(store);
    scan_stops_when_told(store);
    deleted_row_is_gone(store);
    snapshot_stays(store);
    let before: Vec<_> = Bucket::ALL.iter().map(|bucket| rows(store, *bucket, b"", b"")).collect();
    store.sync().unwrap();
    let subject = subject.reopen();
    let store = subject.store();
    for (bucket, before) in Bucket::ALL.iter().zip(before) {
        assert_eq!(rows(store, *bucket, b"", b""), before, "{bucket:?} after reopening");
        for (key, value) in before {
            assert_eq!(store.get(*bucket, &key).unwrap().unwrap(), value);
        }
    }
    // And it goes on.
    deleted_row_is_gone(store);
    store.sync().unwrap();
    drop(subject.reopen());
}

fn one_batch_reaches_every_bucket(store: &impl Storage) {
    let mut batch = WriteBatch::default();
    for bucket in Bucket::ALL {
        batch.put(bucket, &b"own"[..], bucket.name());
        batch.put(bucket, vec![0xff; 100], vec![7; 100_000]);
    }
    batch.put(Bucket::Meta, Bytes::new(), &b"empty key"[..]);
    batch.put(Bucket::Meta, &b"empty value"[..], Bytes::new());
    store.commit(batch).unwrap();
    for bucket in Bucket::ALL {
        assert_eq!(store.get(bucket, b"own").unwrap().unwrap(), bucket.name());
        assert_eq!(store.get(bucket, &[0xff; 100]).unwrap().unwrap().len(), 100_000);
        assert_eq!(store.get(bucket, b"absent").unwrap(), None);
    }
    assert_eq!(store.get(Bucket::Meta, b"").unwrap().unwrap(), "empty key");
    assert_eq!(store.get(Bucket::Meta, b"empty value").unwrap().unwrap(), "");
}

fn later_write_in_a_batch_wins(store: &impl Storage) {
    for bucket in [Bucket::Key, Bucket::Lease] {
        let mut batch = WriteBatch::default();
        for value in ["1", "2", "3"] {
            batch.put(bucket, &b"put put"[..], value);
        }
        batch.put(bucket, &b"put delete"[..], &b"x"[..]);
        batch.delete(bucket, &b"put delete"[..]);
        batch.delete(bucket, &b"delete put"[..]);
        batch.put(bucket, &b"delete put"[..], &b"y"[..]);
        store.commit(batch).unwrap();
        assert_eq!(store.get(bucket, b"put put").unwrap().unwrap(), "3");
        assert_eq!(store.get(bucket, b"put delete").unwrap(), None);
        assert_eq!(store.get(bucket, b"delete put").unwrap().unwrap(), "y");
        let expected: [&[u8]; 4] = [b"delete put", b"own", b"put put", &[0xff; 100]];
        assert_eq!(keys(store, bucket, b"", b""), expected);
    }
}

fn scan_keeps_its_bounds(store: &impl Storage) {
    for bucket in [Bucket::Key, Bucket::Members] {
        let mut batch = WriteBatch::default();
        for key in ["b", "d", "b\0", "a", "c"] {
            batch.put(bucket, key, key);
        }
        store.commit(batch).unwrap();
        let found = |from: &[u8], to: &[u8]| keys(store, bucket, from, to);
        assert_eq!(found(b"a", b"d"), [&b"a"[..], b"b", b"b\0", b"c"]);
        assert_eq!(found(b"b\0", b"c"), [b"b\0"]);
        assert_eq!(found(b"aa", b"b"), Vec::<Vec<u8>>::new());
        assert_eq!(found(b"c", b"c"), Vec::<Vec<u8>>::new());
        assert_eq!(found(b"d", b"a"), Vec::<Vec<u8>>::new());
        assert_eq!(found(b"\xfe", b""), [vec![0xff; 100]]);
        assert_eq!(found(b"\xff\xff", b""), [vec![0xff; 100]]);
        assert!(found(b"", b"c").starts_with(&[b"a".to_vec()]));
    }
}

fn scan_stops_when_told(store: &impl Storage) {
    let mut seen = 0;
    let mut visit = |_: &[u8], _| {
        seen += 1;
        seen < 2
    };
    store.scan(Bucket::Key, b"", b"", &mut visit).unwrap();
    assert_eq!(seen, 2);
}

fn deleted_row_is_gone(store: &impl Storage) {
    for bucket in [Bucket::Key, Bucket::Alarm] {
        let mut batch = WriteBatch::default();
        batch.put(bucket, &b"gone"[..], &b"v"[..]);
        store.commit(batch).unwrap();
        assert!(store.get(bucket, b"gone").unwrap().is_some());
        let mut batch = WriteBatch::default();
        batch.delete(bucket, &b"gone"[..]);
        batch.delete(bucket, &b"never was"[..]);
        store.commit(batch).unwrap();
        assert_eq!(store.get(bucket, b"gone").unwrap(), None);
        assert_eq!(keys(store, bucket, b"gone", b"gone\0"), Vec::<Vec<u8>>::new());
    }
}

fn snapshot_stays(store: &impl Storage) {
    for bucket in [Bucket::Key, Bucket::Cluster] {
        let before = rows(store, bucket, b"", b"");
        let snapshot = store.snapshot();
        let mut batch = WriteBatch::default();
        batch.put(bucket, &b"own"[..], &b"changed"[..]);
        batch.put(bucket, &b"later"[..], &b"row"[..]);
        store.commit(batch).unwrap();
        let mut seen = Vec::new();
        snapshot.scan(bucket, b"", b"", &mut collect(&mut seen)).unwrap();
        assert_eq!(seen, before);
        assert_eq!(store.get(bucket, b"own").unwrap().unwrap(), "changed");
    }
}

#[test]
fn memory_keeps_the_contract() {
    contract(Mem(MemStorage::new()));
}

#[test]
fn fjall_keeps_the_contract() {
    contract(Fjall::new(64 << 20));
}

#[test]
fn fjall_keeps_the_contract_without_value_cache() {
    contract(Fjall::new(0));
}

/// A scan that visits the store again must not wait for itself.
#[test]
fn scan_may_read_the_store() {
    let mem = Mem(MemStorage::new());
    let fjall = Fjall::new(0);
    let stores: [&dyn Storage; 2] = [mem.store(), fjall.store()];
    for store in stores {
        let mut batch = WriteBatch::default();
        batch.put(Bucket::Key, &b"k"[..], &b"v"[..]);
        store.commit(batch).unwrap();
        let mut same = false;
        let mut visit = |key: &[u8], value: Bytes| {
            same = store.get(Bucket::Key, key).unwrap() == Some(value);
            true
        };
        store.scan(Bucket::Key, b"", b"", &mut visit).unwrap();
        assert!(same);
    }
}
