//! A database file as a store: of a leader's snapshot, of a backup, of another etcd member.
//!
//! [`prepare`] checks the file and builds a complete, synced store beside the one in use; nothing else changes. After
//! the log's synced snapshot record, which is the commit point, [`switch`] makes it the store in use. A start between
//! the two completes it with [`settle`]; a start before the record deletes it as a leftover
//! ([`StoreDir::open_current`]).
//!
//! Rows are taken as they are, so that hashes agree. Left out are `confState` and `storageVersion`, which our store says
//! elsewhere (`export.rs`). Refused is what this version would misunderstand: newer versions and rows in buckets it
//! does not know.

use bytes::Bytes;
use prost::Message;

use super::{
    Error, backup,
    bbolt::{Reader, Source, Visitor},
    checksum::Checksum,
    export::{CONF_STATE, CONSISTENT_INDEX, STORAGE_VERSION, TERM},
};
use crate::{
    cluster::{Change, Members, Version, ids::hex},
    config::ETCD_VERSION,
    mvcc::{
        Revision,
        record::KeyValue,
        store::{FINISHED_COMPACT_KEY, SCHEDULED_COMPACT_KEY},
    },
    pb::{etcdserverpb::AlarmMember, leasepb, raftpb::ConfState},
    storage::{Bucket, Options, Storage, StoreDir, WriteBatch},
};

/// Rows and bytes of one batch: what is held in memory.
const BATCH_ROWS: usize = 4 << 10;
const BATCH_BYTES: usize = 1 << 20;

/// What a snapshot message says of the file that came with it.
#[derive(Clone, Debug)]
pub struct Expected {
    pub index: u64,
    pub term: u64,
    pub conf_state: ConfState,
    /// `None`: the sender says nothing of it, as etcd.
    pub checksum: Option<Checksum>,
}

/// A complete store that is not in use yet.
#[derive(Debug)]
pub struct Prepared {
    pub index: u64,
    /// 0 if neither the file nor a message says it: etcd below 3.5 does not write it.
    pub term: u64,
    /// Members and cluster version as of that index.
    pub members: Members,
}

/// Builds a store of the rows of `file`. Long: for a thread of its own, one at a time. On an error nothing is left.
pub fn prepare(file: Box<dyn Source>, stores: &StoreDir, expected: Option<&Expected>) -> Result<Prepared, Error> {
    // Where the index is known only from the file, the store is built under a name no index has.
    let building = expected.map_or_else(|| "import".to_owned(), |expected| store_name(expected.index));
    if stores.current()?.as_deref() == Some(&building) {
        return Err(Error::Refused(format!("the store of index {building} is in use already")));
    }
    stores.discard(&building)?;
    let built = build(file, stores, &building, expected);
    if built.is_err() {
        stores.discard(&building)?;
    }
    built
}

fn build(file: Box<dyn Source>, stores: &StoreDir, name: &str, expected: Option<&Expected>) -> Result<Prepared, Error> {
    let options = Options { value_cache_bytes: 0, ..Options::default() };
    let store = stores.build(name, &options)?;
    let prepared = fill(file, &store, expected)?;
    store.sync()?;
    drop(store);
    let final_name = store_name(prepared.index);
    if final_name != name {
        if stores.current()?.as_ref() == Some(&final_name) {
            return Err(Error::Refused(format!("the store of index {final_name} is in use already")));
        }
        stores.discard(&final_name)?;
    }
    stores.complete_as(name, &final_name)?;
    Ok(prepared)
}

/// Makes the prepared store of `index` the one in use. Durable when it returns.
pub fn switch(stores: &StoreDir, index: u64) -> Result<(), Error> {
    let path = stores.path(&store_name(index));
    if !path.try_exists()? {
        return Err(Error::Refused(format!("there is no store {} to go on with", path.display())));
    }
    Ok(stores.switch_to(&store_name(index))?)
}

