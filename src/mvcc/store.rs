//! The one writer of the key space: puts, deletes, compaction and its clean-up, and rebuilding at start.
//!
//! Requests are applied one after another into the batch in hand; [`Store::take_batch`] hands it over to be committed
//! and [`Store::view`] is what readers may see once that is done. Transactions are in `txn.rs`.
//! Requests come checked for everything that needs no state (empty keys, duplicate keys, …).

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;

use super::{
    KeyRange, Revision,
    change::Change,
    error::Error,
    hash::{CompactionHashes, CompactionJob, HashKv},
    index::{Index, KeyMeta},
    range::{Rows, State, decode, header},
    record::{KeyValue, RawKeyValue},
    view::{Sizes, View},
};
use crate::{
    pb::etcdserverpb::{DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse},
    sim::{self, Bug},
    storage::{Bucket, Storage, WriteBatch},
};

/// Meta row: the revision of the newest accepted compaction, as a row key.
pub const SCHEDULED_COMPACT_KEY: &[u8] = b"scheduledCompactRev";
/// Meta row: the revision of the newest compaction whose clean-up is complete, as a row key.
pub const FINISHED_COMPACT_KEY: &[u8] = b"finishedCompactRev";

/// Which key is attached to which lease; the store keeps it in step with the records.
pub trait Leases {
    fn exists(&self, lease: i64) -> bool;
    /// The lease `key` is attached to; 0: none.
    fn lease_of(&self, key: &[u8]) -> i64;
    /// Attaches `key` to `lease`, taking it from any other.
    fn attach(&mut self, lease: i64, key: &Bytes);
    fn detach(&mut self, key: &[u8]);
}

pub struct Store {
    storage: Arc<dyn Storage>,
    pub(super) index: Index,
    /// Main revision of the newest completed write.
    pub(super) revision: i64,
    compact_revision: i64,
    sizes: Sizes,
    cleaning: Option<Cleaning>,
    hashes: CompactionHashes,
    hashing: Option<Hashing>,
    batch: WriteBatch,
    changes: Vec<Change>,
    pending: Pending,
    pub(super) tally: Tally,
}

/// Clean-up after a compaction, as far as it has come.
struct Cleaning {
    at: i64,
    cursor: Bytes,
}

/// The hash of a compaction, one at a time: a compaction that comes while another's is not there yet gets none, as in
/// etcd.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hashing {
    Due { at: i64, previous: i64 },
    UnderWay,
}

/// Put rows that storage does not have yet, ascending.
#[derive(Default)]
struct Pending {
    rows: Vec<(Revision, RawKeyValue)>,
    /// Rows up to this main revision are in a batch that was handed over.
    taken: i64,
}

impl Pending {
    fn get(&self, rev: Revision) -> Option<&RawKeyValue> {
        self.rows.binary_search_by_key(&rev, |(r, _)| *r).ok().map(|i| &self.rows[i].1)
    }
}

/// Operations done, as etcd counts them: every look at a range, those of compares and for `prev_kv` included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub ranges: u64,
    pub puts: u64,
    /// Key and value bytes of the puts.
    pub put_bytes: u64,
    pub deletes: u64,
    /// Requests, or the reading and the writing half of one, with more than one operation.
    pub txns: u64,
    /// Rows that clean-up has removed.
    pub cleaned: u64,
}

/// One write in progress: all its changes have the same main revision.
pub(super) struct Write {
    main: i64,
    changes: i64,
    /// Looks at ranges, puts and deletes so far.
    pub operations: u64,
}

impl Write {
    pub fn changed(&self) -> bool {
        self.changes > 0
    }

    /// The revision a reader inside the write is at.
    pub fn revision(&self) -> i64 {
        if self.changed() { self.main } else { self.main - 1 }
    }

    fn next(&mut self) -> Revision {
        let rev = Revision::new(self.main, self.changes);
        self.changes += 1;
        rev
    }
}

/// The writer's own rows: of the batches in hand, or in storage.
pub(super) struct WriterRows<'a> {
    storage: &'a dyn Storage,
    pending: &'a Pending,
}

