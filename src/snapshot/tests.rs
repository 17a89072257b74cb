//! State → file → store: the same state, whatever moment it was taken at; files that must not be taken.

use std::{
    io::{Seek, SeekFrom, Write},
    sync::Arc,
};

use bytes::Bytes;
use prost::Message;

use super::{
    Error,
    backup::{self, Part},
    bbolt::{Reader, Source, Visitor, Writer},
    checksum::Checksum,
    export::Export,
    import::{self, Expected},
};
use crate::{
    lease::Leases,
    mvcc::{Revision, hash, record::KeyValue, store::Store},
    pb::{
        etcdserverpb::{DeleteRangeRequest, PutRequest},
        raftpb::ConfState,
    },
    storage::{Bucket, MemStorage, Options, Storage, StoreDir, WriteBatch},
};

struct Everything(Vec<Part>);

impl backup::Receiver for Everything {
    fn is_there(&self) -> bool {
        true
    }

    fn take(&mut self, part: Part) -> bool {
        self.0.push(part);
        true
    }
}

fn parts(storage: &dyn Storage) -> Vec<Part> {
    let mut to = Everything(Vec::new());
    backup::send(storage, &mut to).unwrap();
    to.0
}

fn backup_of(storage: &dyn Storage) -> Vec<u8> {
    parts(storage).iter().flat_map(|part| part.blob.to_vec()).collect()
}

fn file_of(bytes: &[u8]) -> Box<dyn Source> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    Box::new(file)
}

/// The rows of all buckets but those that are made at export.
fn rows(storage: &dyn Storage) -> Vec<(Bucket, Vec<u8>, Bytes)> {
    let mut rows = Vec::new();
    for bucket in Bucket::ALL {
        let all = storage.scan(bucket, &[], &[], &mut |key, value| {
            rows.push((bucket, key.to_vec(), value));
            true
        });
        all.unwrap();
    }
    rows
}

fn commit(storage: &dyn Storage, rows: &[(Bucket, &[u8], &[u8])]) {
    let mut batch = WriteBatch::default();
    for (bucket, key, value) in rows {
        batch.put(*bucket, key.to_vec(), value.to_vec());
    }
    storage.commit(batch).unwrap();
}

const MEMBER: &[u8] = br#"{"id":10,"peerURLs":["http://127.0.0.1:1"],"name":"m","clientURLs":["http://127.0.0.1:2"]}"#;
const LEARNER: &[u8] = br#"{"id":11,"peerURLs":["http://127.0.0.1:3"],"isLearner":true}"#;

/// A member's rows: membership, a lease, an alarm, auth.
fn member_state() -> MemStorage {
    let storage = MemStorage::new();
    let lease = crate::pb::leasepb::Lease { id: 77, ttl: 60, remaining_ttl: 0 }.encode_to_vec();
    commit(
        &storage,
        &[
            (Bucket::Members, b"a", MEMBER),
            (Bucket::Members, b"b", LEARNER),
            (Bucket::MembersRemoved, b"c", b"removed"),
            (Bucket::Cluster, b"clusterVersion", b"3.7.0"),
            (Bucket::Lease, &77_i64.to_be_bytes(), &lease),
            (Bucket::Alarm, &[0x08, 10, 0x10, 1], b""),
            (Bucket::Auth, b"authEnabled", &[0]),
            (Bucket::AuthRoles, b"root", b"anything"),
            (Bucket::AuthUsers, b"root", b"anything"),
            (Bucket::Meta, b"consistent_index", &42_u64.to_be_bytes()),
            (Bucket::Meta, b"term", &5_u64.to_be_bytes()),
            (Bucket::Meta, b"of a later version", b"kept"),
        ],
    );
    storage
}

fn flush(store: &mut Store, storage: &dyn Storage) {
    storage.commit(store.take_batch().0).unwrap();
    store.committed();
}

