//! What the raft actor tells the rest of the process: plain atomics, written by it alone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;

use tokio::sync::Notify;

/// A gap of so many ticks is a pause: others may meanwhile have elected another leader (L-11).
const PAUSE: u32 = 3;

#[derive(Debug, Default)]
pub struct Status {
    /// Time between ticks, as it should be.
    tick: Duration,
    pauses: AtomicU64,
    term: AtomicU64,
    leader: AtomicU64,
    commit: AtomicU64,
    last_index: AtomicU64,
    is_leader: AtomicBool,
    is_learner: AtomicBool,
    is_alone: AtomicBool,
    alone_from: AtomicU64,
    pub leader_changes: AtomicU64,
    pub proposals_pending: AtomicU64,
    pub proposals_failed: AtomicU64,
    pub proposals_committed: AtomicU64,
    pub reads_pending: AtomicU64,
    pub messages_refused: AtomicU64,
    /// Messages of other members for which there was no room.
    pub messages_dropped: AtomicU64,
    pub heartbeat_send_failures: AtomicU64,
    /// When the present leader was found.
    leader_since: ArcSwapOption<Instant>,
    /// When raft last ticked.
    ticked: ArcSwapOption<Instant>,
    /// A tick is on its way to raft.
    pub tick_pending: AtomicBool,
    /// Told after every change of term, leader or role.
    changed: Notify,
}

/// One reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    pub term: u64,
    /// 0: none known.
    pub leader: u64,
    pub commit: u64,
    pub last_index: u64,
    pub is_leader: bool,
    pub is_learner: bool,
    /// This member is the only one, learners included.
    pub is_alone: bool,
    /// Everything that may have been acknowledged elsewhere before it was alone is up to here.
    pub alone_from: u64,
}

impl Status {
    pub fn new(tick: Duration) -> Self {
        Self { tick, ..Self::default() }
    }

    pub fn ticked(&self, at: Instant) {
        if self.ticked.load().as_deref().is_some_and(|last| self.is_pause(*last, at)) {
            self.pauses.fetch_add(1, Release);
        }
        // After the count: whoever sees this tick sees the pause that it ended.
        self.ticked.store(Some(Arc::new(at)));
    }

    fn is_pause(&self, from: Instant, to: Instant) -> bool {
        to.saturating_duration_since(from) >= PAUSE * self.tick
    }

    /// How often raft has stood still; `None`: it does so now.
    pub fn pauses(&self, now: Instant) -> Option<u64> {
        let is_steady = self.ticked.load().as_deref().is_some_and(|last| !self.is_pause(*last, now));
        is_steady.then(|| self.pauses.load(Acquire))
    }

    pub fn leader_since(&self) -> Option<Instant> {
        self.leader_since.load().as_deref().copied()
    }

    pub(super) fn write(&self, now: &Reading, at: Instant) {
        let changed = self.leader.load(Relaxed) != now.leader
            || self.term.load(Relaxed) != now.term
            || self.is_leader.load(Relaxed) != now.is_leader;
        if self.leader.load(Relaxed) != now.leader && now.leader != 0 {
            self.leader_changes.fetch_add(1, Relaxed);
            self.leader_since.store(Some(Arc::new(at)));
        }
        self.commit.store(now.commit, Relaxed);
        self.last_index.store(now.last_index, Relaxed);
        self.is_learner.store(now.is_learner, Relaxed);
        self.leader.store(now.leader, Relaxed);
        self.is_leader.store(now.is_leader, Relaxed);
        self.alone_from.store(now.alone_from, Relaxed);
        self.is_alone.store(now.is_alone, Relaxed);
        self.term.store(now.term, Release);
        if changed {
            self.changed.notify_waiters();
        }
    }

    pub fn read(&self) -> Reading {
        Reading {
            term: self.term.load(Acquire),
            leader: self.leader.load(Relaxed),
            commit: self.commit.load(Relaxed),
            last_index: self.last_index.load(Relaxed),
            is_leader: self.is_leader.load(Relaxed),
            is_learner: self.is_learner.load(Relaxed),
            is_alone: self.is_alone.load(Relaxed),
            alone_from: self.alone_from.load(Relaxed),
        }
    }

    /// The term this member leads alone in.
    pub fn leads_alone(&self) -> Option<u64> {
        let term = self.term.load(Acquire);
        (self.is_leader.load(Relaxed) && self.is_alone.load(Relaxed)).then_some(term)
    }

    /// Whether who has applied so much may answer without a round: the only member, leading with an entry of its term
    /// applied. Nothing is acknowledged elsewhere, and what was before it was alone is applied, too. A learner counts: it
    /// takes no writes of clients, but that is not decided here.
    pub fn needs_no_round(&self, applied_term: u64, applied_index: u64) -> bool {
        self.leads_alone() == Some(applied_term) && applied_index >= self.alone_from.load(Relaxed)
    }

    /// Waits until `done` holds of a reading.
    pub async fn until(&self, mut done: impl FnMut(&Reading) -> bool) -> Reading {
        loop {
            let told = self.changed.notified();
            tokio::pin!(told);
            // Registered before the look, so that a change between look and wait is not missed.
            told.as_mut().enable();
            let now = self.read();
            if done(&now) {
                return now;
            }
            told.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    #[test]
    fn a_pause_is_remembered_when_ticks_go_on() {
        // L-11
        let (status, start) = (Status::new(TICK), Instant::now());
        assert_eq!(status.pauses(start), None, "it has not begun");
        status.ticked(start);
        status.ticked(start + TICK);
        assert_eq!(status.pauses(start + 3 * TICK), Some(0), "two ticks are late at times");
        assert_eq!(status.pauses(start + 4 * TICK), None, "it stands still");
        status.ticked(start + 5 * TICK);
        assert_eq!(status.pauses(start + 5 * TICK), Some(1), "one tick does not make it forgotten");
        status.ticked(start + 6 * TICK);
        status.ticked(start + 20 * TICK);
        assert_eq!(status.pauses(start + 20 * TICK), Some(2));
    }
}