impl Rows for WriterRows<'_> {
    fn row(&self, rev: Revision) -> Result<RawKeyValue, Error> {
        if let Some(row) = self.pending.get(rev) {
            return Ok(row.clone());
        }
        // The writer's index names no row that it has deleted, so an absent one is damage.
        super::range::record(self.storage, rev)?
            .ok_or_else(|| Error::damaged(format_args!("{}_{} is missing", rev.main, rev.sub)))
    }
}

impl Store {
    /// Rebuilds the store from its rows, and attaches keys to leases, which `leases` knows already.
    pub fn open(storage: Arc<dyn Storage>, leases: &mut dyn Leases) -> Result<Self, Error> {
        let scheduled = compaction_mark(&*storage, SCHEDULED_COMPACT_KEY)?;
        let finished = compaction_mark(&*storage, FINISHED_COMPACT_KEY)?;
        let compact_revision = scheduled.max(finished).unwrap_or(-1);

        let mut rebuild = Rebuild { index: Index::default(), sizes: Sizes::EMPTY, newest: 0, leased: BTreeMap::new() };
        let mut damage = None;
        storage.scan(Bucket::Key, &[], &[], &mut |key, value| {
            damage = rebuild.row(key, value).err();
            damage.is_none()
        })?;
        if let Some(damage) = damage {
            return Err(damage);
        }
        for (key, lease) in &rebuild.leased {
            if leases.exists(*lease) {
                leases.attach(*lease, key);
            }
        }
        let known = if sim::has(Bug::RevisionGoesDown) { 1 } else { compact_revision };
        let revision = rebuild.newest.max(known).max(1);
        let beyond = i64::from(sim::has(Bug::ResumedCompaction));
        if scheduled > finished {
            sim::mark("compaction goes on after a restart");
        }
        Ok(Self {
            storage,
            index: rebuild.index,
            revision,
            compact_revision,
            sizes: rebuild.sizes,
            cleaning: (scheduled > finished).then(|| Cleaning { at: compact_revision + beyond, cursor: Bytes::new() }),
            hashes: CompactionHashes::default(),
            hashing: None,
            batch: WriteBatch::default(),
            changes: Vec::new(),
            pending: Pending::default(),
            tally: Tally::default(),
        })
    }

    /// From now on rows are read from `storage`, which holds the same.
    pub fn use_storage(&mut self, storage: Arc<dyn Storage>) {
        self.storage = storage;
    }

    /// Main revision of the newest write.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// -1 before the first compaction.
    pub fn compact_revision(&self) -> i64 {
        self.compact_revision
    }

    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The present state. Readers may see it only once every batch taken so far is committed.
    pub fn view(&self) -> View {
        View {
            revision: self.revision,
            compact_revision: self.compact_revision,
            index: self.index.clone(),
            sizes: self.sizes,
            hashes: self.hashes.clone(),
        }
    }

    /// The rows written since the last call, to be committed before any view of them is published, and the changes
    /// in revision order. Until [`Self::committed`] the store reads these rows from memory.
    pub fn take_batch(&mut self) -> (WriteBatch, Vec<Change>) {
        self.pending.taken = self.revision;
        (std::mem::take(&mut self.batch), std::mem::take(&mut self.changes))
    }

    /// The batches taken so far are visible in storage.
    pub fn committed(&mut self) {
        let taken = self.pending.taken;
        let upto = self.pending.rows.partition_point(|(rev, _)| rev.main <= taken);
        self.pending.rows.drain(..upto);
    }

