//! The changes of one key: puts and tombstones in revision order, and the rule that says which of them a
//! compaction condemns. Knows nothing of other keys and nothing of the tree.
//!
//! Most keys have one row, which lies inside the [`History`] itself. Longer ones are a chain of immutable chunks,
//! newest first. The newest chunk is short and is copied when an older clone shares it; full, it is frozen and
//! joined with as many older chunks as are not larger, like the digits of a binary counter. So chunk sizes grow
//! geometrically towards the past: a put copies O(log n) rows on average however long the history, and a look-up
//! walks O(log n) chunks (beyond [`CHUNK_ROWS`] rows: one more per so many rows) and bisects one.

use std::sync::Arc;

use super::Revision;
use crate::sim::{self, Bug};

/// Rows in the newest chunk before it is frozen: what a put copies at most when a view shares the history.
const TAIL_ROWS: usize = 16;
/// Chunks are not joined beyond this: bounds the longest single copy (640 KiB).
const CHUNK_ROWS: usize = if cfg!(test) { 128 } else { 16 << 10 };

/// One change of a key, as much as the index has to know of its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub revision: Revision,
    /// Main revision of the put that began this life of the key; 0 for a tombstone.
    pub created: i64,
    /// Puts since then, this one included; 0 for a tombstone.
    pub version: i64,
    /// Row key + value.
    pub bytes: u32,
    pub tombstone: bool,
}

impl Row {
    pub fn put(revision: Revision, created: i64, version: i64, bytes: u32) -> Self {
        Self { revision, created, version, bytes, tombstone: false }
    }

    pub fn tombstone(revision: Revision, bytes: u32) -> Self {
        Self { revision, created: 0, version: 0, bytes, tombstone: true }
    }

    /// The put that follows `newest`: the next version of a living key, else a new life.
    pub fn put_after(newest: Option<Row>, revision: Revision, bytes: u32) -> Self {
        match newest {
            Some(row) if !row.tombstone => Self::put(revision, row.created, row.version + 1, bytes),
            _ => Self::put(revision, revision.main, 1, bytes),
        }
    }
}

/// Never empty: a key without rows has no history.
#[derive(Clone, Debug)]
pub struct History(Form);

// The index holds one per key; its bytes per key are a promise.
const _: () = assert!(size_of::<History>() == 32);

#[derive(Clone, Debug)]
enum Form {
    /// One put whose numbers fit.
    One {
        main: i64,
        created: i64,
        version: u32,
        sub: u32,
        bytes: u32,
    },
    Many(Arc<Chunk>),
}

#[derive(Debug)]
struct Chunk {
    /// Ascending, never empty, all above the rows of `before`.
    rows: Vec<Row>,
    before: Option<Arc<Chunk>>,
}

const NOT_EMPTY: &str = "a chunk is never empty";

impl History {
    pub fn new(row: Row) -> Self {
        match (row.tombstone, u32::try_from(row.version), u32::try_from(row.revision.sub)) {
            (false, Ok(version), Ok(sub)) => {
                Self(Form::One { main: row.revision.main, created: row.created, version, sub, bytes: row.bytes })
            }
            _ => Self(Form::Many(Arc::new(Chunk { rows: vec![row], before: None }))),
        }
    }

    pub fn newest(&self) -> Row {
        match &self.0 {
            Form::One { main, created, version, sub, bytes } => {
                Row::put(Revision::new(*main, i64::from(*sub)), *created, i64::from(*version), *bytes)
            }
            Form::Many(chunk) => *chunk.rows.last().expect(NOT_EMPTY),
        }
    }

    pub fn is_alive(&self) -> bool {
        match &self.0 {
            Form::One { .. } => true,
            Form::Many(chunk) => !chunk.rows.last().expect(NOT_EMPTY).tombstone,
        }
    }

    /// The newest row with main <= `at`.
    pub fn at(&self, at: i64) -> Option<Row> {
        self.up_to(at).next()
    }

    pub fn row_count(&self) -> usize {
        match &self.0 {
            Form::One { .. } => 1,
            Form::Many(newest) => chunks(newest).map(|chunk| chunk.rows.len()).sum(),
        }
    }