/// `member_state` with a history of puts and deletes, compacted, with the clean-up somewhere in between.
fn with_history(clean_slices: usize) -> (MemStorage, Store) {
    let storage = member_state();
    let mut leases = Leases::new(1);
    let mut store = Store::open(Arc::new(storage.clone()), &mut leases).unwrap();
    for round in 0..20 {
        for n in 0..40 {
            let key = Bytes::from(format!("k{n}"));
            if (n + round) % 7 == 0 {
                store.delete_range(&DeleteRangeRequest { key, ..Default::default() }, &mut leases).unwrap();
            } else {
                let value = Bytes::from(vec![round; 50]);
                store.put(&PutRequest { key, value, ..Default::default() }, &mut leases).unwrap();
            }
        }
    }
    store.compact(300).unwrap();
    for _ in 0..clean_slices {
        store.clean_slice(5);
    }
    flush(&mut store, &storage);
    (storage, store)
}

fn open(storage: &MemStorage) -> Store {
    let mut leases = Leases::load(storage, 1).unwrap();
    Store::open(Arc::new(storage.clone()), &mut leases).unwrap()
}

fn imported(bytes: &[u8]) -> MemStorage {
    let storage = MemStorage::new();
    import::fill(file_of(bytes), &storage, None).unwrap();
    storage
}

/// M-28, M-35: also while a clean-up is under way.
#[test]
fn state_survives_export_and_import_at_any_stage_of_clean_up() {
    for slices in [0, 1, 10, 1000] {
        let (storage, store) = with_history(slices);
        assert_eq!(store.is_cleaning(), slices < 1000);
        let copy = imported(&backup_of(&storage));
        assert_eq!(rows(&copy), rows(&storage));
        assert_eq!(backup_of(&copy), backup_of(&storage));
        let mut again = open(&copy);
        assert_eq!(again.revision(), store.revision());
        assert_eq!(again.compact_revision(), 300);
        assert_eq!(again.is_cleaning(), store.is_cleaning());
        for revision in [0, 300, 400] {
            let expected = hash::hash_kv(&store.view(), &storage, revision).unwrap();
            assert_eq!(hash::hash_kv(&again.view(), &copy, revision).unwrap(), expected);
        }
        while !again.clean_slice(1000) {}
        flush(&mut again, &copy);
        assert_eq!(hash::hash_kv(&again.view(), &copy, 0).unwrap(), hash::hash_kv(&store.view(), &storage, 0).unwrap());
    }
}

/// The store's state when `take` was called, though rows come and go while the file is made.
#[test]
fn export_shows_the_moment_it_was_taken_at() {
    let (storage, mut store) = with_history(0);
    let before = rows(&storage);
    let export = Export::take(&storage).unwrap();
    while !store.clean_slice(1000) {}
    flush(&mut store, &storage);
    commit(&storage, &[(Bucket::Meta, b"consistent_index", &99_u64.to_be_bytes())]);
    assert_eq!((export.index(), export.term()), (42, 5));
    let layout = export.measure(&mut || true).unwrap();
    let mut bytes = Vec::new();
    let mut sink = |chunk: Bytes| {
        bytes.extend_from_slice(&chunk);
        Ok(())
    };
    export.send(&layout, &mut sink).unwrap();
    assert_eq!(rows(&imported(&bytes)), before);
}

struct Meta(bool, Vec<(Bytes, Bytes)>);

impl Visitor for Meta {
    fn bucket(&mut self, name: &[u8]) -> Result<(), Error> {
        self.0 = name == b"meta";
        Ok(())
    }

    fn row(&mut self, key: Bytes, value: Bytes) -> Result<(), Error> {
        if self.0 {
            self.1.push((key, value));
        }
        Ok(())
    }
}

fn exported_meta(storage: &dyn Storage, key: &str) -> Option<Bytes> {
    let mut meta = Meta(false, Vec::new());
    Reader::open(file_of(&backup_of(storage))).unwrap().read(&mut meta).unwrap();
    meta.1.into_iter().find(|(k, _)| k == key.as_bytes()).map(|(_, value)| value)
}

