//! One watch stream: its watch ids, what is queued for its client, its progress reports.

use std::collections::{BTreeMap, BTreeSet};

use super::slab::Slot;

/// Names a stream within its hub; never used again after the stream is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub(super) u64);

#[derive(Debug)]
pub(super) struct Stream {
    /// Every registered watch id, dead watchers included.
    pub watchers: BTreeMap<i64, Slot>,
    /// Where the search for a free watch id goes on; never goes back.
    next_watch_id: i64,
    /// Watchers that are not dead.
    pub alive: usize,
    /// Watchers for which a progress report up to the hub's revision would be false or early: waiting or behind.
    pub unready: usize,
    pub behind: BTreeSet<Slot>,
    /// The watcher that took the last catch-up step.
    behind_cursor: Slot,
    /// Encoded bytes handed to the shell and not yet taken by the transport.
    pub queued_bytes: usize,
    /// A progress request that waits for an answer, with the revision current when it came.
    pub progress_asked: Option<i64>,
    /// Fixed for the life of the stream, so that streams opened together do not report together for ever.
    pub tick_interval_ms: u64,
    pub next_tick_ms: u64,
}

impl Stream {
    pub fn new(now_ms: u64, tick_interval_ms: u64) -> Self {
        Self {
            watchers: BTreeMap::new(),
            next_watch_id: 0,
            alive: 0,
            unready: 0,
            behind: BTreeSet::new(),
            behind_cursor: 0,
            queued_bytes: 0,
            progress_asked: None,
            tick_interval_ms,
            next_tick_ms: now_ms + tick_interval_ms,
        }
    }

    /// The id for a new watcher; `None` if the one asked for is in use. 0 asks for any.
    pub fn claim_id(&mut self, asked: i64) -> Option<i64> {
        if asked != 0 {
            return (!self.watchers.contains_key(&asked)).then_some(asked);
        }
        while self.watchers.contains_key(&self.next_watch_id) {
            self.next_watch_id += 1;
        }
        self.next_watch_id += 1;
        Some(self.next_watch_id - 1)
    }

    /// The watcher whose turn it is to read history.
    pub fn next_behind(&mut self) -> Option<Slot> {
        let next = self.behind.range(self.behind_cursor + 1..).next().or_else(|| self.behind.first()).copied()?;
        self.behind_cursor = next;
        Some(next)
    }
}