/// Deletes the prepared store of `index`, which nobody will switch to.
pub fn discard(stores: &StoreDir, index: u64) -> Result<(), Error> {
    Ok(stores.discard(&store_name(index))?)
}

/// At start, before the store is opened: completes an installation that was interrupted behind its commit point.
/// `index` is that of the log's newest snapshot record.
pub fn settle(stores: &StoreDir, index: u64) -> Result<(), Error> {
    let name = store_name(index);
    let is_there = stores.path(&name).try_exists()?;
    match stores.current()? {
        Some(current) if is_there && current != name => {
            tracing::info!(store = name, "completing the installation of a snapshot");
            switch(stores, index)
        }
        _ => Ok(()),
    }
}

fn store_name(index: u64) -> String {
    index.to_string()
}

/// Checks `file` and puts its rows into an empty store, without syncing it.
pub fn fill(file: Box<dyn Source>, store: &dyn Storage, expected: Option<&Expected>) -> Result<Prepared, Error> {
    backup::verify(&*file)?;
    let mut filling = Filling::new(store);
    Reader::open(file)?.read(&mut filling)?;
    let Filling { index, term, mut batch, checksum, .. } = filling;
    if let Some(theirs) = expected.and_then(|expected| expected.checksum).filter(|theirs| *theirs != checksum) {
        return Err(Error::Damaged(format!(
            "the rows of the database file are not those that were sent: {} instead of {}",
            checksum.to_context(),
            theirs.to_context()
        )));
    }
    if index == 0 {
        return Err(Error::Refused("the database file says of no log entry that it was applied".to_owned()));
    }
    if let Some(expected) = expected.filter(|expected| expected.index != index) {
        let text = format!("the database file is of index {index}, the snapshot of {}", expected.index);
        return Err(Error::Refused(text));
    }
    let term = expected.map_or(term, |expected| expected.term);
    if term > 0 {
        batch.put(Bucket::Meta, TERM, Bytes::copy_from_slice(&term.to_be_bytes()));
    }
    store.commit(batch)?;

    let mut members = Members::load(store).map_err(|e| Error::Damaged(e.to_string()))?;
    if let Some(version) = members.cluster_version().filter(|version| *version > own_version()) {
        return Err(newer("cluster", version));
    }
    if let Some(expected) = expected {
        promote(&mut members, &expected.conf_state, store)?;
        let ours = members.conf_state();
        let same = |a: &[u64], b: &[u64]| a.len() == b.len() && a.iter().all(|id| b.contains(id));
        let voters = same(&ours.voters, &expected.conf_state.voters);
        if !voters || !same(&ours.learners, &expected.conf_state.learners) {
            return Err(Error::Refused(format!(
                "the members in the database file (voters {:x?}, learners {:x?}) are not those of the snapshot (voters \
                 {:x?}, learners {:x?})",
                ours.voters, ours.learners, expected.conf_state.voters, expected.conf_state.learners
            )));
        }
    }
    Ok(Prepared { index, term, members })
}

/// etcd 3.5.1 to 3.5.20 left promotions out of their database files: raft knows better (H-31).
fn promote(members: &mut Members, known: &ConfState, store: &dyn Storage) -> Result<(), Error> {
    let mut batch = WriteBatch::default();
    for id in members.conf_state().learners.into_iter().filter(|id| known.voters.contains(id)) {
        tracing::warn!(member = %hex(id), "the database file has a voter as a learner");
        members.apply(Change::Promote(id), usize::MAX, &mut batch).expect("it is a learner");
    }
    Ok(store.commit(batch)?)
}

fn own_version() -> Version {
    let version: Version = ETCD_VERSION.parse().expect("the own version is one");
    version.cluster_version()
}

fn newer(what: &str, version: Version) -> Error {
    Error::Refused(format!("the {what} version of the database file is {version}, this server's is {}", own_version()))
}