#[test]
fn configuration_and_version_are_written_as_etcd_does() {
    let storage = member_state();
    assert_eq!(exported_meta(&storage, "confState").unwrap(), r#"{"voters":[10],"learners":[11],"auto_leave":false}"#);
    assert_eq!(exported_meta(&storage, "storageVersion").unwrap(), "3.7.0");
    // The rows decide, not what an older file left.
    commit(
        &storage,
        &[
            (Bucket::Meta, b"confState", b"{}"),
            (Bucket::Meta, b"storageVersion", b"3.7.0"),
            (Bucket::Cluster, b"clusterVersion", b"3.5.0"),
        ],
    );
    let mut batch = WriteBatch::default();
    batch.delete(Bucket::Members, "b");
    storage.commit(batch).unwrap();
    assert_eq!(exported_meta(&storage, "confState").unwrap(), r#"{"voters":[10],"auto_leave":false}"#);
    assert_eq!(exported_meta(&storage, "storageVersion"), None, "below 3.6 the row is not known");
    assert!(parts(&storage).iter().all(|part| part.version.is_empty()));
}

/// M-32, M-33, M-34.
#[test]
fn backup_counts_down_and_ends_with_its_digest() {
    let (storage, _) = with_history(0);
    let parts = parts(&storage);
    let total: u64 = parts[..parts.len() - 1].iter().map(|part| part.blob.len() as u64).sum();
    assert_eq!(total % 4096, 0);
    let mut left = total;
    for part in &parts[..parts.len() - 1] {
        assert!(part.blob.len() <= 32 << 10);
        left -= part.blob.len() as u64;
        assert_eq!(part.remaining_bytes, left);
        assert_eq!(part.version, "3.7.0");
    }
    let last = parts.last().unwrap();
    assert_eq!((last.blob.len(), last.remaining_bytes), (32, 0));
    let bytes = backup_of(&storage);
    assert!(backup::verify(&*file_of(&bytes)).unwrap());
    assert!(!backup::verify(&*file_of(&bytes[..total as usize])).unwrap(), "no digest");
}

#[test]
fn backup_with_any_byte_changed_or_cut_is_refused() {
    let bytes = backup_of(&member_state());
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        let result = import::fill(file_of(&damaged), &MemStorage::new(), None);
        assert!(matches!(result, Err(Error::Damaged(_))), "byte {at}");
    }
    for len in (0..bytes.len() - 32).step_by(7) {
        import::fill(file_of(&bytes[..len]), &MemStorage::new(), None).unwrap_err();
    }
    // Cut to where the digest began it is a database without digest.
    imported(&bytes[..bytes.len() - 32]);
}

/// Without the digest: whatever is accepted opens without a panic.
#[test]
fn store_of_a_damaged_database_opens_or_refuses() {
    let (storage, _) = with_history(3);
    let mut bytes = backup_of(&storage);
    bytes.truncate(bytes.len() - 32);
    let mut accepted = 0;
    for at in (0..bytes.len()).step_by(151) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        let copy = MemStorage::new();
        if import::fill(file_of(&damaged), &copy, None).is_ok() {
            accepted += 1;
            let mut leases = Leases::load(&copy, 1).unwrap();
            let _ = Store::open(Arc::new(copy.clone()), &mut leases);
        }
    }
    assert!(accepted > 0);
}

/// A file of these rows, beside those every member has.
fn file_with(extra: &[(&str, &[u8], &[u8])]) -> Vec<u8> {
    let storage = member_state();
    let mut all: std::collections::BTreeMap<(String, Vec<u8>), Vec<u8>> = rows(&storage)
        .into_iter()
        .map(|(bucket, key, value)| ((bucket.name().to_owned(), key), value.to_vec()))
        .collect();
    for (bucket, key, value) in extra {
        all.insert(((*bucket).to_owned(), key.to_vec()), value.to_vec());
    }
    let fill = |mut writer: Writer<'_>| {
        let mut last = String::new();
        for ((bucket, key), value) in &all {
            if *bucket != last {
                writer.bucket(bucket.as_bytes()).unwrap();
                last = bucket.clone();
            }
            if !key.is_empty() {
                writer.row(key, value).unwrap();
            }
        }
        writer.finish().unwrap()
    };
    let layout = fill(Writer::measure());
    let mut out = Vec::new();
    let mut sink = |chunk: Bytes| {
        out.extend_from_slice(&chunk);
        Ok(())
    };
    fill(Writer::stream(&layout, &mut sink));
    out
}

