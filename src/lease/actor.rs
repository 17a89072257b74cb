//! The lease expirer actor: renews here without raft, proposes the revocation of what ran out.
//!
//! Owns the deadlines ([`Expirer`]). Control lane: what apply granted and removed, leadership. Data lane: keepalives and
//! questions for the remaining time from handlers; full means that the handler tries again. Ticks come from outside.
//! A lease is renewed here first, then looked up in the current view by the handler (L-9, L-11, H-41).

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::{Expirer, LeaseSet, Renewal};
use crate::{
    actor::{Actor, Message, Turn, shell::Flow},
    apply::LeaseNotice,
    pb::etcdserverpb::LeaseCheckpoint,
    sim::HashMap,
};

#[derive(Debug)]
pub enum Ask {
    /// Answered with the granted time; 0: the lease is gone. No answer: this member does not lead.
    Renew { id: i64, answer: oneshot::Sender<Renewed> },
    /// Milliseconds left; `None`: no timer here.
    Remaining { id: i64, answer: oneshot::Sender<Option<i64>> },
    /// All leases in order of remaining time; empty when not leading.
    List { answer: oneshot::Sender<Vec<i64>> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// Renewed for this many seconds.
    Ttl {
        ttl: i64,
        clear_checkpoint: bool,
    },
    /// It ran out and is gone now.
    Gone,
    /// No timer here: the view tells whether there is such a lease.
    Unknown,
    NotLeader,
}

impl Message for Ask {
    const KINDS: &'static [&'static str] = &["renew", "remaining", "list"];

    fn kind(&self) -> usize {
        match self {
            Ask::Renew { .. } => 0,
            Ask::Remaining { .. } => 1,
            Ask::List { .. } => 2,
        }
    }
}

pub enum Control {
    Notices(Vec<LeaseNotice>),
    /// This member leads and has applied everything committed before.
    Leader {
        term: u64,
    },
    Demoted,
    /// Look at the deadlines.
    Tick,
    Stop,
}

/// What the actor asks of raft, through proposals of the server's own.
pub trait Proposer: Unpin + 'static {
    /// Only as leader of `term`.
    fn revoke(&mut self, id: i64, term: u64);
    fn checkpoint(&mut self, checkpoints: Vec<LeaseCheckpoint>, term: u64);
}

pub struct LeaseActor<P> {
    expirer: Expirer,
    /// The term the deadlines belong to.
    term: u64,
    proposer: P,
    /// The leases of the newest view.
    leases: Box<dyn Fn() -> LeaseSet>,
    start: Instant,
    /// Keepalives of leases that ran out and are not gone yet (L-9).
    waiting: HashMap<i64, Vec<oneshot::Sender<Renewed>>>,
    /// Deadlines due next, for the ticker.
    next_at: Arc<std::sync::atomic::AtomicU64>,
}

impl<P: Proposer> LeaseActor<P> {
    /// `next_at`: where the ticker reads when it must tick next, in ms since `start`; `u64::MAX`: never.
    pub fn new(
        expirer: Expirer,
        proposer: P,
        leases: Box<dyn Fn() -> LeaseSet>,
        next_at: Arc<std::sync::atomic::AtomicU64>,
        start: Instant,
    ) -> Self {
        Self { expirer, term: 0, proposer, leases, start, waiting: HashMap::default(), next_at }
    }

    fn ms(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_millis() as u64
    }

    /// Rounded up: what begins now must not end a part of a millisecond early.
    fn ms_up(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_micros().div_ceil(1000) as u64
    }

    fn gone(&mut self, id: i64) {
        self.expirer.on_revoked(id);
        for answer in self.waiting.remove(&id).unwrap_or_default() {
            let _ = answer.send(Renewed::Gone);
        }
    }

    /// While revocations are refused, callers give up and come again: those who gave up must not pile up.
    fn forget_who_left(&mut self) {
        self.waiting.retain(|_, answers| {
            answers.retain(|answer| !answer.is_closed());
            !answers.is_empty()
        });
    }

    fn work(&mut self, now: Instant) {
        let now = self.ms(now);
        for id in self.expirer.tick(now) {
            self.proposer.revoke(id, self.term);
        }
        loop {
            let checkpoints = self.expirer.next_checkpoints(now);
            if checkpoints.is_empty() {
                break;
            }
            self.proposer.checkpoint(checkpoints, self.term);
        }
        let next = self.expirer.next_at().unwrap_or(u64::MAX);
        self.next_at.store(next, std::sync::atomic::Ordering::Relaxed);
    }
}

impl<P: Proposer> Actor for LeaseActor<P> {
    type Message = Ask;
    type Control = Control;

    fn on_message(&mut self, ask: Ask, turn: &Turn) {
        match ask {
            Ask::Renew { id, answer } => {
                let renewed = match self.expirer.on_renew(id, self.ms_up(turn.now)) {
                    Renewal::Renewed { ttl, clear_checkpoint } => {
                        // An earlier renewal's request to take it back may have failed, or be on its way still.
                        let is_written = (self.leases)().checkpoint(id).is_some_and(|remaining| remaining > 0);
                        Renewed::Ttl { ttl, clear_checkpoint: clear_checkpoint || is_written }
                    }
                    Renewal::Expired => {
                        self.waiting.entry(id).or_default().push(answer);
                        return;
                    }
                    Renewal::Unknown => Renewed::Unknown,
                    Renewal::NotLeader => Renewed::NotLeader,
                };
                let _ = answer.send(renewed);
            }
            Ask::Remaining { id, answer } => {
                // Some time has passed since, however little: a full time never shows.
                let _ = answer.send(self.expirer.remaining_ms(id, self.ms_up(turn.now) + 1));
            }
            Ask::List { answer } => {
                let _ = answer.send(self.expirer.by_remaining());
            }
        }
    }

