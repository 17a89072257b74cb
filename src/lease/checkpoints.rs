//! When to replicate how much time a long lease has left, so that a new leader goes on from there (off by default).

use std::collections::BTreeSet;

use crate::sim::{HashMap, HashSet};

/// A lease is checkpointed each time this has passed since its grant, renewal or last checkpoint.
pub const INTERVAL_MS: u64 = 300_000;
/// Leases in one proposal.
pub(super) const BATCH_LEASES_MAX: usize = 1_000;
/// Proposals in one second.
pub(super) const BATCHES_PER_SECOND_MAX: u32 = 1_000;

#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    /// `None`: off.
    interval_ms: Option<u64>,
    /// Leases that live longer than the interval.
    long: HashMap<i64, Schedule>,
    /// One `(queued_at, id)` for each of `long`, `queued_at` being at or before the time the checkpoint is due.
    due: BTreeSet<(u64, i64)>,
    /// Leases with a checkpoint that a renewal has to take back. Kept also when checkpoints are off: an earlier
    /// leader may have had them on.
    written: HashSet<i64>,
    /// The second that `batches` counts.
    second: u64,
    batches: u32,
}

#[derive(Debug)]
struct Schedule {
    /// Time of the grant, renewal or checkpoint, whichever came last.
    quiet_since: u64,
    queued_at: u64,
}

impl Checkpoints {
    pub fn new(interval_ms: Option<u64>) -> Self {
        Self { interval_ms, ..Self::default() }
    }

    pub fn clear(&mut self) {
        *self = Self::new(self.interval_ms);
    }

    pub fn insert(&mut self, id: i64, ttl_ms: u64, written: bool, now: u64) {
        self.remove(id);
        if written {
            self.written.insert(id);
        }
        if let Some(interval) = self.interval_ms
            && ttl_ms > interval
        {
            let queued_at = now + interval;
            self.long.insert(id, Schedule { quiet_since: now, queued_at });
            self.due.insert((queued_at, id));
        }
    }

    pub fn remove(&mut self, id: i64) {
        self.written.remove(&id);
        if let Some(schedule) = self.long.remove(&id) {
            self.due.remove(&(schedule.queued_at, id));
        }
    }

    /// Whether a checkpoint has to be taken back.
    pub fn on_renewed(&mut self, id: i64, now: u64) -> bool {
        if let Some(schedule) = self.long.get_mut(&id) {
            schedule.quiet_since = now;
        }
        self.written.remove(&id)
    }

    pub fn next_at(&self) -> Option<u64> {
        let due = self.due.first()?.0;
        let exhausted = self.batches >= BATCHES_PER_SECOND_MAX && due / 1000 <= self.second;
        Some(if exhausted { (self.second + 1) * 1000 } else { due })
    }

    /// The next batch for a proposal: each lease with the seconds it has left. `left` tells them; `None`
    /// if the lease has ended or still has all its time.
    pub fn next_batch(&mut self, now: u64, left: impl Fn(i64) -> Option<i64>) -> Vec<(i64, i64)> {
        let mut batch = Vec::new();
        if self.second != now / 1000 {
            (self.second, self.batches) = (now / 1000, 0);
        }
        let Some(interval) = self.interval_ms.filter(|_| self.batches < BATCHES_PER_SECOND_MAX) else { return batch };
        while batch.len() < BATCH_LEASES_MAX
            && let Some(&(queued_at, id)) = self.due.first()
            && queued_at <= now
        {
            self.due.pop_first();
            let schedule = self.long.get_mut(&id).expect("what is due is scheduled");
            if schedule.quiet_since + interval <= now {
                schedule.quiet_since = now;
                if let Some(seconds) = left(id) {
                    batch.push((id, seconds));
                    self.written.insert(id);
                }
            }
            schedule.queued_at = schedule.quiet_since + interval;
            self.due.insert((schedule.queued_at, id));
        }
        self.batches += u32::from(!batch.is_empty());
        batch
    }
}
