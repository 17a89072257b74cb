//! The hashes members compare, each rule by the statement it checks.

use super::{
    Error,
    hash::{HashKv, hash_all, hash_kv, scan_kv},
    test_support::*,
};
use crate::storage::{Bucket, Storage, WriteBatch};

// M-26, M-27, M-28
#[test]
fn hash_does_not_depend_on_clean_up() {
    let mut w = World::new();
    let hash = |w: &World, rev| hash_kv(&w.store.view(), &*w.storage, rev);
    w.put("a", "1");
    let first = hash(&w, 0).unwrap();
    assert_eq!((first.compact_revision, first.hash_revision), (-1, 2));
    w.put("a", "2");
    w.put("b", "1");
    assert_eq!(hash(&w, 2).unwrap(), first, "history alone decides");
    w.delete("a", "\0");
    w.compact(4);
    assert!(matches!(hash(&w, 3), Err(Error::Compacted)));
    assert!(matches!(hash(&w, 6), Err(Error::FutureRev)));
    let before: Vec<_> = [4, 5, 0].map(|rev| hash(&w, rev).unwrap()).into();
    let view = w.store.view();
    w.clean();
    assert_eq!([4, 5, 0].map(|rev| hash(&w, rev).unwrap())[..], before);
    w.compact(5);
    w.clean();
    assert!(matches!(hash_kv(&view, &*w.storage, 4), Err(Error::ViewOutdated)));
}

// M-30, limits.md 13: the numbers are those of an etcd 3.7.1
#[test]
fn compaction_leaves_the_hash_that_etcd_keeps() {
    let mut w = World::new();
    let hash = |w: &World, rev| hash_kv(&w.store.view(), &*w.storage, rev);
    let found = |hash, compact_revision, hash_revision| HashKv { hash, compact_revision, hash_revision };
    w.put("a", "1");
    w.put("a", "2");
    w.compact(2);
    w.hash_compaction();
    w.clean();
    let first = found(2587454935, -1, 2);
    assert_eq!(hash(&w, 2).unwrap(), first);
    w.delete("a", "");
    assert_eq!(hash(&w, 4).unwrap(), found(1363947557, 2, 4), "nobody is alive, so all that is left counts");
    w.compact(4);
    let job = w.store.take_hash_job().expect("a job");
    w.clean();
    assert!(w.store.is_compacting(), "its hash is still to come");
    w.store.hashed(Some(job.run().unwrap()));
    assert!(!w.store.is_compacting());
    // A compaction keeps the tombstone at its revision, so the row that was alive before does not count here.
    assert_eq!(hash(&w, 4).unwrap(), found(573317793, 2, 4));
    assert_eq!(hash(&w, 2).unwrap(), first, "also below the compact revision");
    assert!(matches!(hash(&w, 3), Err(Error::Compacted)));
    assert_eq!(hash(&w, 0).unwrap(), found(1084519789, 4, 4), "0 is now");
    w.reopen();
    assert_eq!(hash(&w, 4).unwrap(), found(1084519789, 4, 4), "in memory alone");
    assert!(matches!(hash(&w, 2), Err(Error::Compacted)));
}

// M-30
#[test]
fn hash_of_a_compaction_to_0_answers_for_0() {
    let mut w = World::new();
    w.put("a", "1");
    w.compact(0);
    w.hash_compaction();
    let kept = HashKv { hash: crc32c::crc32c(b"key"), compact_revision: -1, hash_revision: 0 };
    assert_eq!(hash_kv(&w.store.view(), &*w.storage, 0).unwrap(), kept);
    assert_eq!(scan_kv(&w.store.view(), &*w.storage, 0).unwrap().hash_revision, 2);
}

// M-30
#[test]
fn ten_hashes_of_compactions_are_kept() {
    let mut w = World::new();
    for _ in 0..12 {
        let revision = w.put("a", "");
        w.compact(revision);
        w.hash_compaction();
        w.clean();
    }
    let kept: Vec<i64> = w.store.view().hashes.newest_first().map(|hash| hash.hash_revision).collect();
    assert_eq!(kept, (4..14).rev().collect::<Vec<_>>());
}

#[test]
fn compaction_during_the_hash_of_another_leaves_none() {
    let mut w = World::new();
    for _ in 0..3 {
        w.put("a", "");
    }
    w.compact(2);
    w.compact(3);
    let job = w.store.take_hash_job().expect("a job");
    w.compact(4);
    assert!(w.store.take_hash_job().is_none());
    w.clean();
    w.store.hashed(Some(job.run().unwrap()));
    let kept: Vec<_> = w.store.view().hashes.newest_first().map(|hash| hash.hash_revision).collect();
    assert_eq!(kept, [2]);
    // Nor does one whose rows were cleaned up before anybody asked, or whose hash failed.
    let revision = w.put("a", "");
    w.compact(revision);
    w.clean();
    assert!(w.store.take_hash_job().is_none() && !w.store.is_compacting());
    let revision = w.put("a", "");
    w.compact(revision);
    w.store.take_hash_job().expect("a job");
    w.clean();
    w.store.hashed(None);
    assert!(!w.store.is_compacting());
    assert_eq!(w.store.view().hashes.newest_first().count(), 1);
}

// limits.md 13, worked out by hand
#[test]
fn hash_is_over_the_bucket_name_and_the_rows() {
    let mut w = World::new();
    w.put("k", "v");
    let mut bytes = b"key".to_vec();
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 2, b'_', 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend([0x0a, 1, b'k', 0x10, 2, 0x18, 2, 0x20, 1, 0x2a, 1, b'v']);
    assert_eq!(hash_kv(&w.store.view(), &*w.storage, 0).unwrap().hash, crc32c::crc32c(&bytes));
}

#[test]
fn hash_of_all_buckets_leaves_out_what_is_local() {
    let w = World::new();
    let names = "alarmauthauthRolesauthUsersclusterkeyleasemembersmembers_removedmeta";
    let empty = crc32c::crc32c(names.as_bytes());
    assert_eq!(hash_all(&*w.storage).unwrap(), empty);
    let mut batch = WriteBatch::default();
    for name in ["term", "consistent_index", "storageVersion"] {
        batch.put(Bucket::Meta, name, "1");
    }
    w.storage.commit(batch).unwrap();
    assert_eq!(hash_all(&*w.storage).unwrap(), empty);
    let mut batch = WriteBatch::default();
    batch.put(Bucket::Meta, "confState", "{}");
    w.storage.commit(batch).unwrap();
    assert_eq!(hash_all(&*w.storage).unwrap(), crc32c::crc32c(format!("{names}confState{{}}").as_bytes()));
}
