//! What the simulation switches on and looks at inside the cores: bugs it must find, and marks of rare branches.
//!
//! Only with the feature `sim`, which tests alone turn on. In every other build [`has`] is a constant and [`mark`] is
//! nothing, so neither is in a server that anybody runs. Both belong to the thread that asks: one simulated cluster
//! runs in one thread.

/// A mistake that somebody has made before, or could. The numbers are those of etcd's record of correctness bugs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// H-1: the applied index is durable before the data of its entries.
    AppliedIndexBeforeData,
    /// H-2: an entry counts as written before it is.
    AckBeforeSync,
    /// H-4: data is committed without the applied index that belongs to it, while condemned rows are deleted.
    DataWithoutAppliedIndex,
    /// H-5: a progress report does not wait for watchers that are behind.
    ProgressOvertakesEvents,
    /// H-6: watchers go back when a snapshot moves the revision on.
    WatchGoesBack,
    /// H-7: a catch-up repeats the revision it ended with.
    EventTwice,
    /// H-8: what a slow watcher had no room for counts as sent.
    SlowWatcherLosesEvents,
    /// H-9: the revision at start is that of the newest row, though a compaction has taken newer ones.
    RevisionGoesDown,
    /// H-10: a compaction takes the deletion at its own revision.
    CompactionTakesDelete,
    /// H-11: entries in hand survive a snapshot that covers them.
    SnapshotKeepsEntries,
    /// H-12: transactions of other members' clients are not checked.
    UncheckedTxn,
    /// H-13: a compaction that goes on after a restart goes too far.
    ResumedCompaction,
    /// H-14: a watcher of the future hears of progress before its start.
    EarlyProgress,
    /// H-15: a watcher of the future gets what is before its start when the revision jumps.
    EarlyEvents,
    /// H-16: writes go to the store before the snapshot.
    InstallKeepsOldStore,
    /// H-17: a read round that is asked again keeps its name.
    RepeatedReadContext,
    /// H-24: the log is dropped up to what is applied, not to what is synced.
    LogDroppedTooEarly,
    /// H-27: members delete the keys of a lease in different orders.
    RevokeOrder,
    /// H-33: apply answers a membership change itself, whatever raft has in force.
    AnswerBeforeInForce,
    /// H-40: a leader's decision by its own clock outlives its leadership.
    RevokeAfterLeadership,
    /// The log is never synced.
    NoSync,
}

impl Bug {
    pub const ALL: [Bug; 21] = [
        Bug::AppliedIndexBeforeData,
        Bug::AckBeforeSync,
        Bug::DataWithoutAppliedIndex,
        Bug::ProgressOvertakesEvents,
        Bug::WatchGoesBack,
        Bug::EventTwice,
        Bug::SlowWatcherLosesEvents,
        Bug::RevisionGoesDown,
        Bug::CompactionTakesDelete,
        Bug::SnapshotKeepsEntries,
        Bug::UncheckedTxn,
        Bug::ResumedCompaction,
        Bug::EarlyProgress,
        Bug::EarlyEvents,
        Bug::InstallKeepsOldStore,
        Bug::RepeatedReadContext,
        Bug::LogDroppedTooEarly,
        Bug::RevokeOrder,
        Bug::AnswerBeforeInForce,
        Bug::RevokeAfterLeadership,
        Bug::NoSync,
    ];
}

/// What hash maps of cores hash with. Nobody foresees their order; in a simulation each has its own, the same in every
/// run, so that whatever follows from an order differs between members there, too.
#[cfg(feature = "sim")]
type Hasher = switches::Keyed;
#[cfg(not(feature = "sim"))]
type Hasher = std::hash::RandomState;

pub type HashMap<K, V> = std::collections::HashMap<K, V, Hasher>;
pub type HashSet<T> = std::collections::HashSet<T, Hasher>;

#[cfg(feature = "sim")]
mod switches {
    use std::{
        cell::{Cell, RefCell},
        collections::BTreeMap,
        hash::{BuildHasher, DefaultHasher, Hasher},
    };

    use super::Bug;

    thread_local! {
        static SEEDED: Cell<Option<Bug>> = const { Cell::new(None) };
        static MAPS: Cell<u64> = const { Cell::new(0) };
        static MARKS: RefCell<BTreeMap<&'static str, u64>> = const { RefCell::new(BTreeMap::new()) };
    }

    /// From now on this thread's cores have this bug, or none. Another run begins: its maps are counted anew.
    pub fn seed(bug: Option<Bug>) {
        SEEDED.set(bug);
        MAPS.set(0);
    }

    /// Hashes in the way of one map: the key is how many this thread made before.
    #[derive(Clone, Debug)]
    pub struct Keyed(u64);

    impl Default for Keyed {
        fn default() -> Self {
            Self(MAPS.replace(MAPS.get() + 1))
        }
    }

    impl BuildHasher for Keyed {
        type Hasher = DefaultHasher;

        fn build_hasher(&self) -> DefaultHasher {
            let mut hasher = DefaultHasher::new();
            hasher.write_u64(self.0);
            hasher
        }
    }

    /// Whether this thread's cores have this bug.
    pub fn has(bug: Bug) -> bool {
        SEEDED.get() == Some(bug)
    }

    /// Counts that this branch was taken.
    pub fn mark(branch: &'static str) {
        MARKS.with_borrow_mut(|marks| *marks.entry(branch).or_default() += 1);
    }

    /// How often each marked branch was taken in this thread since the last call.
    pub fn take_marks() -> BTreeMap<&'static str, u64> {
        MARKS.take()
    }
}

#[cfg(feature = "sim")]
pub use switches::{has, mark, seed, take_marks};

#[cfg(not(feature = "sim"))]
pub const fn has(_: Bug) -> bool {
    false
}

#[cfg(not(feature = "sim"))]
pub const fn mark(_: &'static str) {}
