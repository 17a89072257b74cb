//! What a hub reads of the past.

use std::sync::Arc;

use crate::{
    apply::ViewCell,
    mvcc::{self, KeyRange, Revision, change::Change, record::RawKeyValue, replay, view::View},
    storage::{self, Storage},
};

/// The newest published view and the rows behind it.
pub trait History {
    /// The newest published view; never older than the last message the hub got.
    fn view(&self) -> &View;

    /// The changes of keys in `range` from main revision `from` on, ascending, up to the view's revision.
    ///
    /// Whole revisions only: it stops after the revision in which a part of `limit` is reached. It may stop
    /// earlier, even with no change at all, as long as `next_from` moves on: that bounds the time of one call.
    /// [`HistoryError::Compacted`] if `from` is below the compact revision, also if that became so during the
    /// call: a row that clean-up has taken away must never be missing silently.
    fn changes(&mut self, range: KeyRange<'_>, from: i64, limit: HistoryLimit) -> Result<HistoryPage, HistoryError>;

    /// The stored record of a put; `None` if compaction has taken it away.
    fn record(&mut self, revision: Revision) -> Result<Option<RawKeyValue>, storage::Error>;
}

#[derive(Clone, Copy, Debug)]
pub struct HistoryLimit {
    /// Distinct main revisions.
    pub revisions: usize,
    /// Encoded events.
    pub bytes: usize,
}

#[derive(Debug)]
pub struct HistoryPage {
    pub changes: Vec<Change>,
    /// Every change below this revision has been delivered. Above the `from` asked for; at most the view's
    /// revision + 1.
    pub next_from: i64,
}

#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("history before revision {compact_revision} has been compacted")]
    Compacted { compact_revision: i64 },
    #[error(transparent)]
    Storage(#[from] storage::Error),
}

/// The store as the hub reads it.
pub struct StoreHistory {
    /// `None` while nobody reads: an old view would keep what has been deleted since.
    view: Option<Arc<View>>,
    pub(super) cell: ViewCell,
    storage: Arc<dyn Storage>,
}

impl StoreHistory {
    pub fn new(cell: ViewCell, storage: Arc<dyn Storage>) -> Self {
        let view = Some(cell.load().kv.clone());
        Self { view, cell, storage }
    }

    /// The view in use.
    pub(super) fn current(&self) -> &Arc<View> {
        self.view.as_ref().expect("a view is taken up before history is read")
    }

    /// No view is in use until the next [`Self::refresh`].
    pub fn let_go(&mut self) {
        self.view = None;
    }

    /// From now on the newest view is read.
    pub fn refresh(&mut self) {
        self.view = Some(self.cell.load().kv.clone());
    }
}

impl History for StoreHistory {
    fn view(&self) -> &View {
        self.current()
    }

    fn changes(&mut self, range: KeyRange<'_>, from: i64, limit: HistoryLimit) -> Result<HistoryPage, HistoryError> {
        let bound = replay::Limit { changes: limit.revisions, bytes: limit.bytes };
        loop {
            let found = replay::changes(self.view(), &*self.storage, range, from, self.view().revision, bound);
            // Clean-up may have taken rows that an older view still names: the newest view then says so.
            self.refresh();
            let compact_revision = self.view().compact_revision;
            if from < compact_revision {
                return Err(HistoryError::Compacted { compact_revision });
            }
            match found {
                Ok(page) => return Ok(HistoryPage { changes: page.changes, next_from: page.next }),
                // Each try has a newer view, and compactions are far between.
                Err(mvcc::Error::ViewOutdated) => {}
                Err(e) => return Err(HistoryError::Storage(storage::Error::Fatal(e.to_string()))),
            }
        }
    }

    fn record(&mut self, revision: Revision) -> Result<Option<RawKeyValue>, storage::Error> {
        mvcc::range::record(&*self.storage, revision).map_err(|e| storage::Error::Fatal(e.to_string()))
    }
}
