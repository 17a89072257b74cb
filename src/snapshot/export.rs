//! The state of this member at one moment as a database file with etcd's buckets.
//!
//! Nearly all rows are stored as they go out. Two rows of `meta` are made here, because the store says the same
//! elsewhere and two spellings could disagree: `confState` from the `members` rows, `storageVersion` from the
//! cluster version. Rows that a compaction has condemned and clean-up has not reached yet go along, and so do the two
//! compaction marks of the same moment, by which whoever takes the file over completes the clean-up, as after a crash.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Serialize;

use super::{
    Error,
    bbolt::{Layout, Writer},
};
use crate::{
    cluster::Members,
    pb::raftpb::ConfState,
    storage::{self, Bucket, Snapshot, Storage},
};

/// Meta row: the raft index up to which the rows are.
pub(super) const CONSISTENT_INDEX: &[u8] = b"consistent_index";
/// Meta row: term of that index.
pub(super) const TERM: &[u8] = b"term";
/// Meta row: raft's configuration as JSON.
pub(super) const CONF_STATE: &[u8] = b"confState";
/// Meta row: the version of the file's layout.
pub(super) const STORAGE_VERSION: &[u8] = b"storageVersion";

/// Rows between two looks whether somebody still waits.
const ROWS_BETWEEN_LOOKS: u32 = 1 << 12;

/// The rows of one moment. Holds the engine's rows as they were then, so it should not live longer than needed.
pub struct Export {
    rows: Box<dyn Snapshot>,
    meta: BTreeMap<Vec<u8>, Bytes>,
    members: Members,
}

impl Export {
    /// Takes the rows as they stand now: every batch committed before the call, none after it. Cheap.
    pub fn take(storage: &dyn Storage) -> Result<Self, storage::Error> {
        let rows = storage.snapshot();
        let members = Members::load_snapshot(&*rows)?;
        let mut meta = BTreeMap::new();
        rows.scan(Bucket::Meta, &[], &[], &mut |key, value| {
            meta.insert(key.to_vec(), value);
            true
        })?;
        meta.insert(CONF_STATE.to_vec(), conf_state_json(&members.conf_state()).into());
        match members.storage_version() {
            Some(version) => meta.insert(STORAGE_VERSION.to_vec(), version.to_string().into()),
            None => meta.remove(STORAGE_VERSION),
        };
        Ok(Self { rows, meta, members })
    }

    /// The raft index whose state this is.
    pub fn index(&self) -> u64 {
        self.number(CONSISTENT_INDEX)
    }

    /// The term of that index.
    pub fn term(&self) -> u64 {
        self.number(TERM)
    }

    /// Members and cluster version at that index.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// As `storageVersion` has it; empty for a cluster below 3.6 or of undecided version.
    pub fn version(&self) -> String {
        self.members.storage_version().map_or_else(String::new, |version| version.to_string())
    }

    /// Looks at all rows to find the file's length. Ends early when `is_wanted` says no.
    pub fn measure(&self, is_wanted: &mut dyn FnMut() -> bool) -> Result<Layout, Error> {
        let mut rows = 0;
        self.fill(Writer::measure(), &mut || {
            rows += 1;
            rows % ROWS_BETWEEN_LOOKS != 0 || is_wanted()
        })
    }

    /// Sends the file in chunks of [`super::bbolt::CHUNK`] bytes; an error of `sink` ends it.
    pub fn send(&self, layout: &Layout, sink: &mut dyn FnMut(Bytes) -> Result<(), Error>) -> Result<(), Error> {
        let written = self.fill(Writer::stream(layout, sink), &mut || true)?;
        assert_eq!(written, *layout, "the rows of a snapshot do not change");
        Ok(())
    }

    fn fill(&self, mut writer: Writer<'_>, go_on: &mut dyn FnMut() -> bool) -> Result<Layout, Error> {
        for bucket in Bucket::ALL {
            writer.bucket(bucket.name().as_bytes())?;
            if bucket == Bucket::Meta {
                self.meta.iter().try_for_each(|(key, value)| writer.row(key, value))?;
                continue;
            }
            let mut done = Ok(());
            self.rows.scan(bucket, &[], &[], &mut |key, value| {
                done = if go_on() { writer.row(key, &value) } else { Err(Error::Gone) };
                done.is_ok()
            })?;
            done?;
        }
        writer.finish()
    }

    fn number(&self, key: &[u8]) -> u64 {
        let row = self.meta.get(key).and_then(|row| row.as_ref().try_into().ok());
        row.map_or(0, u64::from_be_bytes)
    }
}

fn conf_state_json(state: &ConfState) -> Vec<u8> {
    /// The order of the fields is part of the format.
    #[derive(Serialize)]
    struct Json<'a> {
        #[serde(skip_serializing_if = "<[u64]>::is_empty")]
        voters: &'a [u64],
        #[serde(skip_serializing_if = "<[u64]>::is_empty")]
        learners: &'a [u64],
        auto_leave: bool,
    }
    let json = Json { voters: &state.voters, learners: &state.learners, auto_leave: false };
    serde_json::to_vec(&json).expect("numbers always encode")
}
