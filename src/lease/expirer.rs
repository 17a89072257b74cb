//! Deadlines on the leader. A core: milliseconds come in as a parameter, ids to revoke go out.
//!
//! Nothing here is replicated and nothing is kept while this member does not lead. The shell feeds it apply's
//! notices in log order, proposes what [`Expirer::tick`] hands out only after a quorum has confirmed that this
//! member still leads, and calls again at [`Expirer::next_at`] or when a revocation has come back.
//!
//! Invariants:
//! 1. A lease is handed out for revocation only at or after its deadline, and its deadline is never earlier than its
//!    time to live after the last grant or renewal.
//! 2. `due` and `revoking` hold each lease exactly once between them, so renewals cost no memory.
//! 3. At most `revoking_max` leases are in `revoking`.

use std::collections::BTreeSet;

use crate::sim::HashMap;

use super::{LeaseSet, TTL_MAX, checkpoints::Checkpoints};
use crate::pb::etcdserverpb::LeaseCheckpoint;

/// Revocations proposed and not yet applied. A fifth of the 5,000 entries that may wait for apply before proposals
/// are refused (committed − applied), so that expiry in bulk never makes a client's request fail.
pub const REVOKING_MAX: usize = 1_000;
/// With this many leases a new leader spreads the deadlines.
const SPREAD_LEASES_MIN: usize = 1_000;
/// Deadlines per second of a spread.
const SPREAD_PER_SECOND: u64 = 750;

#[derive(Debug)]
pub struct Expirer {
    leading: bool,
    timers: HashMap<i64, Timer>,
    /// `(queued_at, id)`; a renewal does not move it. What comes up before its deadline is queued again.
    due: BTreeSet<(u64, i64)>,
    /// `(proposed_at, id)`.
    revoking: BTreeSet<(u64, i64)>,
    revoking_max: usize,
    checkpoints: Checkpoints,
    election_timeout_ms: u64,
    request_timeout_ms: u64,
}

#[derive(Debug)]
struct Timer {
    deadline: u64,
    ttl: i64,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// In `due` at this time.
    Queued(u64),
    /// In `revoking` at this time.
    Revoking(u64),
}

/// The answer to a keepalive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// The whole time again. `clear_checkpoint`: first replicate a checkpoint of 0 for this lease, or the next leader
    /// would cut short what this answer promises.
    Renewed {
        ttl: i64,
        clear_checkpoint: bool,
    },
    /// It ran out and its revocation is on the way: wait for it, then answer 0. Never revived.
    Expired,
    /// No timer. If the current view has the lease, its grant's notice is still on the way here.
    Unknown,
    NotLeader,
}

impl Expirer {
    /// `checkpoint_interval_ms`: how often what a long lease has left is replicated; `None`: never.
    pub fn new(election_timeout_ms: u64, request_timeout_ms: u64, checkpoint_interval_ms: Option<u64>) -> Self {
        Self {
            leading: false,
            timers: HashMap::default(),
            due: BTreeSet::new(),
            revoking: BTreeSet::new(),
            revoking_max: REVOKING_MAX,
            checkpoints: Checkpoints::new(checkpoint_interval_ms),
            election_timeout_ms,
            request_timeout_ms,
        }
    }

    /// How many revocations may be under way; at least 1.
    pub fn set_revoking_max(&mut self, max: usize) {
        self.revoking_max = max.max(1);
    }

    /// This member leads and has applied everything committed before: every lease starts anew.
    pub fn on_leader(&mut self, now: u64, leases: &LeaseSet) {
        self.on_demoted();
        self.leading = true;
        let mut deadlines: Vec<(u64, i64)> = Vec::with_capacity(leases.len());
        self.timers.reserve(leases.len());
        for (id, ttl, remaining) in leases.iter() {
            let left = if remaining > 0 { remaining } else { ttl };
            deadlines.push((now + millis(left) + self.election_timeout_ms, id));
            self.timers.insert(id, Timer { deadline: 0, ttl, state: State::Queued(0) });
            self.checkpoints.insert(id, millis(ttl), remaining > 0, now);
        }
        if deadlines.len() >= SPREAD_LEASES_MIN {
            spread(&mut deadlines);
        }
        for (deadline, id) in &deadlines {
            let timer = self.timers.get_mut(id).expect("inserted above");
            timer.deadline = *deadline;
            timer.state = State::Queued(*deadline);
        }
        self.due = deadlines.into_iter().collect();
    }

    /// No lease ends here until this member leads again.
    pub fn on_demoted(&mut self) {
        self.leading = false;
        self.timers = HashMap::default();
        self.due.clear();
        self.revoking.clear();
        self.checkpoints.clear();
    }

    /// Apply granted a lease.
    pub fn on_granted(&mut self, id: i64, ttl: i64, now: u64) {
        if !self.leading {
            return;
        }
        self.forget(id);
        let deadline = now + millis(ttl);
        self.timers.insert(id, Timer { deadline, ttl, state: State::Queued(deadline) });
        self.due.insert((deadline, id));
        self.checkpoints.insert(id, millis(ttl), false, now);
    }

    /// Apply revoked a lease, for whatever reason, or found that it was gone.
    pub fn on_revoked(&mut self, id: i64) {
        self.forget(id);
    }