    /// The rows with main <= `at`, newest first.
    pub fn up_to(&self, at: i64) -> Rows<'_> {
        match &self.0 {
            Form::One { main, .. } => Rows { one: (*main <= at).then(|| self.newest()), chunk: None, left: 0 },
            Form::Many(newest) => {
                let chunk = chunks(newest).find(|chunk| chunk.rows[0].revision.main <= at);
                let left = chunk.map_or(0, |chunk| chunk.rows.partition_point(|row| row.revision.main <= at));
                Rows { one: None, chunk, left }
            }
        }
    }

    /// Appends a change, which must be above all others.
    pub fn push(&mut self, row: Row) {
        let newest = self.newest();
        assert!(newest.revision < row.revision, "changes of a key come in revision order");
        match &mut self.0 {
            Form::One { .. } => self.0 = Form::Many(Arc::new(Chunk { rows: vec![newest, row], before: None })),
            Form::Many(tail) if tail.rows.len() >= TAIL_ROWS => {
                *tail = Arc::new(Chunk { rows: vec![row], before: Some(joined(tail)) });
            }
            Form::Many(tail) => match Arc::get_mut(tail) {
                Some(chunk) => chunk.rows.push(row),
                None => {
                    let mut rows = Vec::with_capacity(tail.rows.len() + 1);
                    rows.extend_from_slice(&tail.rows);
                    rows.push(row);
                    *tail = Arc::new(Chunk { rows, before: tail.before.clone() });
                }
            },
        }
    }

    /// Whether a compaction at `at` would take anything away.
    pub fn has_condemned(&self, at: i64) -> bool {
        self.condemned(at).next().is_some()
    }

    /// What a compaction at `at` would take away, newest first.
    pub fn condemned(&self, at: i64) -> impl Iterator<Item = Revision> + '_ {
        let mut newest = true;
        self.up_to(at).filter(move |row| !stays(row, std::mem::take(&mut newest), at)).map(|row| row.revision)
    }

    /// Drops what a compaction at `at` condemns and appends it to `removed`, oldest first. Returns false, and leaves
    /// the history as it was, if nothing would remain. Costs O(rows): what remains is copied.
    pub fn compact(&mut self, at: i64, removed: &mut Vec<(Revision, bool, u32)>) -> bool {
        let first_removed = removed.len();
        let mut rest: Vec<Row> = Vec::new();
        let mut newest = true;
        for row in self.up_to(i64::MAX) {
            if row.revision.main > at || stays(&row, std::mem::take(&mut newest), at) {
                rest.push(row);
            } else {
                removed.push((row.revision, row.tombstone, row.bytes));
            }
        }
        removed[first_removed..].reverse();
        if rest.is_empty() {
            return false;
        }
        if removed.len() > first_removed {
            rest.reverse();
            *self = Self::from_rows(&rest);
        }
        true
    }

    /// The row of this key in the set *keep* of the hash rule.
    ///
    /// The rule looks at the first lifetime whose tombstone is >= `at`, else the open one, and takes its newest row
    /// <= `at` unless that is the closing tombstone. If a tombstone is at exactly `at`, the first such closes that
    /// lifetime and nothing is kept. Otherwise no tombstone lies between the newest row <= `at` and that lifetime's
    /// end, so the row belongs to it, unless it is a tombstone itself: then the lifetime began after `at`.
    pub fn kept_by_hash(&self, at: i64) -> Option<Revision> {
        let row = self.at(at).filter(|row| !row.tombstone)?;
        let ended_at = self.up_to(at).take_while(|row| row.revision.main == at).any(|row| row.tombstone);
        (!ended_at).then_some(row.revision)
    }

    fn from_rows(rows: &[Row]) -> Self {
        if let [row] = rows {
            return Self::new(*row);
        }
        let mut newest: Option<Arc<Chunk>> = None;
        for rows in rows.chunks(CHUNK_ROWS) {
            newest = Some(Arc::new(Chunk { rows: rows.to_vec(), before: newest }));
        }
        Self(Form::Many(newest.expect("a history is never empty")))
    }
}

/// Whether `row`, which is <= `at`, outlives a compaction at `at`; `newest`: none <= `at` is newer. Every tombstone at
/// `at` stays, also if the same revision put the key again: a watch from `at` still sees it, and the lifetimes that
/// the hash rule looks at do not depend on how far the clean-up is.
fn stays(row: &Row, newest: bool, at: i64) -> bool {
    // Both of these need that deletions at the compaction's revision go.
    let is_taken = sim::has(Bug::CompactionTakesDelete) || sim::has(Bug::RevisionGoesDown);
    if row.tombstone { row.revision.main == at && !is_taken } else { newest }
}