#[test]
fn files_this_version_would_misunderstand_are_refused() {
    let refusal = |extra: &[(&str, &[u8], &[u8])]| {
        import::fill(file_of(&file_with(extra)), &MemStorage::new(), None).unwrap_err().to_string()
    };
    let newer = refusal(&[("meta", b"storageVersion", b"3.8.0")]);
    assert!(newer.contains("storage version of the database file is 3.8.0, this server's is 3.7.0"), "{newer}");
    assert!(refusal(&[("cluster", b"clusterVersion", b"3.8.0")]).contains("cluster version"));
    assert!(refusal(&[("future", b"k", b"v")]).contains("bucket \"future\", which this version does not know"));
    let row = Revision::new(2, 0).to_row_key(false);
    let tombstone = Revision::new(2, 0).to_row_key(true);
    let record = KeyValue { key: "k".into(), ..Default::default() }.encode_to_vec();
    for extra in [
        &[("key", &b"short"[..], &record[..])][..],
        &[("key", &row, b"\xff")],
        &[("key", &row, &record), ("key", &tombstone, &record)], // one revision twice
        &[("key", &Revision::new(-1, 0).to_row_key(false), &record)],
        &[("lease", &[1; 8], b"")],
        &[("alarm", b"\xff", b"")],
        &[("members", b"a", b"{")],
        &[("meta", b"consistent_index", b"short")],
        &[("meta", b"scheduledCompactRev", b"short")],
        &[("meta", b"storageVersion", b"old")],
    ] {
        let result = import::fill(file_of(&file_with(extra)), &MemStorage::new(), None);
        assert!(matches!(result, Err(Error::Damaged(_))), "{extra:?}: {result:?}");
    }
    let none = refusal(&[("meta", b"consistent_index", &[0; 8])]);
    assert!(none.contains("of no log entry"), "{none}");
    // A bucket without rows, and older versions, are no obstacle.
    imported(&file_with(&[("future", b"", b""), ("meta", b"storageVersion", b"3.6.0")]));
}

fn expected() -> Expected {
    let conf_state = ConfState { voters: vec![10], learners: vec![11], ..Default::default() };
    Expected { index: 42, term: 6, conf_state, checksum: None }
}

#[test]
fn file_must_be_of_the_snapshot_it_came_with() {
    let bytes = file_with(&[]);
    let fill = |expected: &Expected| import::fill(file_of(&bytes), &MemStorage::new(), Some(expected));
    assert_eq!(fill(&expected()).unwrap().term, 6);
    let other_index = fill(&Expected { index: 43, ..expected() }).unwrap_err().to_string();
    assert!(other_index.contains("of index 42, the snapshot of 43"), "{other_index}");
    for (voters, learners) in [(vec![10], vec![]), (vec![10, 11, 12], vec![]), (vec![], vec![10, 11])] {
        let conf_state = ConfState { voters, learners, ..Default::default() };
        let other_members = fill(&Expected { conf_state, ..expected() }).unwrap_err().to_string();
        assert!(other_members.contains("are not those of the snapshot"), "{other_members}");
    }
}

