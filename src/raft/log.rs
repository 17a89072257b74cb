//! The log as raft-rs reads it: recent entries in memory, older ones dropped once a checkpoint covers them.

use std::collections::VecDeque;

use raft::{
    Error, GetEntriesContext, RaftState, Result, Storage, StorageError,
    eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata},
};

/// Entries after `compacted`, in memory. Durability is the WAL's business.
pub struct MemLog {
    entries: VecDeque<Entry>,
    /// Bytes of entry data held.
    bytes: usize,
    /// Index and term of the entry just before the first one held.
    compacted: (u64, u64),
    pub hard_state: HardState,
    pub conf_state: ConfState,
    /// What a snapshot for a member that is too far behind covers at least.
    pub applied: u64,
}

/// What an entry costs in memory beside its data.
const ENTRY_OVERHEAD: usize = 128;

impl MemLog {
    pub fn new(compacted: (u64, u64), entries: Vec<Entry>, hard_state: HardState, conf_state: ConfState) -> Self {
        let mut log =
            Self { entries: VecDeque::new(), bytes: 0, compacted, hard_state, conf_state, applied: compacted.0 };
        log.append(entries);
        log
    }

    fn first(&self) -> u64 {
        self.compacted.0 + 1
    }

    pub fn last(&self) -> u64 {
        self.compacted.0 + self.entries.len() as u64
    }

    /// Appends, cutting off whatever lies at or above the first new index.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.compacted.0, "entries below the compacted index are committed and never replaced");
        assert!(first.index <= self.last() + 1, "gap in the log before index {}", first.index);
        while self.last() >= first.index {
            if let Some(cut) = self.entries.pop_back() {
                self.bytes -= cut.data.len() + ENTRY_OVERHEAD;
            }
        }
        for entry in entries {
            self.bytes += entry.data.len() + ENTRY_OVERHEAD;
            self.entries.push_back(entry);
        }
    }

    /// Drops entries up to `index`.
    pub fn compact(&mut self, index: u64) {
        while self.compacted.0 < index
            && let Some(entry) = self.entries.pop_front()
        {
            self.bytes -= entry.data.len() + ENTRY_OVERHEAD;
            self.compacted = (entry.index, entry.term);
        }
    }

    /// Starts again behind a snapshot another member sent.
    pub fn install(&mut self, index: u64, term: u64, conf_state: ConfState) {
        self.entries.clear();
        self.bytes = 0;
        self.compacted = (index, term);
        self.conf_state = conf_state;
    }

    /// The highest index <= `applied` up to which the log may be dropped so that `keep` entries, but no more than
    /// `keep_bytes`, stay behind `applied`.
    pub fn compactable(&self, applied: u64, keep: u64, keep_bytes: usize) -> u64 {
        let mut index = applied.saturating_sub(keep).max(self.compacted.0);
        let mut held = self.bytes;
        for entry in self.entries.iter().take_while(|e| e.index <= applied) {
            if held <= keep_bytes && entry.index > index {
                break;
            }
            held -= entry.data.len() + ENTRY_OVERHEAD;
            index = index.max(entry.index);
        }
        index
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Storage for MemLog {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low < self.first() {
            return Err(Error::Store(StorageError::Compacted));
        }
        assert!(high <= self.last() + 1, "raft asked for entries up to {high}, the log ends at {}", self.last());
        let max = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0;
        let from = (low - self.first()) as usize;
        let mut found = Vec::new();
        for entry in self.entries.range(from..(high - self.first()) as usize) {
            // Near enough to the encoded size; at least one entry always goes.
            size += entry.data.len() as u64 + 24;
            if size > max && !found.is_empty() {
                break;
            }
            found.push(entry.clone());
        }
        Ok(found)
    }

    fn term(&self, index: u64) -> Result<u64> {
        if index == self.compacted.0 {
            return Ok(self.compacted.1);
        }
        if index < self.compacted.0 {
            return Err(Error::Store(StorageError::Compacted));
        }
        match self.entries.get((index - self.first()) as usize) {
            Some(entry) => Ok(entry.term),
            None => Err(Error::Store(StorageError::Unavailable)),
        }
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last())
    }

    /// Only the order to send one: index and membership of the least it must cover.
    fn snapshot(&self, request_index: u64, _: u64) -> Result<Snapshot> {
        match self.term(self.applied) {
            Ok(term) if self.applied >= request_index.max(1) => {
                let metadata = SnapshotMetadata {
                    conf_state: Some(self.conf_state.clone()).into(),
                    index: self.applied,
                    term,
                    ..Default::default()
                };
                Ok(Snapshot { metadata: Some(metadata).into(), ..Default::default() })
            }
            _ => Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: vec![0; 10].into(), ..Default::default() }
    }

    fn log(entries: std::ops::RangeInclusive<u64>) -> MemLog {
        let first = *entries.start();
        MemLog::new((first - 1, 1), entries.map(|i| entry(i, 1)).collect(), HardState::default(), ConfState::default())
    }

    #[test]
    fn later_entries_replace_a_divergent_tail() {
        let mut log = log(1..=5);
        log.append(vec![entry(4, 2)]);
        assert_eq!((log.last(), log.term(4).unwrap(), log.term(3).unwrap()), (4, 2, 1));
        assert_eq!(log.bytes(), 4 * (10 + ENTRY_OVERHEAD));
    }

    #[test]
    fn compacted_index_keeps_its_term() {
        let mut log = log(1..=5);
        log.compact(3);
        assert_eq!((log.first_index().unwrap(), log.term(3).unwrap(), log.entries.len()), (4, 1, 2));
        assert!(matches!(log.term(2), Err(Error::Store(StorageError::Compacted))));
        assert!(matches!(log.term(6), Err(Error::Store(StorageError::Unavailable))));
        assert!(log.entries(3, 5, None, GetEntriesContext::empty(false)).is_err());
        assert_eq!(log.entries(4, 6, None, GetEntriesContext::empty(false)).unwrap().len(), 2);
        assert_eq!(log.entries(4, 6, 1, GetEntriesContext::empty(false)).unwrap().len(), 1);
    }

    #[test]
    fn entries_and_bytes_both_bound_what_stays() {
        let log = log(1..=100);
        assert_eq!(log.compactable(90, 20, usize::MAX), 70);
        assert_eq!(log.compactable(90, 200, usize::MAX), 0);
        let one = 10 + ENTRY_OVERHEAD;
        assert_eq!(log.compactable(90, 200, 30 * one), 70, "30 entries of the 100 may stay");
        assert_eq!(log.compactable(90, 200, 0), 90, "never above what is applied");
    }
}
