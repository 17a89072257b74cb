//! An immutable picture of the key space, published after each batch.

use super::{hash::CompactionHashes, index::Index};

/// Everything a reader needs of the key space. Holds no storage snapshot: rows are immutable, and only clean-up
/// below `compact_revision` deletes them.
#[derive(Clone, Debug)]
pub struct View {
    pub revision: i64,
    /// -1 before the first compaction.
    pub compact_revision: i64,
    pub index: Index,
    pub sizes: Sizes,
    pub hashes: CompactionHashes,
}

/// Logical sizes: 16 KiB + the sum of row key + row value + 16 over rows. Equal on equal histories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Over all rows, condemned ones that are not yet deleted included.
    pub total: u64,
    /// Over the rows that no compaction has condemned.
    pub in_use: u64,
}

impl Sizes {
    pub const EMPTY: Sizes = Sizes { total: 16 << 10, in_use: 16 << 10 };
    /// Counted for each row beside its key and value.
    pub const ROW_OVERHEAD: u64 = 16;
}