    /// What was done since the last call.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    pub fn put(&mut self, req: &PutRequest, leases: &mut dyn Leases) -> Result<PutResponse, Error> {
        if let Err(e) = self.check_put(req, leases) {
            self.tally.ranges += u64::from(matches!(e, Error::KeyNotFound));
            return Err(e);
        }
        let mut write = self.begin();
        let response = self.put_in(&mut write, req, leases)?;
        self.end(write);
        Ok(response)
    }

    pub fn delete_range(
        &mut self,
        req: &DeleteRangeRequest,
        leases: &mut dyn Leases,
    ) -> Result<DeleteRangeResponse, Error> {
        let mut write = self.begin();
        let response = self.delete_range_in(&mut write, req, leases)?;
        self.end(write);
        Ok(response)
    }

    /// Deletes `keys`, which ascend, in one revision; keys that do not exist are passed over. Returns how many went.
    pub fn delete_keys(&mut self, keys: &[Bytes], leases: &mut dyn Leases) -> usize {
        debug_assert!(keys.is_sorted(), "the order of deletions is the same on every member");
        let mut write = self.begin();
        for key in keys {
            if let Some(meta) = self.index.get(key, i64::MAX) {
                self.delete_in(&mut write, key, meta, leases);
            }
        }
        let deleted = write.changes as usize;
        self.tally.deletes += deleted as u64;
        write.operations += deleted as u64;
        self.end(write);
        deleted
    }

    /// Makes everything below `revision` unreadable. The rows go later, by [`Self::clean_slice`].
    pub fn compact(&mut self, revision: i64) -> Result<(), Error> {
        if revision <= self.compact_revision {
            return Err(Error::Compacted);
        }
        if revision > self.revision {
            return Err(Error::FutureRev);
        }
        let previous = std::mem::replace(&mut self.compact_revision, revision);
        self.hashing.get_or_insert(Hashing::Due { at: revision, previous });
        // etcd looks a key up for the revision of its answer.
        self.tally.ranges += 1;
        self.batch.put(Bucket::Meta, SCHEDULED_COMPACT_KEY, Revision::new(revision, 0).to_row_key(false));
        // A clean-up under way begins anew: what it has still to do, the later compaction condemns as well.
        self.cleaning = Some(Cleaning { at: revision, cursor: Bytes::new() });
        Ok(())
    }

    /// True while rows condemned by a compaction wait to be deleted.
    pub fn is_cleaning(&self) -> bool {
        self.cleaning.is_some()
    }

    /// True while a compaction has not deleted all it condemns or has not left its hash.
    pub fn is_compacting(&self) -> bool {
        self.cleaning.is_some() || self.hashing.is_some()
    }

    /// The hash to compute of a compaction just made, if any; what comes of it goes to [`Self::hashed`].
    ///
    /// To be called once the compaction's batch is committed and before clean-up goes on, which takes away what is
    /// to be hashed.
    pub fn take_hash_job(&mut self) -> Option<CompactionJob> {
        let Some(Hashing::Due { at, previous }) = self.hashing else { return None };
        self.hashing = Some(Hashing::UnderWay);
        Some(CompactionJob { index: self.index.clone(), rows: self.storage.snapshot(), at, previous })
    }

    /// The job is over; `None`: it came to nothing.
    pub fn hashed(&mut self, hash: Option<HashKv>) {
        self.hashing = None;
        if let Some(hash) = hash {
            self.hashes.add(hash);
        }
    }

    /// Goes on with the hashes of `before`, a store with a part of the same history.
    pub fn inherit_hashes(&mut self, before: &Self) {
        self.hashes = before.hashes.clone();
        self.hashing = before.hashing.filter(|hashing| *hashing == Hashing::UnderWay);
    }

    /// Looks at up to `keys` keys and deletes what the newest compaction condemns. Returns whether all is done.
    ///
    /// To be called after the view that carries the compaction has been published: readers of an older view find
    /// their rows gone, and the newest view must then tell them why.
    pub fn clean_slice(&mut self, keys: usize) -> bool {
        let Some(cleaning) = &mut self.cleaning else { return true };
        if let Some(Hashing::Due { .. }) = self.hashing {
            self.hashing = None; // nobody wants it
        }
        let mut removed = Vec::new();
        let next = self.index.compact_slice(cleaning.at, &cleaning.cursor, keys, &mut removed);
        let at = cleaning.at;
        match next {
            Some(cursor) => cleaning.cursor = cursor,
            None => self.cleaning = None,
        }
        removed.sort_unstable();
        self.tally.cleaned += removed.len() as u64;
        for (rev, tombstone, row_bytes) in removed {
            self.batch.delete(Bucket::Key, rev.to_row_key(tombstone));
            let bytes = u64::from(row_bytes) + Sizes::ROW_OVERHEAD;
            self.sizes.total -= bytes;
            self.sizes.in_use -= bytes;
        }
        if self.cleaning.is_some() {
            return false;
        }
        self.batch.put(Bucket::Meta, FINISHED_COMPACT_KEY, Revision::new(at, 0).to_row_key(false));
        true
    }

    pub(super) fn begin(&self) -> Write {
        Write { main: self.revision + 1, changes: 0, operations: 0 }
    }

    pub(super) fn end(&mut self, write: Write) {
        self.tally.txns += u64::from(write.operations > 1);
        self.revision = write.revision();
    }

    pub(super) fn rows(&self) -> WriterRows<'_> {
        WriterRows { storage: &*self.storage, pending: &self.pending }
    }

    /// What a reader inside a write sees.
    pub(super) fn state<'a>(&'a self, revision: i64, rows: &'a WriterRows<'a>) -> State<'a> {
        State::new(&self.index, rows, revision, self.compact_revision)
    }

    pub(super) fn check_put(&self, req: &PutRequest, leases: &dyn Leases) -> Result<(), Error> {
        if req.lease != 0 && !leases.exists(req.lease) {
            return Err(Error::LeaseNotFound);
        }
        if (req.ignore_value || req.ignore_lease) && self.index.get(&req.key, i64::MAX).is_none() {
            return Err(Error::KeyNotFound);
        }
        Ok(())
    }

    /// Carries out a put that [`Self::check_put`] has let pass.
    pub(super) fn put_in(
        &mut self,
        write: &mut Write,
        req: &PutRequest,
        leases: &mut dyn Leases,
    ) -> Result<PutResponse, Error> {
        let old = self.index.get(&req.key, i64::MAX);
        let mut prev_kv = None;
        let (mut value, mut lease) = (req.value.clone(), req.lease);
        let looks = u64::from(req.prev_kv || req.ignore_value || req.ignore_lease);
        self.tally.ranges += looks;
        self.tally.puts += 1;
        write.operations += looks + 1;
        if let Some(old) = old.filter(|_| req.prev_kv || req.ignore_value || req.ignore_lease) {
            let raw = self.rows().row(old.modified)?;
            if req.ignore_value || req.ignore_lease {
                let record = decode(&raw)?;
                if req.ignore_value {
                    value = record.value;
                }
                if req.ignore_lease {
                    lease = record.lease;
                }
            }
            prev_kv = req.prev_kv.then_some(raw);
        }

        self.tally.put_bytes += (req.key.len() + value.len()) as u64;
        let rev = write.next();
        let (create_revision, version) = old.map_or((rev.main, 1), |old| (old.created, old.version + 1));
        let record = KeyValue { key: req.key.clone(), create_revision, mod_revision: rev.main, version, value, lease };
        let raw = record.to_raw();
        let row_bytes = self.write_row(rev, false, raw.0.clone());
        let meta = self.index.put(&req.key, rev, row_bytes);
        debug_assert_eq!((meta.created, meta.version), (create_revision, version));
        if lease == 0 {
            leases.detach(&req.key);
        } else {
            // A copy: the record's bytes would live as long as the lease.
            leases.attach(lease, &Bytes::copy_from_slice(&req.key));
        }

        let prev = old.filter(|_| create_revision != rev.main).and_then(|old| self.before(&req.key, rev.main, old));
        let key = key_in_record(&raw.0, &req.key);
        self.pending.rows.push((rev, raw.clone()));
        self.changes.push(Change::new(rev, key, false, raw, prev));
        Ok(PutResponse { header: header(write.revision()), prev_kv })
    }

    pub(super) fn delete_range_in(
        &mut self,
        write: &mut Write,
        req: &DeleteRangeRequest,
        leases: &mut dyn Leases,
    ) -> Result<DeleteRangeResponse, Error> {
        let range = KeyRange::new(&req.key, &req.range_end);
        let mut doomed: Vec<(Bytes, KeyMeta)> = Vec::new();
        if range.is_single() {
            doomed.extend(self.index.get(&req.key, i64::MAX).map(|meta| (req.key.clone(), meta)));
        } else if !range.is_empty() {
            self.index.visit(range, i64::MAX, &mut |key, meta| {
                doomed.push((Bytes::copy_from_slice(key), meta));
                true
            });
        }
        self.tally.ranges += u64::from(req.prev_kv);
        self.tally.deletes += 1;
        write.operations += u64::from(req.prev_kv) + 1;
        let mut response = DeleteRangeResponse { deleted: doomed.len() as i64, ..Default::default() };
        if req.prev_kv {
            let rows = self.rows();
            response.prev_kvs = doomed.iter().map(|(_, meta)| rows.row(meta.modified)).collect::<Result<_, Error>>()?;
        }
        for (key, meta) in &doomed {
            self.delete_in(write, key, *meta, leases);
        }
        response.header = header(write.revision());
        Ok(response)
    }

    fn delete_in(&mut self, write: &mut Write, key: &Bytes, old: KeyMeta, leases: &mut dyn Leases) {
        let rev = write.next();
        let row = KeyValue { key: key.clone(), ..Default::default() }.to_raw();
        let key_bytes = key_in_record(&row.0, key);
        let row_bytes = self.write_row(rev, true, row.0);
        let deleted = self.index.delete(key, rev, row_bytes);
        debug_assert_eq!(deleted, Some(old));
        leases.detach(key);
        let kv = tombstone_record(key_bytes.clone(), rev.main);
        let prev = self.before(key, rev.main, old);
        self.changes.push(Change::new(rev, key_bytes, true, kv, prev));
    }

    /// Where the state of `key` before main revision `main` is; `newest` is its state now. They differ only if this
    /// very write has touched the key before.
    fn before(&self, key: &[u8], main: i64, newest: KeyMeta) -> Option<Revision> {
        if newest.modified.main < main {
            return Some(newest.modified);
        }
        self.index.get(key, main - 1).map(|meta| meta.modified)
    }

    /// Adds a row to the batch in hand; returns its size.
    fn write_row(&mut self, rev: Revision, tombstone: bool, value: Bytes) -> u32 {
        let key = rev.to_row_key(tombstone);
        let row_bytes = row_bytes(&key, &value);
        let bytes = u64::from(row_bytes) + Sizes::ROW_OVERHEAD;
        self.sizes.total += bytes;
        self.sizes.in_use += bytes;
        self.batch.put(Bucket::Key, key, value);
        row_bytes
    }
}