/// Puts rows into a store in batches.
struct Filling<'a> {
    store: &'a dyn Storage,
    bucket: Result<Bucket, String>,
    newest: Option<Revision>,
    index: u64,
    term: u64,
    batch: WriteBatch,
    batch_bytes: usize,
    checksum: Checksum,
}

impl<'a> Filling<'a> {
    fn new(store: &'a dyn Storage) -> Self {
        Self {
            store,
            bucket: Err("no bucket".to_owned()),
            newest: None,
            index: 0,
            term: 0,
            batch: WriteBatch::default(),
            batch_bytes: 0,
            checksum: Checksum::default(),
        }
    }

    /// Whether the row is to be stored. `None`: it cannot be read.
    fn check(&mut self, bucket: Bucket, key: &[u8], value: &Bytes) -> Option<Result<bool, Error>> {
        match bucket {
            Bucket::Key => {
                let (revision, _) = Revision::from_row_key(key)?;
                // Two rows of one revision sort as neighbours.
                if revision.main < 0 || revision.sub < 0 || self.newest >= Some(revision) {
                    return None;
                }
                self.newest = Some(revision);
                KeyValue::decode(value.clone()).ok()?;
            }
            Bucket::Lease => {
                let lease = leasepb::Lease::decode(value.clone()).ok()?;
                if key != lease.id.to_be_bytes() {
                    return None;
                }
            }
            Bucket::Alarm => {
                AlarmMember::decode(key).ok()?;
            }
            Bucket::Meta => match key {
                CONF_STATE => return Some(Ok(false)),
                STORAGE_VERSION => {
                    let version: Version = std::str::from_utf8(value).ok()?.parse().ok()?;
                    return Some(if version > own_version() { Err(newer("storage", version)) } else { Ok(false) });
                }
                CONSISTENT_INDEX => self.index = u64::from_be_bytes(value.as_ref().try_into().ok()?),
                TERM => self.term = u64::from_be_bytes(value.as_ref().try_into().ok()?),
                SCHEDULED_COMPACT_KEY | FINISHED_COMPACT_KEY => {
                    Revision::from_row_key(value).filter(|(_, tombstone)| !tombstone)?;
                }
                _ => {}
            },
            // Members and cluster are read as a whole in the end; auth is carried over untouched.
            Bucket::Auth | Bucket::AuthRoles | Bucket::AuthUsers => {}
            Bucket::Cluster | Bucket::Members | Bucket::MembersRemoved => {}
        }
        Some(Ok(true))
    }
}

impl Visitor for Filling<'_> {
    fn bucket(&mut self, name: &[u8]) -> Result<(), Error> {
        self.checksum.bucket(name);
        let known = Bucket::ALL.into_iter().find(|bucket| bucket.name().as_bytes() == name);
        // One without rows may pass.
        self.bucket = known.ok_or_else(|| String::from_utf8_lossy(name).into_owned());
        Ok(())
    }

    fn row(&mut self, key: Bytes, value: Bytes) -> Result<(), Error> {
        self.checksum.row(&key, &value);
        let bucket = match &self.bucket {
            Ok(bucket) => *bucket,
            Err(name) => {
                let text =
                    format!("the database file has rows in the bucket {name:?}, which this version does not know");
                return Err(Error::Refused(text));
            }
        };
        let is_kept = match self.check(bucket, &key, &value) {
            Some(kept) => kept?,
            None => {
                let text = format!("a row of the bucket {:?} cannot be read: {key:02x?}", bucket.name());
                return Err(Error::Damaged(text));
            }
        };
        if is_kept {
            self.batch_bytes += key.len() + value.len();
            self.batch.put(bucket, key, value);
        }
        if self.batch_bytes >= BATCH_BYTES || self.batch.writes.len() >= BATCH_ROWS {
            self.batch_bytes = 0;
            self.store.commit(std::mem::take(&mut self.batch))?;
        }
        Ok(())
    }
}
