//! The two lanes of an actor.
//!
//! Senders push into the data lane if there is room and wake the actor with one nudge; while that nudge is on its way,
//! further messages cost no wake-up. The control lane has a known, small number of senders and is not bounded; it is
//! drained first in every turn. The inbox exists before its actor runs, so actors can be wired in any order, and tests
//! can stand in for an actor by draining its inbox themselves.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};
use std::time::Instant;

use super::{Message, Stats, stats::Refusal};

/// Wakes the shell.
pub(super) struct Nudge;

impl actix::Message for Nudge {
    type Result = ();
}

#[derive(Default)]
pub(super) struct Waker {
    /// True while a nudge is on its way to the actor.
    pub scheduled: AtomicBool,
    pub target: OnceLock<actix::Recipient<Nudge>>,
}

impl Waker {
    pub fn wake(&self) {
        if !self.scheduled.swap(true, Ordering::AcqRel)
            && let Some(target) = self.target.get()
        {
            // At most one nudge is outstanding, so the mailbox bound that `do_send` ignores cannot matter.
            #[allow(clippy::disallowed_methods)]
            target.do_send(Nudge);
        }
    }
}

pub(super) struct Queued<M> {
    pub message: M,
    pub at: Instant,
}

/// What an actor takes its messages from. Dropping it refuses all further messages.
pub struct Inbox<M, C> {
    pub(super) data: flume::Receiver<Queued<M>>,
    pub(super) control: flume::Receiver<C>,
    pub(super) waker: Arc<Waker>,
    pub stats: Arc<Stats>,
}

/// Where an actor's owner and its neighbours put messages.
pub struct Sender<M, C> {
    data: flume::Sender<Queued<M>>,
    control: flume::Sender<C>,
    waker: Arc<Waker>,
    pub stats: Arc<Stats>,
}

impl<M, C> Clone for Sender<M, C> {
    fn clone(&self) -> Self {
        Self {
            data: self.data.clone(),
            control: self.control.clone(),
            waker: self.waker.clone(),
            stats: self.stats.clone(),
        }
    }
}

impl<M: Message, C: Send + 'static> Inbox<M, C> {
    pub fn new(name: &'static str, capacity: usize, capacity_bytes: usize) -> (Sender<M, C>, Inbox<M, C>) {
        let (data_tx, data_rx) = flume::unbounded(); // bounded by `Stats::reserve`, whose bound can change live
        let (control_tx, control_rx) = flume::unbounded();
        let waker = Arc::new(Waker::default());
        let stats = Arc::new(Stats::new(name, M::KINDS, capacity, capacity_bytes));
        (
            Sender { data: data_tx, control: control_tx, waker: waker.clone(), stats: stats.clone() },
            Inbox { data: data_rx, control: control_rx, waker, stats },
        )
    }

    /// Takes one message without an actor: for tests and for code that serves its inbox inline.
    pub fn try_recv(&self) -> Option<M> {
        let queued = self.data.try_recv().ok()?;
        self.stats.release(queued.message.bytes());
        Some(queued.message)
    }

    pub fn try_recv_control(&self) -> Option<C> {
        self.control.try_recv().ok()
    }
}

/// The message comes back to the sender, with the reason.
#[derive(Debug)]
pub struct Refused<M>(pub M, pub Refusal);

impl<M: Message, C: Send + 'static> Sender<M, C> {
    /// Queues `message`, or gives it back if the lane is full or the actor is gone.
    pub fn try_send(&self, message: M) -> Result<(), Refused<M>> {
        let bytes = message.bytes();
        if let Err(why) = self.stats.reserve(bytes) {
            return Err(Refused(message, why));
        }
        let at = Instant::now();
        self.stats.queued(at);
        match self.data.send(Queued { message, at }) {
            Ok(()) => {
                self.waker.wake();
                Ok(())
            }
            Err(flume::SendError(queued)) => {
                self.stats.release(bytes);
                self.stats.refuse(Refusal::Stopped);
                Err(Refused(queued.message, Refusal::Stopped))
            }
        }
    }

    /// Control messages are never refused; false if the actor is gone.
    pub fn control(&self, message: C) -> bool {
        let sent = self.control.send(message).is_ok();
        self.waker.wake();
        sent
    }

    /// Makes the actor look at its lanes and controls again, e.g. after a pause ended.
    pub fn wake(&self) {
        self.waker.wake();
    }
}