#[test]
fn a_flipped_bit_is_noticed_by_the_checksum_that_came_along() {
    let export = Export::take(&member_state()).unwrap();
    let layout = export.measure(&mut || true).unwrap();
    let mut file = Vec::new();
    let sent = export.send(&layout, &mut |chunk| {
        file.extend_from_slice(&chunk);
        Ok(())
    });
    sent.unwrap();
    let context = layout.checksum.to_context();
    let checksum = Checksum::from_context(context.as_bytes());
    assert_eq!(checksum, Some(layout.checksum));
    assert_eq!(Checksum::from_context(b"of a later version"), None);
    let expected = Expected { term: 5, checksum, ..expected() };
    let fill = |file: Vec<u8>| {
        let store = MemStorage::new();
        import::fill(Box::new(Bytes::from(file)), &store, Some(&expected)).map(|_| rows(&store))
    };
    let whole = fill(file.clone()).unwrap();
    let mut noticed = 0;
    for at in (0..file.len()).step_by(3) {
        let mut flipped = file.clone();
        flipped[at] ^= 1 << (at % 8);
        match fill(flipped) {
            Ok(rows) => assert_eq!(rows, whole, "byte {at}"),
            Err(_) => noticed += 1,
        }
    }
    assert!(noticed > 100, "{noticed} of {}", file.len() / 3);
}

/// H-31: files of etcd 3.5.1 to 3.5.20 still have it as a learner.
#[test]
fn promoted_learner_is_a_voter_whatever_the_file_says() {
    let store = MemStorage::new();
    let conf_state = ConfState { voters: vec![10, 11], ..Default::default() };
    let expected = Expected { conf_state, ..expected() };
    let prepared = import::fill(file_of(&file_with(&[])), &store, Some(&expected)).unwrap();
    for members in [prepared.members, crate::cluster::Members::load(&store).unwrap()] {
        assert_eq!((members.conf_state().voters, members.conf_state().learners), (vec![10, 11], vec![]));
    }
}

/// D-24 to D-27: until the switch the store in use is untouched, after it the prepared one is in use, and what a
/// crash between the steps leaves is completed or deleted.
#[test]
fn store_is_prepared_beside_the_one_in_use_and_then_switched_to() {
    let dir = tempfile::tempdir().unwrap();
    let stores = StoreDir::open(dir.path()).unwrap();
    let options = Options::default();
    drop(stores.open_current(&options).unwrap());
    let bytes = backup_of(&member_state());

    // Refused: nothing is left.
    let mut damaged = bytes.clone();
    damaged[9000] ^= 1;
    import::prepare(file_of(&damaged), &stores, Some(&expected())).unwrap_err();
    assert!(!stores.path("42").exists() && !stores.path("42.new").exists());

    // Prepared twice, then a start before the commit point.
    for _ in 0..2 {
        let prepared = import::prepare(file_of(&bytes), &stores, Some(&expected())).unwrap();
        assert_eq!((prepared.index, prepared.term), (42, 6));
        assert_eq!(prepared.members.conf_state().voters, [10]);
    }
    import::settle(&stores, 7).unwrap();
    assert_eq!(stores.current().unwrap().unwrap(), "0");
    drop(stores.open_current(&options).unwrap());
    assert!(!stores.path("42").exists(), "deleted as a leftover");

    // A start behind the commit point.
    import::prepare(file_of(&bytes), &stores, None).unwrap();
    import::settle(&stores, 42).unwrap();
    let store = stores.open_current(&options).unwrap();
    assert_eq!(rows(&store), rows(&member_state()));
    assert!(!stores.path("0").exists());
    drop(store);
    let again = import::prepare(file_of(&bytes), &stores, Some(&expected())).unwrap_err().to_string();
    assert!(again.contains("in use already"), "{again}");
    import::prepare(file_of(&bytes), &stores, None).unwrap_err();
    assert!(stores.path("42").exists());

    // The usual way.
    let newer = file_with(&[("meta", b"consistent_index", &50_u64.to_be_bytes())]);
    import::prepare(file_of(&newer), &stores, Some(&Expected { index: 50, ..expected() })).unwrap();
    assert_eq!(stores.current().unwrap().unwrap(), "42");
    import::switch(&stores, 50).unwrap();
    assert_eq!(stores.current().unwrap().unwrap(), "50");
}