    fn on_control(&mut self, message: Control, turn: &Turn) -> Flow {
        match message {
            Control::Notices(notices) => {
                let now = self.ms_up(turn.now);
                for notice in notices {
                    match notice {
                        LeaseNotice::Granted { id, ttl } => self.expirer.on_granted(id, ttl, now),
                        LeaseNotice::Gone { id } => self.gone(id),
                    }
                }
            }
            Control::Leader { term } => {
                self.term = term;
                // Looked at here: a lease granted meanwhile is in it, or its notice comes behind this message.
                self.expirer.on_leader(self.ms_up(turn.now), &(self.leases)());
            }
            Control::Demoted => {
                self.expirer.on_demoted();
                for (_, answers) in self.waiting.drain() {
                    for answer in answers {
                        let _ = answer.send(Renewed::NotLeader);
                    }
                }
            }
            Control::Tick => self.forget_who_left(),
            Control::Stop => return Flow::Stop,
        }
        Flow::Continue
    }

    fn on_turn_end(&mut self, turn: &Turn) {
        self.work(turn.now);
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc, time::Duration};

    use super::*;
    use crate::{lease::Leases, storage::WriteBatch};

    /// Revocations are asked for and never happen.
    struct Refused;

    impl Proposer for Refused {
        fn revoke(&mut self, _: i64, _: u64) {}
        fn checkpoint(&mut self, _: Vec<LeaseCheckpoint>, _: u64) {}
    }

    #[test]
    fn callers_that_gave_up_are_forgotten_while_revocations_are_refused() {
        let actor_start = Instant::now();
        let mut leases = Leases::new(1);
        leases.grant(7, 1, &mut WriteBatch::default()).expect("a lease");
        let view = Box::new(move || leases.set().clone());
        let mut actor = LeaseActor::new(Expirer::new(100, 7_000, None), Refused, view, Arc::default(), actor_start);
        let turn = |ms| Turn { now: actor_start + Duration::from_millis(ms) };
        actor.on_control(Control::Leader { term: 2 }, &turn(0));
        actor.on_turn_end(&turn(60_000));
        let renew = |actor: &mut LeaseActor<Refused>| {
            let (answer, renewed) = oneshot::channel();
            actor.on_message(Ask::Renew { id: 7, answer }, &turn(60_000));
            renewed
        };
        let mut stays = renew(&mut actor);
        for _ in 0..1_000 {
            drop(renew(&mut actor));
        }
        actor.on_control(Control::Tick, &turn(67_000));
        assert_eq!(actor.waiting[&7].len(), 1);
        actor.on_control(Control::Notices(vec![LeaseNotice::Gone { id: 7 }]), &turn(67_000));
        assert_eq!(stays.try_recv(), Ok(Renewed::Gone));
        drop(renew(&mut actor));
        actor.on_control(Control::Tick, &turn(67_000));
        assert!(actor.waiting.is_empty());
    }

    #[test]
    fn renewals_ask_to_take_a_checkpoint_back_until_it_is() {
        // L-31
        let leases = Rc::new(RefCell::new(Leases::new(1)));
        let seen = leases.clone();
        let view = Box::new(move || seen.borrow().set().clone());
        let start = Instant::now();
        let batch = &mut WriteBatch::default();
        let checkpoint = |remaining| leases.borrow_mut().checkpoint(7, remaining, false, &mut WriteBatch::default());
        leases.borrow_mut().grant(7, 60, batch).expect("a lease");
        checkpoint(20).expect("a lease");
        let mut actor = LeaseActor::new(Expirer::new(100, 7_000, None), Refused, view, Arc::default(), start);
        actor.on_control(Control::Leader { term: 2 }, &Turn { now: start });
        let mut clears = || {
            let (answer, mut renewed) = oneshot::channel();
            actor.on_message(Ask::Renew { id: 7, answer }, &Turn { now: start });
            matches!(renewed.try_recv(), Ok(Renewed::Ttl { ttl: 60, clear_checkpoint: true }))
        };
        assert!(clears());
        assert!(clears(), "the first may have failed");
        checkpoint(0).expect("a lease");
        assert!(!clears());
    }

    #[test]
    fn a_lease_granted_before_leadership_is_heard_of_has_a_deadline() {
        // H-38: its notice came while this member did not lead.
        let leases = Rc::new(RefCell::new(Leases::new(1)));
        let seen = leases.clone();
        let view = Box::new(move || seen.borrow().set().clone());
        let start = Instant::now();
        let mut actor = LeaseActor::new(Expirer::new(100, 7_000, None), Refused, view, Arc::default(), start);
        leases.borrow_mut().grant(7, 60, &mut WriteBatch::default()).expect("a lease");
        let turn = Turn { now: start + Duration::from_secs(1) };
        actor.on_control(Control::Notices(vec![LeaseNotice::Granted { id: 7, ttl: 60 }]), &turn);
        actor.on_control(Control::Leader { term: 2 }, &turn);
        let (answer, mut renewed) = oneshot::channel();
        actor.on_message(Ask::Renew { id: 7, answer }, &turn);
        assert_eq!(renewed.try_recv(), Ok(Renewed::Ttl { ttl: 60, clear_checkpoint: false }));
    }
}