    /// A client keeps a lease alive.
    pub fn on_renew(&mut self, id: i64, now: u64) -> Renewal {
        if !self.leading {
            return Renewal::NotLeader;
        }
        let Some(timer) = self.timers.get_mut(&id) else { return Renewal::Unknown };
        let State::Queued(queued_at) = timer.state else { return Renewal::Expired };
        if timer.deadline <= now {
            return Renewal::Expired;
        }
        timer.deadline = now + millis(timer.ttl);
        // Only the first renewal after a change of leader can move a deadline forward: to before its place in `due`.
        if timer.deadline < queued_at {
            self.due.remove(&(queued_at, id));
            self.due.insert((timer.deadline, id));
            timer.state = State::Queued(timer.deadline);
        }
        Renewal::Renewed { ttl: timer.ttl, clear_checkpoint: self.checkpoints.on_renewed(id, now) }
    }

    /// Milliseconds a lease has left; 0 or less once it has run out. `None`: unknown, or this member does not lead.
    pub fn remaining_ms(&self, id: i64, now: u64) -> Option<i64> {
        self.timers.get(&id).map(|timer| timer.deadline as i64 - now as i64)
    }

    /// All ids in order of the time they have left; empty while this member does not lead.
    pub fn by_remaining(&self) -> Vec<i64> {
        let mut leases: Vec<(u64, i64)> = self.timers.iter().map(|(id, timer)| (timer.deadline, *id)).collect();
        leases.sort_unstable();
        leases.into_iter().map(|(_, id)| id).collect()
    }

    /// Leases to propose the revocation of, longest overdue first. One whose revocation was not applied within the
    /// request timeout is handed out again, after those that wait for their first turn.
    pub fn tick(&mut self, now: u64) -> Vec<i64> {
        while let Some(&(proposed_at, id)) = self.revoking.first()
            && proposed_at + self.request_timeout_ms <= now
        {
            self.revoking.pop_first();
            self.queue(id, now);
        }
        let mut revoke = Vec::new();
        while self.revoking.len() < self.revoking_max
            && let Some(&(queued_at, id)) = self.due.first()
            && queued_at <= now
        {
            self.due.pop_first();
            let timer = self.timers.get_mut(&id).expect("what is due has a timer");
            if timer.deadline <= now {
                timer.state = State::Revoking(now);
                self.revoking.insert((now, id));
                revoke.push(id);
            } else {
                let deadline = timer.deadline;
                self.queue(id, deadline);
            }
        }
        revoke
    }

    /// The next checkpoints to propose as one request, each with the seconds left rounded up; empty when there is
    /// nothing to do now.
    pub fn next_checkpoints(&mut self, now: u64) -> Vec<LeaseCheckpoint> {
        let timers = &self.timers;
        let left = |id: i64| {
            let timer = timers.get(&id)?;
            let seconds = timer.deadline.saturating_sub(now).div_ceil(1000) as i64;
            (0 < seconds && seconds < timer.ttl).then_some(seconds)
        };
        let batch = self.checkpoints.next_batch(now, left);
        batch.into_iter().map(|(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl }).collect()
    }

    /// When [`Expirer::tick`] or [`Expirer::next_checkpoints`] next has something to do, if nothing else happens.
    pub fn next_at(&self) -> Option<u64> {
        let retry = self.revoking.first().map(|(proposed_at, _)| proposed_at + self.request_timeout_ms);
        let due = self.due.first().map(|(queued_at, _)| *queued_at);
        let due = due.filter(|_| self.revoking.len() < self.revoking_max);
        [retry, due, self.checkpoints.next_at()].into_iter().flatten().min()
    }

    /// Leases whose revocation is under way, for metrics.
    pub fn revoking(&self) -> usize {
        self.revoking.len()
    }

    pub fn len(&self) -> usize {
        self.timers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.timers.is_empty()
    }

    #[cfg(test)]
    pub(super) fn places(&self) -> (usize, usize) {
        (self.timers.len(), self.due.len() + self.revoking.len())
    }

    fn queue(&mut self, id: i64, at: u64) {
        self.timers.get_mut(&id).expect("the caller holds its place").state = State::Queued(at);
        self.due.insert((at, id));
    }

    fn forget(&mut self, id: i64) {
        if let Some(timer) = self.timers.remove(&id) {
            match timer.state {
                State::Queued(at) => self.due.remove(&(at, id)),
                State::Revoking(at) => self.revoking.remove(&(at, id)),
            };
            self.checkpoints.remove(id);
        }
    }
}

/// Rows and entries come from outside: whatever they say, sums of these fit.
fn millis(seconds: i64) -> u64 {
    seconds.clamp(0, TTL_MAX).unsigned_abs() * 1000
}

/// Moves deadlines later, never earlier, until no more than [`SPREAD_PER_SECOND`] fall into any second.
fn spread(deadlines: &mut [(u64, i64)]) {
    deadlines.sort_unstable();
    let mut free_at_us = 0;
    for (deadline, _) in deadlines {
        let at_us = free_at_us.max(*deadline * 1000);
        *deadline = at_us.div_ceil(1000);
        free_at_us = at_us + 1_000_000_u64.div_ceil(SPREAD_PER_SECOND);
    }
}