fn row_bytes(key: &[u8], value: &[u8]) -> u32 {
    u32::try_from(key.len() + value.len()).expect("a row is far smaller than 4 GiB: requests are bounded")
}

/// The record that a delete's event carries.
pub(super) fn tombstone_record(key: Bytes, main: i64) -> RawKeyValue {
    KeyValue { key, mod_revision: main, ..Default::default() }.to_raw()
}

/// The key as a part of its encoded record, where it is the first field.
fn key_in_record(record: &Bytes, key: &[u8]) -> Bytes {
    let start = 1 + prost::length_delimiter_len(key.len());
    let slice = record.slice(start..start + key.len());
    debug_assert_eq!(slice, key);
    slice
}

fn compaction_mark(storage: &dyn Storage, name: &[u8]) -> Result<Option<i64>, Error> {
    let Some(value) = storage.get(Bucket::Meta, name)? else { return Ok(None) };
    match Revision::from_row_key(&value) {
        Some((rev, false)) => Ok(Some(rev.main)),
        _ => Err(Error::damaged("a compaction mark is no revision")),
    }
}

/// What the scan at start gathers.
struct Rebuild {
    index: Index,
    sizes: Sizes,
    newest: i64,
    /// Lease of each key by its newest row.
    leased: BTreeMap<Bytes, i64>,
}

impl Rebuild {
    fn row(&mut self, key: &[u8], value: Bytes) -> Result<(), Error> {
        let (rev, tombstone) = Revision::from_row_key(key).ok_or_else(|| Error::damaged("a row key is no revision"))?;
        let bytes = row_bytes(key, &value);
        let record = decode(&RawKeyValue(value))?;
        if tombstone {
            self.index.restore_delete(&record.key, rev, bytes);
        } else {
            self.index.restore_put(&record.key, rev, record.create_revision, record.version, bytes);
        }
        if record.lease != 0 && !tombstone {
            self.leased.insert(Bytes::copy_from_slice(&record.key), record.lease);
        } else if !self.leased.is_empty() {
            self.leased.remove(&record.key);
        }
        let size = u64::from(bytes) + Sizes::ROW_OVERHEAD;
        self.sizes.total += size;
        self.sizes.in_use += size;
        self.newest = self.newest.max(rev.main);
        Ok(())
    }
}
