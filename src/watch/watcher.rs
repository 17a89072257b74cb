//! One watcher.

use std::sync::Arc;

use super::stream::StreamId;
use crate::{
    mvcc::{KeyRange, change::Change},
    pb::etcdserverpb::{WatchCreateRequest, watch_create_request::FilterType},
};

/// The keys that a create request asks to watch: an empty key stands for the first possible key. The permission check
/// must look at this range, not at the raw fields.
pub fn watched_range(create: &WatchCreateRequest) -> KeyRange<'_> {
    let key: &[u8] = if create.key.is_empty() { &[0] } else { &create.key };
    KeyRange::new(key, &create.range_end)
}

/// An owned [`KeyRange`], shared between the watcher and the key index and between watchers of one range.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SharedRange {
    pub key: Arc<[u8]>,
    pub end: Arc<[u8]>,
}

impl SharedRange {
    pub fn new(range: KeyRange<'_>) -> Self {
        let end = if range.end.is_empty() { Arc::default() } else { range.end.into() };
        Self { key: range.key.into(), end }
    }

    pub fn as_range(&self) -> KeyRange<'_> {
        KeyRange::new(&self.key, &self.end)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Fed from published messages.
    Live,
    /// Fed from published messages too, but the hub is still below the watcher's gate: no progress reports yet.
    Waiting,
    /// Reads history.
    Behind,
    /// Cancelled by a compaction; only keeps its watch id until the client cancels it.
    Dead,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub prev_kv: bool,
    pub fragment: bool,
    pub progress_notify: bool,
    pub no_put: bool,
    pub no_delete: bool,
}

impl Options {
    pub fn of(create: &WatchCreateRequest) -> Self {
        Self {
            prev_kv: create.prev_kv,
            fragment: create.fragment,
            progress_notify: create.progress_notify,
            no_put: create.filters.contains(&(FilterType::Noput as i32)),
            no_delete: create.filters.contains(&(FilterType::Nodelete as i32)),
        }
    }
}

#[derive(Debug)]
pub(super) struct Watcher {
    pub stream: StreamId,
    pub id: i64,
    pub range: SharedRange,
    /// No event below this revision is due any more. Of a live or waiting watcher it is only a lower bound: all that
    /// the hub has published since has been delivered too.
    pub next: i64,
    /// Progress reports are allowed once the hub is at this revision.
    pub gate: i64,
    pub state: State,
    pub options: Options,
    /// Had no events since the last tick of its stream.
    pub quiet: bool,
}

impl Watcher {
    pub fn passes(&self, change: &Change) -> bool {
        if change.delete { !self.options.no_delete } else { !self.options.no_put }
    }

    /// True if the watcher gets `change` when it is published.
    pub fn takes_live(&self, change: &Change) -> bool {
        matches!(self.state, State::Live | State::Waiting) && self.next <= change.revision.main && self.passes(change)
    }
}
