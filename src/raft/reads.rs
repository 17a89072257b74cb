//! Linearizable reads: who waits for which round, and which context belongs to whom.
//!
//! One round of this member is under way at a time; it serves everybody who waited when it was asked. A leader gives every
//! request, its own and those of others, a context that is never used twice: raft-rs takes the caller's bytes for the key
//! of a request, so a repeated one would let late answers to an older round satisfy a newer one.

use std::time::Instant;

use bytes::Bytes;

use crate::{
    actor::Permit,
    apply::Reply,
    sim::{self, Bug, HashMap},
};

/// Somebody who waits for a read index.
#[derive(Debug)]
pub struct ReadRequest {
    pub reply: Reply,
    pub deadline: Instant,
    /// Held until it is answered.
    pub permit: Permit,
}

pub(super) struct Round {
    context: Bytes,
    waiters: Vec<ReadRequest>,
    asked_at: u64,
    /// Whom it was asked of.
    pub leader: u64,
}

pub(super) struct Reads {
    waiting: Vec<ReadRequest>,
    round: Option<Round>,
    next: u64,
    /// As leader: our context to the one it was asked with.
    originals: HashMap<Bytes, Bytes>,
}

impl Reads {
    /// `seed` differs between members and between starts of one member.
    pub fn new(seed: u64) -> Self {
        Self { waiting: Vec::new(), round: None, next: seed, originals: HashMap::default() }
    }

    pub fn add(&mut self, request: ReadRequest) {
        self.waiting.push(request);
    }

    pub fn pending(&self) -> usize {
        self.waiting.len() + self.round.as_ref().map_or(0, |r| r.waiters.len())
    }

    fn fresh(&mut self) -> Bytes {
        self.next += 1;
        Bytes::copy_from_slice(&self.next.to_be_bytes())
    }

    /// The context to ask `leader` with, if a round is due: nobody is asked and somebody waits, or no answer came for
    /// `retry` ticks.
    pub fn due(&mut self, leader: u64, tick: u64, retry: u64) -> Option<Bytes> {
        let waiters = match &mut self.round {
            Some(round) if tick - round.asked_at < retry => return None,
            // Whoever came since may join: the new request begins after they came.
            Some(round) => std::mem::take(&mut round.waiters),
            None => Vec::new(),
        };
        let waiters: Vec<_> = waiters.into_iter().chain(self.waiting.drain(..)).collect();
        if waiters.is_empty() {
            self.round = None;
            return None;
        }
        let again = self.round.as_ref().map(|round| round.context.clone());
        let context = again.filter(|_| sim::has(Bug::RepeatedReadContext)).unwrap_or_else(|| self.fresh());
        self.round = Some(Round { context: context.clone(), waiters, asked_at: tick, leader });
        Some(context)
    }

    /// Whoever waits for a round with this context, when its answer is here.
    pub fn answered(&mut self, context: &[u8]) -> Vec<ReadRequest> {
        match self.round.take_if(|round| round.context == context) {
            Some(round) => round.waiters,
            None => Vec::new(),
        }
    }

    /// Those whose round was asked of another leader than `leader`.
    pub fn lost(&mut self, leader: u64) -> Vec<ReadRequest> {
        match self.round.take_if(|round| leader != 0 && round.leader != leader) {
            Some(round) => round.waiters,
            None => Vec::new(),
        }
    }

    /// Those whose time is over.
    pub fn late(&mut self, now: Instant) -> Vec<ReadRequest> {
        let mut late = Vec::new();
        let waiters = self.round.iter_mut().map(|round| &mut round.waiters);
        for list in waiters.chain([&mut self.waiting]) {
            late.extend(list.extract_if(.., |request| request.deadline <= now));
        }
        late
    }

    pub fn take_all(&mut self) -> Vec<ReadRequest> {
        let round = self.round.take().map(|round| round.waiters).unwrap_or_default();
        round.into_iter().chain(self.waiting.drain(..)).collect()
    }

    /// As leader: a context of our own in place of `original`.
    pub fn disguise(&mut self, original: Bytes) -> Bytes {
        let context = self.fresh();
        self.originals.insert(context.clone(), original);
        context
    }

    /// The context that ours stands for; taken once.
    pub fn original(&mut self, context: &[u8]) -> Option<Bytes> {
        self.originals.remove(context)
    }

    /// Leadership is over: answers that still come belong to nobody.
    pub fn forget_originals(&mut self) {
        self.originals.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor::Gate;
    use std::time::Duration;

    fn request(now: Instant) -> ReadRequest {
        let permit = Gate::new("test", 1, 1).try_enter(1).unwrap();
        ReadRequest { reply: Reply::new(0).0, deadline: now + Duration::from_secs(7), permit }
    }

    #[test]
    fn one_round_serves_all_who_waited_at_its_start_and_no_one_else() {
        // D-11
        let now = Instant::now();
        let mut reads = Reads::new(100);
        assert_eq!(reads.due(1, 0, 5), None, "nobody waits");
        reads.add(request(now));
        reads.add(request(now));
        let first = reads.due(1, 0, 5).unwrap();
        reads.add(request(now));
        assert_eq!(reads.due(1, 1, 5), None, "one round at a time");
        assert_eq!(reads.answered(&first).len(), 2);
        assert!(reads.answered(&first).is_empty(), "an answer counts once");
        let second = reads.due(1, 1, 5).unwrap();
        assert_ne!(first, second);
        assert_eq!(reads.answered(&second).len(), 1);
    }

    #[test]
    fn a_round_without_answer_is_asked_again_under_another_name() {
        // D-11, H-17
        let now = Instant::now();
        let mut reads = Reads::new(100);
        reads.add(request(now));
        let first = reads.due(1, 0, 5).unwrap();
        reads.add(request(now));
        let second = reads.due(1, 5, 5).unwrap();
        assert!(reads.answered(&first).is_empty(), "too late: somebody has joined since");
        assert_eq!(reads.answered(&second).len(), 2);
    }

    #[test]
    fn a_new_leader_fails_the_round_of_the_old_one_only() {
        // D-12
        let now = Instant::now();
        let mut reads = Reads::new(100);
        reads.add(request(now));
        reads.due(1, 0, 5).unwrap();
        reads.add(request(now));
        assert!(reads.lost(0).is_empty() && reads.lost(1).is_empty());
        assert_eq!(reads.lost(2).len(), 1);
        assert!(reads.due(2, 1, 5).is_some(), "who was not asked for yet is asked for there");
        assert_eq!(reads.late(now + Duration::from_secs(8)).len(), 1);
        assert_eq!(reads.pending(), 0);
    }

    #[test]
    fn contexts_of_others_come_back_once() {
        let mut reads = Reads::new(100);
        let original = Bytes::from_static(b"12345678");
        let (a, b) = (reads.disguise(original.clone()), reads.disguise(original.clone()));
        assert_ne!(a, b, "the same context twice is two requests");
        assert_eq!(reads.original(&a), Some(original));
        assert_eq!(reads.original(&a), None);
        reads.forget_originals();
        assert_eq!(reads.original(&b), None);
    }
}