/// The frozen `tail` together with the chunks before it that are not larger than what has been gathered.
fn joined(tail: &Arc<Chunk>) -> Arc<Chunk> {
    let mut run = vec![tail];
    let mut total = tail.rows.len();
    while let Some(before) = &run[run.len() - 1].before {
        if before.rows.len() > total || total + before.rows.len() > CHUNK_ROWS {
            break;
        }
        total += before.rows.len();
        run.push(before);
    }
    if run.len() == 1 {
        return tail.clone();
    }
    let mut rows = Vec::with_capacity(total);
    for chunk in run.iter().rev() {
        rows.extend_from_slice(&chunk.rows);
    }
    Arc::new(Chunk { rows, before: run[run.len() - 1].before.clone() })
}

fn chunks(newest: &Chunk) -> impl Iterator<Item = &Chunk> {
    std::iter::successors(Some(newest), |chunk| chunk.before.as_deref())
}

/// Rows of one history, newest first.
pub struct Rows<'a> {
    one: Option<Row>,
    chunk: Option<&'a Chunk>,
    /// Rows of `chunk` still to come.
    left: usize,
}

impl Iterator for Rows<'_> {
    type Item = Row;

    fn next(&mut self) -> Option<Row> {
        if let Some(row) = self.one.take() {
            return Some(row);
        }
        let mut chunk = self.chunk?;
        if self.left == 0 {
            chunk = chunk.before.as_deref()?;
            self.chunk = Some(chunk);
            self.left = chunk.rows.len();
        }
        self.left -= 1;
        Some(chunk.rows[self.left])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(main: i64) -> Row {
        Row::put(Revision::new(main, 0), 1, main, 10)
    }

    fn many(count: i64) -> History {
        let mut history = History::new(put(1));
        for main in 2..=count {
            history.push(put(main));
        }
        history
    }

    fn chunk_sizes(history: &History) -> Vec<usize> {
        match &history.0 {
            Form::One { .. } => vec![],
            Form::Many(newest) => chunks(newest).map(|chunk| chunk.rows.len()).collect(),
        }
    }

    #[test]
    fn every_revision_of_a_long_history_is_found() {
        let history = many(5_000);
        assert_eq!(history.row_count(), 5_000);
        assert_eq!(history.at(0), None);
        for main in 1..=5_000 {
            assert_eq!(history.at(main), Some(put(main)));
        }
        assert_eq!(history.at(9_999), Some(put(5_000)));
        assert!(history.up_to(77).map(|row| row.revision.main).eq((1..=77).rev()));
    }

    #[test]
    fn chunks_grow_geometrically_to_a_bound() {
        for count in [17, 100, 127, 129, 1_000, 4_321] {
            let sizes = chunk_sizes(&many(count));
            assert_eq!(sizes.iter().sum::<usize>(), count as usize);
            assert!(sizes.iter().all(|&size| size <= CHUNK_ROWS));
            let small = sizes.iter().filter(|&&size| size < CHUNK_ROWS).count();
            assert!(small <= 2 + (CHUNK_ROWS / TAIL_ROWS).ilog2() as usize, "{sizes:?}");
        }
    }

    #[test]
    fn push_leaves_clones_alone() {
        let mut history = many(16);
        let mut clones = vec![history.clone()];
        for main in 17..300 {
            history.push(put(main));
            clones.push(history.clone());
        }
        for (i, clone) in clones.iter().enumerate() {
            assert_eq!(clone.newest(), put(16 + i as i64));
            assert_eq!(clone.row_count(), 16 + i);
        }
    }

    #[test]
    fn numbers_beyond_32_bits_are_kept() {
        for row in [
            Row::put(Revision::new(1 << 40, 1 << 40), 7, 1 << 40, u32::MAX),
            Row::put(Revision::new(9, 3), 7, i64::from(u32::MAX), 1),
            Row::tombstone(Revision::new(9, 3), 1),
        ] {
            assert_eq!(History::new(row).newest(), row);
        }
    }

    #[test]
    fn compaction_returns_to_the_small_form() {
        let mut history = many(400);
        let mut removed = Vec::new();
        assert!(history.has_condemned(399));
        assert!(history.compact(400, &mut removed));
        assert!(removed.iter().map(|(revision, ..)| revision.main).eq(1..400));
        assert!(matches!(history.0, Form::One { version: 400, created: 1, .. }));
        assert!(!history.has_condemned(400));
    }
}
